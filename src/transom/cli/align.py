"""`transom align`: train a model on answers, rewards or preferences."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from transom.cli.export import stage_bars
from transom.cli.options import Json, Model, RewardOption, Weights, console, load_model, named, print_json
from transom.cli.steps import WrittenDtype, changes, step_words, written_dtype
from transom.errors import TrainingError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(align)


def align(
    model: Model,
    data: Annotated[
        Path, typer.Option(metavar="JSONL", help="Lines with a `prompt`, and what objective or reward read.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    recipe: Annotated[
        Path | None, typer.Option(metavar="TOML", help="All numbers of the run; options given here go before it.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="sft, best_of_n, rloo, bond, jbond, dpo or rrhf; here or in the recipe.",
            show_default="rloo with --rounds",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="A number of the objective's own, such as beta=0.1.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="mathematics, code, instructions or preference; none for answers (sft) and rankings (dpo, rrhf).",
        ),
    ] = None,
    reward_option: RewardOption = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the optimiser, of each run.", min=1, show_default="500")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Prompts in a step.", min=1, show_default="16")] = None,
    max_new: Annotated[
        int | None, typer.Option(help="Most tokens of a continuation or answer.", min=1, show_default="64")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak.", min=0, show_default="3e-6")] = None,
    anchor_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of the policy that the anchor moves by after a step.",
            min=0,
            max=1,
            show_default="0; 0.01 with --rounds",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Of WARP: how often runs are merged; 0 for a single run.", min=0, show_default="0"),
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Of WARP: runs in a round.", min=1, show_default="2")] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            help="Of WARP: share of the way from a round's start to its merged runs.", min=0, max=1, show_default="0.3"
        ),
    ] = None,
    rollouts: Annotated[
        str | None,
        typer.Option(
            metavar="onnxruntime|torch",
            help="What samples; ONNX Runtime reads the weights that are trained, on a CPU.",
            show_default="onnxruntime; torch on other devices",
        ),
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat", help="Prompts are what a user says, in the model's chat template.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to train: cpu, cuda, xla.", show_default="cpu")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between two saved states.", min=1, show_default="50")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the order of prompts, and of draws.", min=0, show_default="0")
    ] = None,
    dtype: WrittenDtype = "float32",
    weights: Weights = "checkpoint",
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that an earlier run wrote.")] = False,
    json: Json = False,
) -> None:
    """Train a model on answers (sft), on rewards, or on preferences in the data (dpo and rrhf without a reward).

    A run that is stopped goes on.
    """
    from transom.backends.folder import check_absent
    from transom.training.align import AlignSettings, read_recipe
    from transom.training.align import align as train
    from transom.training.checkpoint import TRAINED
    from transom.training.parallel import is_first

    check_absent(out, overwrite=overwrite, kind=TRAINED)
    written = written_dtype(dtype)
    given: dict[str, Any] = {
        "objective": objective,
        "options": _numbers(option) if option else None,
        "reward": reward,
        "reward_options": named(reward_option) if reward_option else None,
        "steps": steps,
        "batch": batch,
        "max_new": max_new,
        "learning_rate": learning_rate,
        "anchor_rate": anchor_rate,
        "rounds": rounds,
        "runs": runs,
        "eta": eta,
        "rollouts": rollouts,
        "chat": chat,
        "device": device,
        "save_every": save_every,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if recipe is None and objective is None and not rounds:
        raise TrainingError("what is to be learned is not said: give an --objective, or a --recipe with one")
    settings = AlignSettings.of(**given) if recipe is None else read_recipe(recipe, **given)
    loaded = load_model(model, weights, settings.seed)
    with stage_bars() as on_progress:
        on_step = step_words(on_progress, "reward", "anchor_reward", "loss")
        metrics = train(loaded, settings, data=data, out=out, dtype=written, overwrite=overwrite, on_step=on_step)
    if not is_first():
        return
    if json:
        print_json({"folder": str(out), "settings": dataclasses.asdict(settings), "metrics": metrics})
        return
    names = ("loss", "reward", "anchor_reward", "kl_to_anchor", "accuracy")
    words = changes(metrics, {name: name.replace("_", " ") for name in names})
    console.print(f"{escape(str(out))}: {settings.objective}, {words}", highlight=False)


def _numbers(options: list[str]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            numbers[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise TrainingError(f"--option takes NAME=NUMBER, not {option!r}") from None
    return numbers
