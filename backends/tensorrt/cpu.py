"""A `tensorrt` artifact on ONNX Runtime's CPU provider: a check of its numbers where no GPU is, not a fast way to run.

Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from transom.backends.artifact import MODEL_FILE, Manifest
from transom.backends.onnxruntime.data import relocate
from transom.backends.onnxruntime.runtime import OnnxRuntime, load
from transom.backends.runtime import Call, Result
from transom.backends.tensorrt.rings import Rings
from transom.backends.tensorrt.widening import read, widened
from transom.graphs.state import State

_TYPES: dict[str, tuple[Any, Any]] = {
    "bfloat16": (np.uint16, TensorProto.BFLOAT16),
    "float16": (np.float16, np.float16),
    "float32": (np.float32, np.float32),
}


class CpuRuntime(OnnxRuntime):
    """The very ONNX file that engines are built from, computed by `widening.widened`."""

    whole_writes = True
    takes_rows = False

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        super().__init__(folder, manifest, threads=threads)
        self._rings = Rings(manifest.decode.inputs)
        self.whole_writes = not self._rings.positions

    def _run(self, call: Call) -> Result:
        for name, array in self._rings.place(int(call.start[0]), call.tokens.shape[1]).items():
            self._binding.bind_cpu_input(name, array)
        return super()._run(call)

    def _dtypes(self, state: State) -> tuple[Any, Any]:
        return _TYPES[state.dtype]

    def _load(self, folder: Path, manifest: Manifest, threads: int | None, *, file: str = MODEL_FILE) -> Any:
        model: ModelProto = widened(read(str(folder / file)))
        data = relocate(model, folder)
        # All weights are widened once, when the model is loaded.
        return load(model.SerializeToString(), threads, folded=2**40, data=data, as_it_stands=True)
