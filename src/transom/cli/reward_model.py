"""`transom reward-model`: train reward models on pairs that people compared, and average them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from transom.cli.export import stage_bars
from transom.cli.options import Json, Model, Seed, Weights, console, load_model, print_json
from transom.cli.steps import Device, Recompute, SaveEvery, WrittenDtype, written_dtype
from transom.errors import TrainingError

if TYPE_CHECKING:
    from transom.training.loop import Metrics


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(reward_model)


def reward_model(
    model: Model,
    data: Annotated[Path, typer.Option(metavar="JSONL", help="Lines with a `prompt`, `chosen` and `rejected`.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    members: Annotated[int, typer.Option(help="Models that are trained and averaged (WARM).", min=1)] = 3,
    learning_rates: Annotated[
        str, typer.Option(metavar="RATE,...", help="At their peaks, of the members in turn.")
    ] = "1e-5,4e-5,1e-4",
    dropouts: Annotated[
        str, typer.Option(metavar="SHARE,...", help="Of the states that the head reads, of the members in turn.")
    ] = "0.05,0.1",
    steps: Annotated[int, typer.Option(help="Steps of each member's optimiser.", min=1)] = 500,
    batch: Annotated[int, typer.Option(help="Pairs in a step.", min=1)] = 16,
    parts: Annotated[int, typer.Option(help="In how many parts they go through the model.", min=1)] = 1,
    held_out: Annotated[int, typer.Option(help="Pairs at the end of the file to measure on.", min=0)] = 0,
    recompute: Recompute = False,
    device: Device = "cpu",
    save_every: SaveEvery = 50,
    dtype: WrittenDtype = "float32",
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that an earlier run wrote.")] = False,
    json: Json = False,
) -> None:
    """Train a reward model on pairs, for the reward `preference` of align. A run that is stopped goes on."""
    from transom.backends.folder import check_absent
    from transom.training.reward_model import REWARD_MODEL, RewardModelSettings, train_reward_model

    check_absent(out, overwrite=overwrite, kind=REWARD_MODEL)
    written = written_dtype(dtype)
    settings = RewardModelSettings(
        members=members,
        learning_rates=_numbers("--learning-rates", learning_rates),
        dropouts=_numbers("--dropouts", dropouts),
        steps=steps,
        batch=batch,
        parts=parts,
        held_out=held_out,
        recompute=recompute,
        seed=seed,
        device=device,
        save_every=save_every,
    )
    loaded = load_model(model, weights, seed)
    with stage_bars() as on_progress:

        def on_step(done: int, total: int, metrics: Metrics) -> None:
            words = f"step {done:,} of {total:,}, member {metrics['member']}, loss {metrics['loss']:.4f}"
            on_progress("train", done, total, words)

        accuracies, metrics = train_reward_model(
            loaded, settings, data=data, out=out, dtype=written, overwrite=overwrite, on_step=on_step
        )
    if json:
        measured = [each.to_json() for each in accuracies]
        print_json(
            {
                "folder": str(out),
                "settings": dataclasses.asdict(settings),
                "accuracy": measured,
                "metrics": metrics,
            }
        )
        return
    console.print(f"{escape(str(out))}: {members} of {steps:,} steps, averaged", highlight=False)
    for each in accuracies:
        low, high = each.interval
        words = f"{each.value:.1%} of {each.pairs:,} held-out pairs right (95%: {low:.1%} to {high:.1%})"
        console.print(f"  {each.name}: {words}", highlight=False)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise TrainingError(f"{option} takes numbers with commas between, such as 1e-5,4e-5, not {text!r}") from None
