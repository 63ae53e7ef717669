"""`transom quantize`: a checkpoint that holds codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from transom.cli.export import conversions_table, stage_bars
from transom.cli.options import Json, Model, Seed, Weights, console, load_model, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(quantize)


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    scheme: Annotated[str, typer.Option(help="A scheme of transom list, or LINEARS:TABLE.")],
    method: Annotated[
        str | None,
        typer.Option(help="nearest, mse or gptq; by default gptq with --calibrate, nearest without."),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Text like that which the model will read; for gptq.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences of 512 tokens to calibrate on, at most.", min=1)] = 16,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that an earlier run wrote.")] = False,
    json: Json = False,
) -> None:
    """Round a model's weights and write a checkpoint that every target takes as it is: see transom export DIR."""
    from transom.backends.folder import check_absent
    from transom.errors import QuantizationError
    from transom.training.checkpoint import CHECKPOINT
    from transom.training.quantize import METHODS, quantize_model

    check_absent(out, overwrite=overwrite, kind=CHECKPOINT)
    chosen = method or ("gptq" if calibrate else "nearest")
    if calibrate is not None and chosen != "gptq":
        raise QuantizationError(f"the method {chosen!r} reads no text: leave out --calibrate, or choose gptq")
    if chosen not in METHODS:
        raise QuantizationError(f"no method named {chosen!r}: choose one of {', '.join(METHODS)}")
    loaded = load_model(model, weights, seed)
    with stage_bars() as on_progress:
        quantized = quantize_model(
            loaded,
            quant=scheme,
            out=out,
            method=chosen,  # type: ignore[arg-type]
            text=calibrate,
            samples=samples,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    conversions = [entry.to_json() for entry in quantized.conversions]
    if json:
        print_json({"folder": str(out), "scheme": scheme, "method": chosen, "conversions": conversions})
        return
    console.print(f"{escape(str(out))}: {scheme}, {chosen}")
    console.print(conversions_table(conversions))
