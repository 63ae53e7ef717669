"""Artifacts of the target "tvm": machine code and weights, run by TVM's runtime alone. Needs no torch, no compiler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.artifact import ENCODE_IMAGE, Manifest
from transom.backends.runtime import ArtifactRuntime, Call, Float, Result, grown
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
        self._weights = self._read(folder / PARAMETERS, manifest.details["parameters"])
        self._folder, self._encoder_details = folder, manifest.details.get(ENCODE_IMAGE)
        self._encoder: tuple[Any, list[Any]] | None = None
        self._threads = threads
        self._arrays: dict[str, NDArray[Any]] = {}
        self._bound: list[Any] = []
        self._taps: list[tuple[str, list[int]]] = [
            (tap.name, manifest.details["tap_shapes"][tap.name]) for tap in manifest.decode.taps
        ]
        self._tokens, self._positions = zeros((self.chunk,), np.int64), zeros((self.chunk,), np.int64)
        self._start, self._until = zeros((), np.int64), zeros((self.chunk,), np.int64)
        self._soft = zeros((self.chunk, self.width), np.float32)

    def _read(self, path: Path, names: Sequence[str]) -> list[Any]:
        with reading(path) as file:
            return [self._tensor(file.read(name)) for name in names]

    def _run(self, call: Call) -> Result:
        use_threads(self._threads)
        (tokens,), positions = call.tokens, call.logit_positions
        self._tokens[: tokens.size], self._positions[: positions.size] = tokens, positions
        self._start[...] = call.start[0]
        run = self._decode if tokens.size == positions.size == 1 else self._prefill
        given = [self._tokens[: tokens.size], self._start, self._positions[: positions.size]]
        if call.until is not None and call.soft is not None:
            self._until[: tokens.size], self._soft[: tokens.size] = call.until, call.soft[0]
            given += [self._until[: tokens.size], self._soft[: tokens.size]]
        logits, *rest = run(*map(self._tensor, given), *self._bound, *self._weights)
        logits_PV: Any = np.from_dlpack(logits)
        taps = zip(self._taps, rest[len(self.states) :], strict=True)
        return Result(
            logits=np.asarray(logits_PV, np.float32)[None],
            taps={name: np.from_dlpack(value).reshape(shape) for (name, shape), value in taps},
        )

    def encode(self, pixels: Float) -> Mapping[str, NDArray[Any]]:
        if self._encoder_details is None:
            return super().encode(pixels)
        use_threads(self._threads)
        if self._encoder is None:
            # Most sessions see no image, and the encoder takes memory.
            machine, details = load_machine(self._folder / f"{ENCODE_IMAGE}.so"), self._encoder_details
            weights = self._read(self._folder / Path(details["weights"]).name, details["parameters"])
            self._encoder = machine[ENCODE_IMAGE], weights
        encode, weights = self._encoder
        # As a matrix for each colour, and where kernels may read whole vectors.
        given = zeros((pixels.shape[1], pixels[0, 0].size), np.float32)
        given[...] = pixels.reshape(given.shape)
        soft_QD, *taps = encode(self._tensor(given), *weights)
        shapes: dict[str, list[int]] = self._encoder_details["tap_shapes"]
        shaped = zip(shapes.items(), taps, strict=True)
        # What the library returned, it may write again.
        soft_BQD = np.array(np.from_dlpack(soft_QD))[None]
        return {"soft": soft_BQD, **{name: np.from_dlpack(tap).reshape(shape) for (name, shape), tap in shaped}}

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
