"""`transom distill`: train a student on the probabilities of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from transom.cli.export import stage_bars
from transom.cli.options import Json, Model, Seed, Weights, console, load_model, print_json
from transom.cli.steps import Device, Recompute, SaveEvery, WrittenDtype, changes, step_words, written_dtype


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(distill)


def distill(
    student: Model,
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="What it learns from; of the same vocabulary.")],
    data: Annotated[Path, typer.Option(metavar="TEXT", help="Text to learn on.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.", min=1)] = 1000,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 256,
    batch: Annotated[int, typer.Option(help="Sequences in a step.", min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its peak.", min=0)] = 1e-5,
    targets: Annotated[
        str,
        typer.Option(
            help="What stands for the teacher's distribution: full (all of it), counts (draws with replacement), "
            "renorm (the drawn tokens' probabilities, renormalised), renorm_wor (the same of draws without "
            "replacement), or top_k."
        ),
    ] = "counts",
    samples: Annotated[int, typer.Option(help="Draws a token, or likeliest tokens.", min=1)] = 256,
    forward: Annotated[
        float,
        typer.Option(
            help="Share of KL(teacher || student); the rest is KL(student || teacher), of full targets.", min=0, max=1
        ),
    ] = 1.0,
    online: Annotated[
        float, typer.Option(help="Share of sequences that the student continues itself.", min=0, max=1)
    ] = 0.0,
    prompt: Annotated[int, typer.Option(help="Tokens of the text that such a sequence begins with.", min=1)] = 32,
    replay: Annotated[Path | None, typer.Option(metavar="TEXT", help="Text of what should not be forgotten.")] = None,
    replay_share: Annotated[float, typer.Option(help="Share of sequences taken from it.", min=0, max=1)] = 0.25,
    teacher_samples: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the teacher's samples here, and draw only those that it lacks."),
    ] = None,
    freeze_table: Annotated[bool, typer.Option("--freeze-table", help="Leave the table of tokens as it is.")] = False,
    recompute: Recompute = False,
    dtype: WrittenDtype = "float32",
    device: Device = "cpu",
    save_every: SaveEvery = 50,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that an earlier run wrote.")] = False,
    json: Json = False,
) -> None:
    """Train a student on the next-token probabilities of a teacher. A run that is stopped goes on."""
    from transom.backends.folder import check_absent
    from transom.training.checkpoint import TRAINED
    from transom.training.distill import distill as train
    from transom.training.objectives.distillation import DistillSettings
    from transom.training.parallel import is_first

    check_absent(out, overwrite=overwrite, kind=TRAINED)
    written = written_dtype(dtype)
    settings = DistillSettings(
        steps=steps,
        length=length,
        batch=batch,
        learning_rate=learning_rate,
        targets=targets,
        samples=samples,
        forward=forward,
        online=online,
        prompt=prompt,
        replay=0.0 if replay is None else replay_share,
        train_table=not freeze_table,
        recompute=recompute,
        seed=seed,
        device=device,
        save_every=save_every,
    )
    models = load_model(student, weights, seed), load_model(teacher, "checkpoint", 0)
    with stage_bars() as on_progress:
        losses = train(
            *models,
            settings,
            text=data,
            out=out,
            replay=replay,
            teacher_samples=teacher_samples,
            dtype=written,
            overwrite=overwrite,
            on_step=step_words(on_progress, "loss"),
            on_progress=on_progress,
        )
    if not is_first():
        return
    if json:
        print_json({"folder": str(out), "teacher": teacher, "steps": len(losses), "loss": losses})
        return
    words = changes([{"loss": loss} for loss in losses], {"loss": "loss"})
    console.print(f"{escape(str(out))}: {words}", highlight=False)
