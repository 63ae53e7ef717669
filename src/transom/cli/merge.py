"""`transom merge`: several checkpoints of one model become one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from transom.cli.export import stage_bars
from transom.cli.options import Json, console, print_json
from transom.errors import MergeError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(merge)


def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models that were trained from one start: as MODEL elsewhere."),
    ],
    method: Annotated[
        str, typer.Option(help="mean (WARM), ema, slerp, liti, or warp, which is slerp and liti in one go.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    start: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where training began; for slerp, liti and warp.")
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(
            help="How much each model takes part, such as 0.7,0.3, which sum to 1; equal by default. In slerp of two, "
            "the second is WARP's lambda."
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Share of the way from --start, for liti and warp; 0.3 by default.")
    ] = None,
    mu: Annotated[
        float | None, typer.Option(help="Share of the way from the first model, for ema; 0.01 by default.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default what the models are in.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that an earlier run wrote.")] = False,
    json: Json = False,
) -> None:
    """Average checkpoints of one model, a block of rows at a time: memory does not grow with the model."""
    from transom.backends.folder import check_absent
    from transom.training.averaging import Average, check_start
    from transom.training.merge import MERGED, load_alike, merge_models

    # What can be refused at once should not wait for the weights.
    check_absent(out, overwrite=overwrite, kind=MERGED)
    average = Average.of(method, len(models), shares=_numbers(shares), eta=eta, mu=mu)
    check_start(average, start is not None)
    loaded = load_alike([*models, *([] if start is None else [start])])
    with stage_bars() as on_progress:
        merged = merge_models(
            loaded[: len(models)],
            average,
            out=out,
            start=None if start is None else loaded[-1],
            dtype=dtype,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    if json:
        print_json({"folder": str(out), **merged.report})
        return
    report = merged.report
    words = f"{method} of {len(models)}, {report['parameters']:,} parameters, {', '.join(report['dtypes'])}"
    console.print(f"{escape(str(out))}: {words}", highlight=False)
    if (angle := merged.median_angle) is not None:
        console.print(f"median angle between what training added: {angle:.1f} degrees", highlight=False)
    if merged.straight:
        console.print(f"{merged.straight} tensors without an angle went along a straight line", highlight=False)
    for line in report["not_done"]:
        console.print(f"[yellow]not done:[/yellow] {escape(line)}", highlight=False)


def _numbers(text: str | None) -> list[float] | None:
    """Numbers with commas between.

    Raises:
        MergeError: If they are none.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise MergeError(f"--shares takes numbers with commas between, such as 0.7,0.3, not {text!r}") from None
