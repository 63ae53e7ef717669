"""Artifacts of the target "tvm": machine code and weights, run by TVM's runtime alone. Needs no torch, no compiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.artifact import CacheRecord, Manifest
from transom.backends.safetensors import reading, zeros
from transom.backends.session import Float, Session, Tokenizer
from transom.backends.tvm.artifact import DECODE, LIBRARY, PARAMETERS, PREFILL
from transom.backends.tvm.machine import require_machine
from transom.backends.tvm.runtime import load_machine, runtime, use_threads


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
            caches=manifest.caches,
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
            (tap.name, manifest.details["tap_shapes"][tap.name]) for tap in manifest.taps
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
        taps = rest[len(self.caches) :]
        self.tapped = {
            name: np.from_dlpack(value).reshape(shape) for (name, shape), value in zip(self._taps, taps, strict=True)
        }
        rows: Any = np.from_dlpack(logits)
        return np.asarray(rows, np.float32)

    def _allocate(self, slots: int) -> None:
        arrays = dict(self._arrays)
        for cache in self.caches:
            old = arrays.get(cache.name)
            if old is None or cache.slots is None:
                new = zeros((1, cache.heads, cache.slots or slots, cache.width), cache.dtype)
                if old is not None:
                    new[:, :, : old.shape[2]] = old
                arrays[cache.name] = new
        # The library writes new keys and values into these arrays.
        self._arrays, self._bound = arrays, [self._tensor(arrays[cache.name]) for cache in self.caches]

    def _cache_arrays(self) -> Iterator[tuple[CacheRecord, NDArray[Any]]]:
        for cache in self.caches:
            if cache.name in self._arrays:
                yield cache, self._arrays[cache.name]
