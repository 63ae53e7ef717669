"""`transom finetune-vision`: teach a model's encoder of images on pairs of image and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from transom.cli.export import stage_bars
from transom.cli.options import Json, Mmproj, Model, Seed, Weights, console, load_model, print_json
from transom.cli.steps import Recompute, SaveEvery
from transom.errors import TrainingError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(finetune_vision)


def finetune_vision(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    data: Annotated[
        Path, typer.Option(metavar="FILE", help='JSON lines of pairs: {"image": PATH, "prompt": TEXT, "answer": TEXT}.')
    ],
    train: Annotated[str, typer.Option(help="projector, tower, or both.")] = "both",
    method: Annotated[
        str, typer.Option(help="lora: matrices of low rank beside the weights; full: the weights.")
    ] = "lora",
    rank: Annotated[int, typer.Option(help="Of those matrices.", min=1)] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="Factor on their products, times the rank; by default twice the rank.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.", min=1)] = 500,
    batch: Annotated[int, typer.Option(help="Pairs in a step.", min=1)] = 8,
    rows: Annotated[
        int, typer.Option(help="Pairs that go through the model at once, at most: faster, in more memory.", min=1)
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its peak.", min=0)] = 1e-4,
    held_out: Annotated[
        int, typer.Option(help="Pairs at the end of the file to measure on, before and after.", min=0)
    ] = 0,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole checkpoint with the adapter in its weights.")
    ] = False,
    recompute: Recompute = False,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    save_every: SaveEvery = 50,
    mmproj: Mmproj = None,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that an earlier run wrote.")] = False,
    json: Json = False,
) -> None:
    """Teach a model new kinds of images; its decoder stays. A run that is stopped goes on."""
    from transom.backends.folder import check_absent
    from transom.training.finetune_vision import RUN
    from transom.training.finetune_vision import finetune_vision as finetune
    from transom.training.loop import Metrics
    from transom.training.objectives.vision import VisionSettings

    check_absent(out, overwrite=overwrite, kind=RUN)
    if method not in ("lora", "full"):
        raise TrainingError(f"--method takes lora or full, not {method!r}")
    settings = VisionSettings(
        train=train,
        method="full" if method == "full" else "lora",
        rank=rank,
        alpha=alpha,
        steps=steps,
        batch=batch,
        rows=rows,
        learning_rate=learning_rate,
        recompute=recompute,
        seed=seed,
        device=device,
        save_every=save_every,
    )
    loaded = load_model(model, weights, seed, images=True, mmproj=mmproj)
    with stage_bars() as on_progress:

        def on_step(done: int, total: int, metrics: Metrics) -> None:
            words = f"step {done:,} of {total:,}, loss {metrics['loss']:.4f}, exact {metrics['exact']:.0%}"
            on_progress("train", done, total, words)

        result = finetune(
            loaded, settings, data=data, out=out, held_out=held_out, merge=merge, overwrite=overwrite, on_step=on_step
        )
    if json:
        losses = [metrics["loss"] for metrics in result.metrics]
        measured = {"before": result.before, "after": result.after}
        print_json({"folder": str(out), "train": train, "method": method, "loss": losses, **measured})
        return
    console.print(f"{escape(str(out))}: {train}, {method}, {len(result.metrics):,} steps", highlight=False)
    if result.before:
        for name, digits in (("loss", ".4f"), ("exact_match", ".1%")):
            values = f"{result.before[name]:{digits}} before and {result.after[name]:{digits}} after"
            console.print(f"held out, {name.replace('_', ' ')}: {values}", highlight=False)
