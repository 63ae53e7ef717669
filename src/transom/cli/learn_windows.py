"""`transom learn-windows`: give every layer the window that it needs, under a budget of cache bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from transom.cli.export import stage_bars
from transom.cli.options import Json, Model, Seed, Weights, console, load_model, print_json
from transom.cli.steps import Device, SaveEvery, WrittenDtype, changes, step_words, written_dtype
from transom.errors import TrainingError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(learn_windows)


def learn_windows(
    model: Model,
    data: Annotated[Path, typer.Option(metavar="TEXT", help="Text to learn on.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    windows: Annotated[str, typer.Option(help="On offer, in keys, rising, with commas between; `all` comes last.")],
    budget: Annotated[
        float, typer.Option(help="Share of the cache bytes of global layers that caches may have.", min=0, max=1)
    ],
    context: Annotated[
        int | None, typer.Option(help="Tokens that a global layer keeps; by default the model's context.", min=2)
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.", min=1)] = 1000,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, more than the windows.", min=2)] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences in a step.", min=1)] = 16,
    parts: Annotated[int, typer.Option(help="In how many parts they go through the model.", min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of weights, at its peak.", min=0)] = 1e-5,
    gate_rate: Annotated[float, typer.Option(help="Of the choice among windows.", min=0)] = 0.02,
    price: Annotated[
        float, typer.Option(help="Of bytes above the budget, in nats a token for all bytes of global layers.", min=0)
    ] = 3.0,
    dtype: WrittenDtype = "float32",
    device: Device = "cpu",
    save_every: SaveEvery = 50,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that an earlier run wrote.")] = False,
    json: Json = False,
) -> None:
    """Learn which layers need long windows, within a budget of cache bytes. A run that is stopped goes on."""
    from transom.backends.folder import check_absent
    from transom.training.checkpoint import TRAINED
    from transom.training.learn_windows import learn_windows as learn
    from transom.training.objectives.windows import WindowSettings

    check_absent(out, overwrite=overwrite, kind=TRAINED)
    written = written_dtype(dtype)
    start = load_model(model, weights, seed)
    settings = WindowSettings(
        windows=_offered(windows),
        budget=budget,
        context=context or start.config.context,
        price=price,
        gate_rate=gate_rate,
        steps=steps,
        batch=batch,
        parts=parts,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        save_every=save_every,
    )
    with stage_bars() as on_progress:
        learned, metrics = learn(
            start,
            settings,
            text=data,
            out=out,
            length=length,
            dtype=written,
            overwrite=overwrite,
            on_step=step_words(on_progress, "nats", word="loss"),
        )
    slots = sum(window or settings.context for window in learned) / (settings.context * len(learned))
    if json:
        print_json({"folder": str(out), "windows": list(learned), "cache": slots, "steps": len(metrics)})
        return
    names = ", ".join(str(window or "all") for window in learned)
    console.print(f"{escape(str(out))}: {changes(metrics, {'nats': 'loss'})}", highlight=False)
    console.print(f"windows, first layer to last: {names}; {slots:.1%} of the cache bytes of global layers")


def _offered(words: str) -> tuple[int, ...]:
    try:
        return tuple(0 if word.strip() == "all" else int(word) for word in words.split(","))
    except ValueError:
        raise TrainingError(f"--windows {words!r}: write numbers of keys and all, such as 64,512,all") from None
