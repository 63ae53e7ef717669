"""Artifacts of the target "tvm": machine code and weights, run by TVM's runtime alone. Needs no torch, no compiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.artifact import Manifest
from transom.backends.safetensors import reading, zeros
from transom.backends.session import Float, Session, Tokenizer, grown
from transom.backends.tvm.artifact import DECODE, LIBRARY, PARAMETERS, PREFILL
from transom.backends.tvm.machine import require_machine
from transom.backends.tvm.runtime import load_machine, runtime, use_threads
from transom.graphs.state import State


class TvmSession(Session):
    """A `tvm` artifact.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        tokenizer: Its tokenizer.
        threads: Threads of the runtime; by default its own choice, one a core, or what TVM_NUM_THREADS says.

    Raises:
        TargetError: If the runtime is missing or of another version, or the code was made for another processor.
        ArtifactError: If the library or the weights cannot be loaded.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, tokenizer: Tokenizer | None = None, threads: int | None = None
    ) -> None:
        super().__init__(
            context=manifest.context,
            chunk=manifest.chunk,
            vocab_size=manifest.vocab_size,
            states=manifest.decode.states,
            stop_ids=manifest.stop_ids,
            tokenizer=tokenizer,
        )
        require_machine(manifest.details)
        self._tensor = runtime().from_dlpack
        machine = load_machine(folder / LIBRARY)
        self._decode, self._prefill = machine[DECODE], machine[PREFILL]
        with reading(folder / PARAMETERS) as file:
            self._weights = [self._tensor(file.read(name)) for name in manifest.details["parameters"]]
        self._threads = threads
        self._arrays: dict[str, NDArray[Any]] = {}
        self._bound: list[Any] = []
        self._taps: list[tuple[str, list[int]]] = [
            (tap.name, manifest.details["tap_shapes"][tap.name]) for tap in manifest.decode.taps
        ]
        self._tokens, self._positions = zeros((self.chunk,), np.int64), zeros((self.chunk,), np.int64)
        self._start = zeros((), np.int64)

    def _run(self, tokens: NDArray[np.int64], logit_positions: NDArray[np.int64]) -> Float:
        use_threads(self._threads)
        self._tokens[: tokens.size], self._positions[: logit_positions.size] = tokens, logit_positions
        self._start[...] = self.position
        run = self._decode if tokens.size == logit_positions.size == 1 else self._prefill
        given = (self._tokens[: tokens.size], self._start, self._positions[: logit_positions.size])
        with self._running("TVM"):
            logits, *rest = run(*map(self._tensor, given), *self._bound, *self._weights)
        taps = rest[len(self.states) :]
        self.tapped = {
            name: np.from_dlpack(value).reshape(shape) for (name, shape), value in zip(self._taps, taps, strict=True)
        }
        rows: Any = np.from_dlpack(logits)
        return np.asarray(rows, np.float32)

    def _allocate(self, slots: int) -> None:
        arrays = dict(self._arrays)
        for state in self.states:
            old = arrays.get(state.name)
            if old is None or state.grows:
                new = zeros(state.shape(slots), state.dtype)
                arrays[state.name] = new if old is None else grown(old, new)
        # The library writes new keys and values into these arrays.
        self._arrays, self._bound = arrays, [self._tensor(arrays[state.name]) for state in self.states]

    def _state_arrays(self) -> Iterator[tuple[State, NDArray[Any]]]:
        for state in self.states:
            if state.name in self._arrays:
                yield state, self._arrays[state.name]
