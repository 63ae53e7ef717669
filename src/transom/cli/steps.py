"""What the commands that train share: words beside a bar of steps, what a run changed, the dtype that is written."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from transom.errors import TrainingError

if TYPE_CHECKING:
    import torch

WrittenDtype = Annotated[str, typer.Option(help="Of the weights that are written: float32, bfloat16, float16.")]

Recompute = Annotated[bool, typer.Option("--recompute", help="Compute layers again on the way back: memory for time.")]
Device = Annotated[str, typer.Option(help="Where to train: cpu, cuda, xla.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between two saved states.", min=1)]

RECENT = 20
"""Steps that the mean beside a bar is of."""


def step_words(
    on_progress: Callable[..., None], *names: str, word: str = ""
) -> Callable[[int, int, Mapping[str, float]], None]:
    """What a run is to tell of its steps: a bar, with a metric of the last step and its mean over the last few.

    Args:
        on_progress: Of `stage_bars`.
        names: Metrics; the first that a step has is shown.
        word: What it is called; its own name by default.
    """
    recent: collections.deque[float] = collections.deque(maxlen=RECENT)

    def on_step(done: int, total: int, metrics: Mapping[str, float]) -> None:
        name = next(name for name in names if name in metrics)
        recent.append(metrics[name])
        mean = sum(recent) / len(recent)
        shown = word or name.replace("_", " ")
        words = f"step {done:,} of {total:,}, {shown} {recent[-1]:.4f}, mean of the last {len(recent)} {mean:.4f}"
        on_progress("train", done, total, words)

    return on_step


def changes(metrics: Sequence[Mapping[str, float]], words: Mapping[str, str]) -> str:
    """Means of the first tenth and of the last tenth of a run's steps.

    Args:
        metrics: Of every step.
        words: What metrics are called, by name; those that the run does not have are left out.
    """
    few = max(1, len(metrics) // 10)
    parts = []
    for name, word in words.items():
        if name in metrics[0]:
            first, last = (sum(line[name] for line in part) / few for part in (metrics[:few], metrics[-few:]))
            parts.append(f"{word} {first:.4f} at first and {last:.4f} in the end")
    return f"{len(metrics):,} steps, {', '.join(parts)} (means of {few:,})"


def written_dtype(name: str) -> torch.dtype:
    """The dtype of `--dtype`.

    Raises:
        TrainingError: If there is none of that name.
    """
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise TrainingError(f"--dtype takes float32, bfloat16 or float16, not {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
