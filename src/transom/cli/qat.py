"""`transom qat`: train a checkpoint to be its own quantised self."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from transom.cli.export import stage_bars
from transom.cli.options import Json, Model, Seed, Weights, console, load_model, print_json
from transom.cli.steps import Device, Recompute, SaveEvery, changes, step_words
from transom.errors import TrainingError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(qat)


def qat(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    scheme: Annotated[str, typer.Option(help="A scheme of transom list, or LINEARS:TABLE.")],
    data: Annotated[Path, typer.Option(metavar="TEXT", help="Text to train on.")],
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.", min=1)] = 5000,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 256,
    batch: Annotated[int, typer.Option(help="Sequences in a step.", min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of weights, at its peak.", min=0)] = 5e-6,
    scale_rate: Annotated[float, typer.Option(help="Of scales, as a share of their size.", min=0)] = 1e-4,
    start: Annotated[
        str, typer.Option(help="nearest, or gptq to begin with codes calibrated on the same text.")
    ] = "gptq",
    samples: Annotated[
        int | None, typer.Option(help="Draws that stand for the teacher's distribution; by default all of it.", min=1)
    ] = None,
    head_dtype: Annotated[
        str, typer.Option(help="Of the products with the table: float32, or bfloat16 to be faster.")
    ] = "float32",
    recompute: Recompute = False,
    target: Annotated[str, typer.Option(help="Also compile the result, into DIR/TARGET; none for no artifact.")] = (
        "onnxruntime"
    ),
    device: Device = "cpu",
    save_every: SaveEvery = 50,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that an earlier run wrote.")] = False,
    json: Json = False,
) -> None:
    """Train a model for a scheme: it learns its own probabilities from before. A run that is stopped goes on."""
    from transom.backends.folder import check_absent
    from transom.passes.pipelines import PIPELINES
    from transom.training.checkpoint import CHECKPOINT
    from transom.training.objectives.qat import QatSettings
    from transom.training.qat import train

    check_absent(out, overwrite=overwrite, kind=CHECKPOINT)
    if start not in ("nearest", "gptq"):
        raise TrainingError(f"--start takes nearest or gptq, not {start!r}")
    if head_dtype not in ("float32", "bfloat16"):
        raise TrainingError(f"--head-dtype takes float32 or bfloat16, not {head_dtype!r}")
    if target != "none" and target not in PIPELINES:
        raise TrainingError(f"no target named {target!r}: choose one of {', '.join(PIPELINES)}, or none")
    settings = QatSettings(
        quant=scheme,
        steps=steps,
        length=length,
        batch=batch,
        learning_rate=learning_rate,
        scale_rate=scale_rate,
        start="gptq" if start == "gptq" else "nearest",
        samples=samples,
        head_dtype="bfloat16" if head_dtype == "bfloat16" else "float32",
        recompute=recompute,
        seed=seed,
        device=device,
        save_every=save_every,
    )
    loaded = load_model(model, weights, seed)
    with stage_bars() as on_progress:
        losses = train(
            loaded,
            settings,
            text=data,
            out=out,
            target=None if target == "none" else target,
            overwrite=overwrite,
            on_step=step_words(on_progress, "loss", word="KL"),
            on_progress=on_progress,
        )
    report = {
        "folder": str(out),
        "artifact": None if target == "none" else str(out / target),
        "scheme": scheme,
        "steps": len(losses),
        "kl": losses,
    }
    if json:
        print_json(report)
        return
    words = f"{scheme}, {changes([{'loss': kl} for kl in losses], {'loss': 'KL'})}"
    console.print(f"{escape(str(out))}: {words}", highlight=False)
