"""Ours: an `onnxruntime` artifact. Option `quant`: name of the quantisation scheme."""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime

import transom
from benchmarks.contender import Contender


class Transom(Contender):
    """A session, as `transom.open` gives it."""

    def prepare(self) -> None:
        transom.compile(
            transom.load(self.model),
            target="onnxruntime",
            quant=self.options["quant"],
            context=self.context,
            out=self.folder,
        )

    def load(self) -> None:
        self._session = transom.open(self.folder, threads=self.threads)

    def describe(self) -> str:
        caches = sorted({state.dtype for state in self._session.states})
        return (
            f"transom {transom.__version__} on ONNX Runtime {onnxruntime.__version__}, quant {self.options['quant']}, "
            f"caches {'/'.join(caches)}, chunks of {self._session.chunk}"
        )

    def clear(self, room: int) -> None:
        self._session.reset()
        self._session.reserve(room)

    def run(self, ids: Sequence[int]) -> None:
        self._session.prefill(ids)

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        values: list[float] = self._session.log_likelihoods(ids).tolist()
        return values

    def cache_bytes(self) -> int:
        return sum(self._session.cache_bytes().values())


CONTENDER = Transom
