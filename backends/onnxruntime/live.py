"""Decoders whose weights are somebody else's memory: whatever changes there is in the next call. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.backends.onnxruntime.runtime import BoundRuntime, load
from transom.graphs.state import State


class LiveRuntime(BoundRuntime):
    """A model whose weights are inputs. As ONNX Runtime knows none of them when it loads it, none is folded or packed.

    Args:
        model: What stands in an ONNX file.
        weights: By name, float32, contiguous. Nothing is copied: it is read where it stands, as long as this lives.
        states: What is kept from call to call.
        context: Most tokens of a sequence.
        chunk: Most new tokens of a sequence in one call.
        vocab_size: Width of the logits.
        threads: Threads of the runtime.

    Raises:
        TargetError: If ONNX Runtime is missing or too old.
        ArtifactError: If it cannot load the model.
    """

    takes_rows = True

    def __init__(
        self,
        model: bytes,
        weights: Mapping[str, NDArray[np.float32]],
        *,
        states: Sequence[State],
        context: int,
        chunk: int,
        vocab_size: int,
        threads: int,
    ) -> None:
        super().__init__(context=context, chunk=chunk, vocab_size=vocab_size, states=states)
        self._attach(load(model, threads))
        self._weights = dict(weights)
        for name, array in self._weights.items():
            self._binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
