"""Artifacts of the target "tvm": machine code and weights, run by TVM's runtime alone. Needs no torch, no compiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.artifact import Manifest
from transom.backends.runtime import ArtifactRuntime, Call, Result, grown
from transom.backends.safetensors import reading, zeros
from transom.backends.tvm.artifact import DECODE, LIBRARY, PARAMETERS, PREFILL
from transom.backends.tvm.library import load_machine, runtime, use_threads
from transom.backends.tvm.machine import require_machine
from transom.graphs.state import State


class TvmRuntime(ArtifactRuntime):
    """A `tvm` artifact.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        threads: Threads of the runtime; by default its own choice, one a core, or what TVM_NUM_THREADS says.

    Raises:
        TargetError: If the runtime is missing or of another version, or the code was made for another processor.
        ArtifactError: If the library or the weights cannot be loaded.
    """

    title = "TVM"

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        super().__init__(manifest)
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

    def _run(self, call: Call) -> Result:
        use_threads(self._threads)
        (tokens,), positions = call.tokens, call.logit_positions
        self._tokens[: tokens.size], self._positions[: positions.size] = tokens, positions
        self._start[...] = call.start[0]
        run = self._decode if tokens.size == positions.size == 1 else self._prefill
        given = (self._tokens[: tokens.size], self._start, self._positions[: positions.size])
        logits, *rest = run(*map(self._tensor, given), *self._bound, *self._weights)
        logits_PV: Any = np.from_dlpack(logits)
        taps = zip(self._taps, rest[len(self.states) :], strict=True)
        return Result(
            logits=np.asarray(logits_PV, np.float32)[None],
            taps={name: np.from_dlpack(value).reshape(shape) for (name, shape), value in taps},
        )

    def allocate(self, slots: int) -> None:
        arrays = dict(self._arrays)
        for state in self.states:
            old = arrays.get(state.name)
            if old is None or state.grows:
                new = zeros(state.shape(slots, batch=self.rows), state.dtype)
                arrays[state.name] = new if old is None else grown(old, new)
        # The library writes new keys and values into these arrays.
        self._arrays, self._bound = arrays, [self._tensor(arrays[state.name]) for state in self.states]

    def state_arrays(self) -> Iterator[tuple[State, NDArray[Any]]]:
        for state in self.states:
            if state.name in self._arrays:
                yield state, self._arrays[state.name]
