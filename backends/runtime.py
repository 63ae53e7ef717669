"""A runtime: runs one entry of an artifact and holds its states. One a target; what is not its own stands in sessions.

Needs no torch.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.artifact import Manifest
from transom.errors import SessionError, TransomError
from transom.graphs.state import State
from transom.images.resize import Box, PixelSpec, pixels

_MOST_SHOWN = 300
"""Characters of a runtime's message; some list all arguments of a call."""

Float = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Call:
    """New tokens of some sequences, each after those that the states hold of it.

    Attributes:
        tokens: int64 [B, T].
        start: Position of each row's first new token, int64 [B].
        logit_positions: Tokens whose logits are wanted, int64 [P], counted from the first new one; the same for all
            rows.
        until: Last position that each new token sees, int64 [T]: the end of its image; None for its own.
        soft: What stands in the place of negative tokens, float32 [B, T, D]; None where there are none.
    """

    tokens: NDArray[np.int64]
    start: NDArray[np.int64]
    logit_positions: NDArray[np.int64]
    until: NDArray[np.int64] | None = None
    soft: Float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call gives back.

    Attributes:
        logits: float32 [B, P, V].
        taps: What the taps of the artifact said, by name; empty without taps.
    """

    logits: Float
    taps: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Runtime(abc.ABC):
    """Runs calls, and holds the states between them.

    Args:
        context: Most tokens that the states can hold of a sequence.
        chunk: Most new tokens of a sequence in one call.
        vocab_size: Width of the logits.
        states: What is kept from call to call.
        rows: Sequences in every call; the states hold as many.
        width: Width of soft tokens; 0 if it takes no images.

    Attributes:
        title: What users call it.
        takes_unequal_starts: Whether the rows of a call may start at different positions.
        takes_rows: Whether `hold` changes the number of rows. With several, a call may then be the first one, or one
            of a single token a row.
        whole_writes: Whether it writes into a ring of slots only up to its end, so that a call must stop there.
        note: What users should know of how it runs, in words; "" if it is as they expect.
    """

    title: str
    takes_unequal_starts = False
    takes_rows = False
    whole_writes = False

    def __init__(
        self, *, context: int, chunk: int, vocab_size: int, states: Sequence[State], rows: int = 1, width: int = 0
    ) -> None:
        self.context, self.chunk, self.vocab_size, self.states = context, chunk, vocab_size, tuple(states)
        self.rows, self.width = rows, width
        self.note = ""

    def run(self, call: Call) -> Result:
        """Run a call; the states then hold its tokens.

        Raises:
            SessionError: If it has another number of rows than the states, if its rows start where they may not, or if
                the target's runtime fails.
        """
        rows = len(call.tokens)
        if rows != self.rows:
            raise SessionError(
                f"{self.title} was given {rows} sequences in one call and has room for {self.rows}: give {self.rows}"
            )
        if len(call.start) != rows or (len(set(call.start.tolist())) > 1 and not self.takes_unequal_starts):
            raise SessionError(
                f"{self.title} was given {rows} sequences that start at {call.start.tolist()}, and takes one position "
                "for all: give them in calls of their own"
            )
        if self.width:
            call = self._with_images(call)
        elif call.soft is not None:
            raise SessionError(f"{self.title} was given an image, and the model takes none: export one that does")
        try:
            return self._run(call)
        except TransomError:
            raise
        except Exception as error:  # runtimes raise dozens of classes without a common base
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:_MOST_SHOWN]
            raise SessionError(
                f"{self.title} failed at position {call.start[0]} ({line}): export the model again, or see that there "
                "is memory enough"
            ) from error

    def _with_images(self, call: Call) -> Call:
        """The call with all that a model of images takes."""
        rows, tokens = call.tokens.shape
        return replace(
            call,
            until=call.start[0] + np.arange(tokens) if call.until is None else call.until,
            soft=np.zeros((rows, tokens, self.width), np.float32) if call.soft is None else call.soft,
        )

    def pixels(self, image: NDArray[np.uint8], box: Box, spec: PixelSpec) -> Float:
        """What the encoder takes of a part of an image uint8 [H, W, 3]: float32 [1, 3, S, S]."""
        return pixels(image, box, spec)

    def encode_image(self, pixels: Float) -> Float:
        """Soft tokens [Q, D], float32, of an image's pixels; see `encode`."""
        return np.asarray(self.encode(pixels)["soft"][0], np.float32)

    def encode(self, pixels: Float) -> Mapping[str, NDArray[Any]]:
        """Soft tokens [1, Q, D] of an image's pixels [1, 3, S, S], float32 between -1 and 1, and the encoder's taps.

        Raises:
            SessionError: If the artifact has no encoder of images.
        """
        raise SessionError(f"{self.title} has no encoder of images here: export a model that has one")

    @abc.abstractmethod
    def _run(self, call: Call) -> Result:
        """Run a call that was checked."""

    @abc.abstractmethod
    def allocate(self, slots: int) -> None:
        """Give growing states `slots` slots and fixed ones what they have; what they held up to now stays."""

    def hold(self, arrays: Mapping[str, Any], rows: int) -> None:
        """Go on with other states.

        Args:
            arrays: By name, of as many slots as the states have; none to begin afresh, and then to be allocated.
            rows: Sequences in them, and in every call from now on.

        Raises:
            SessionError: If it does not take that.
        """
        raise SessionError(f"{self.title} holds the states of {self.rows} here: give it no others")

    @abc.abstractmethod
    def state_arrays(self) -> Iterator[tuple[State, Any]]:
        """Every allocated state with the array that holds it."""


class ArtifactRuntime(Runtime):
    """A runtime of an artifact's `decode` entry.

    Args:
        manifest: The artifact's; it says what a `Runtime` must know.
        rows: Sequences in every call.
    """

    def __init__(self, manifest: Manifest, *, rows: int = 1) -> None:
        super().__init__(
            context=manifest.context,
            chunk=manifest.chunk,
            vocab_size=manifest.vocab_size,
            states=manifest.decode.states,
            rows=rows,
            width=manifest.soft_width,
        )


def grown(old: Any, new: Any) -> Any:
    """The larger of two arrays or tensors, with what the smaller one holds in it: slots keep their positions."""
    new[tuple(map(slice, old.shape))] = old
    return new
