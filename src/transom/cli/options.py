"""Options that several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from transom.cli.streams import StreamConsole
from transom.errors import ArtifactError, CheckpointError, RewardError

console = StreamConsole(emoji=False)
progress_console = StreamConsole(stderr=True, emoji=False)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A preset, a Hugging Face folder, a .gguf file, or a hub id.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="An exported artifact.")]
Weights = Annotated[str, typer.Option(help='"checkpoint", or "random" to need none.')]
Seed = Annotated[int, typer.Option(help="Seed of random weights.", min=0)]
RewardOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="What the reward takes, such as model=DIR for preference."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Mmproj = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A .gguf file of the encoder of images, beside a .gguf MODEL."),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(metavar="KIND:FACTOR", help="Stretch positions past the training: yarn:4, llama3:8 or linear:8."),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the runtime; by default one a core.", min=1)]


def load_model(
    name: str,
    weights: str,
    seed: int,
    *,
    images: bool = False,
    mmproj: Path | None = None,
    adapter: Path | None = None,
    rope_scaling: str | None = None,
) -> Any:
    """Load a model, with the words that users type; with its encoder of images, if that is wanted and there is one.

    Raises:
        CheckpointError: If `weights` is neither "checkpoint" nor "random".
    """
    import transom

    check_weights(weights)
    return transom.load(
        name,
        weights="random" if weights == "random" else "checkpoint",
        seed=seed,
        images=images,
        mmproj=mmproj,
        adapter=adapter,
        rope_scaling=rope_scaling,
    )


def check_weights(weights: str) -> None:
    """Raise `CheckpointError` if `weights` is neither "checkpoint" nor "random"."""
    if weights not in ("checkpoint", "random"):
        raise CheckpointError(f"--weights takes 'checkpoint' or 'random', not {weights!r}")


def check_outputs(*paths: Path | None, inputs: Sequence[Path | None] = ()) -> None:
    """Raise `ArtifactError` for a file that could not be written when a long run ends; - is none, nor is None.

    A file that is written twice, or that is also read, is a mistake.
    """
    from transom.validation.certificate import check_writable

    taken: dict[str, str] = {}
    sources = [Path(os.path.realpath(path)) for path in inputs if path is not None]
    for path in paths:
        if path is None or str(path) == "-":
            continue
        place = os.path.realpath(path)
        if any(Path(place).is_relative_to(source) for source in sources):
            raise ArtifactError(f"cannot write {path}: it is read, or stands in what is read: choose another name")
        if place in taken and not (path.exists() and not path.is_file()):
            raise ArtifactError(f"cannot write {path}: it {taken[place]}, so choose another name")
        taken[place] = "is named for two outputs"
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ArtifactError(f"cannot write {path}: name a file in a folder that exists")
        if path.is_file() or not path.exists():
            check_writable(Path(place).parent)


def named(options: Sequence[str]) -> dict[str, str]:
    """Values by name, of options that are each NAME=VALUE.

    Raises:
        RewardError: If one is not.
    """
    for option in options:
        if not all(option.partition("=")[:2]):
            raise RewardError(f"--reward-option takes NAME=VALUE, not {option!r}")
    return {name: value for name, _, value in (option.partition("=") for option in options)}


def print_json(data: Any) -> None:
    """One JSON object on standard output, without colours or line wraps."""
    print(json.dumps(data, indent=1))


def size(count: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
