"""`tensorrt.json`: what a builder and a runtime must know beside the ONNX file. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.backends.records import record
from transom.errors import ArtifactError
from transom.graphs.state import State

SIDECAR = "tensorrt.json"
VERSION = 2

Shape = tuple[int, ...]

PORTABILITY = {
    "tensorrt": "an engine runs under the version of TensorRT that built it, on the model of GPU that built it; built "
    "with --portable, on Ampere and newer",
    "tensorrt_rtx": "an engine runs under the version of TensorRT for RTX that built it, on the compute capabilities "
    "that it was built for; kernels are chosen when it first runs there",
}

TEXT_CALLS = (
    "`start` is the position of the first new token. Position p is written to slot p % slots of a state with a "
    "window, and no call may cross such a ring's end: it holds at most slots - start % slots new tokens. Every "
    "state's output is bound to the address of its input."
)
"""How to call a model of text alone."""

SUMMARIES = (
    " But a state without slots is a summary: its output has memory of its own, and is the next call's input. At "
    "position 0 whatever it holds counts as zeros."
)
"""How to treat states that are no rings."""

IMAGE_CALLS = (
    "`start` is the position of the first new token. `until` is the last position that each new token sees: its own, "
    "or the end of its image, which must be in one call. `soft` holds what stands in the place of negative tokens, and "
    "zeros elsewhere. `write_slot.S` is the slot of the first new token in states of S slots with a window; the others "
    "follow it, none past the end. `slot_positions.S` is the position that each of these slots holds after that, "
    "negative where none stands. A call goes behind the one before it, or to slot 0 if it does not fit there: then all "
    "that a token sees is still there. Every state's output is bound to the address of its input."
)
"""How to call a model that takes images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Which shapes an engine is made for.

    Attributes:
        name: "prefill" or "decode".
        inputs: Smallest, likeliest and largest shape of every input that has no fixed one.
    """

    name: str
    inputs: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Beside the ONNX file.

    Attributes:
        dtype: What is computed in, and held in the states.
        aliases: Input of every ring's output: both are one address.
        states: Every state, with all its sizes.
        profiles: In the order of the engine's profiles.
        least_sm: Least compute capability, times ten: 80 for bfloat16, 89 for 8-bit floats.
        portability: Where an engine runs, by library that built it.
        calls: How a runtime must call it, in words.
    """

    dtype: str
    aliases: Mapping[str, str]
    states: tuple[State, ...]
    profiles: tuple[Profile, ...]
    least_sm: int
    portability: Mapping[str, str] = dataclasses.field(default_factory=lambda: PORTABILITY)
    calls: str

    def write(self, folder: Path) -> None:
        """Write the file."""
        (folder / SIDECAR).write_text(json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n")


def read_sidecar(folder: Path) -> Sidecar:
    """Read the file.

    Raises:
        ArtifactError: If it is missing, malformed, or of another version.
    """
    path = folder / SIDECAR
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        version = data.pop("version")
        if version != VERSION:
            raise ArtifactError(f"{path} is of version {version}, this transom reads {VERSION}: use a matching transom")
        profiles = tuple(
            Profile(
                name=entry["name"],
                inputs={name: _three(shapes) for name, shapes in entry["inputs"].items()},
            )
            for entry in data.pop("profiles")
        )
        states = tuple(record(State, entry) for entry in data.pop("states"))
        return Sidecar(profiles=profiles, states=states, **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): export the model again") from error


def _three(shapes: Any) -> tuple[Shape, Shape, Shape]:
    least, likely, most = (tuple(int(size) for size in shape) for shape in shapes)
    return least, likely, most
