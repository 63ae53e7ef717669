"""Stands in for TensorRT where no GPU is: records every call, and refuses what TensorRT would refuse.

Its engine computes: it runs the artifact's ONNX file on the CPU, on the very addresses that it was given, so that a
cache that is not bound in place, or a shape outside of its profile, shows in the numbers or in an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from transom.backends.artifact import MODEL_FILE
from transom.backends.onnxruntime.runtime import load
from transom.backends.tensorrt.library import Library
from transom.backends.tensorrt.sidecar import Sidecar, read_sidecar
from transom.backends.tensorrt.widening import read, widened

VERSION = "10.99.0"
ENGINE, ENCODER = b"an engine of the double", b"an encoder of the double"


@dataclasses.dataclass
class Calls:
    """Every call, in order."""

    entries: list[tuple[str, tuple[Any, ...]]] = dataclasses.field(default_factory=list)

    def note(self, name: str, *arguments: Any) -> None:
        self.entries.append((name, arguments))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.entries if called == name]


class Logger:
    ERROR = 1

    def __init__(self, min_severity: int = ERROR) -> None:
        self.min_severity = min_severity


class Runtime:
    folder: Path
    calls: Calls
    separate = ""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        self.calls.note("deserialize_cuda_engine", len(serialized_engine))
        files = {ENGINE: MODEL_FILE, ENCODER: "encode_image.onnx"}
        return ICudaEngine(self, files[serialized_engine]) if serialized_engine in files else None


class ICudaEngine:
    def __init__(self, runtime: Runtime, file: str) -> None:
        self.runtime, self.file, self.weight_streaming_budget_v2 = runtime, file, 0
        self.sidecar = read_sidecar(runtime.folder)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return None if name == self.runtime.separate else self.sidecar.aliases.get(name)

    def get_weight_streaming_automatic_budget(self) -> int:
        return 12345

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self.runtime, self.sidecar, self.file)


class IExecutionContext:
    def __init__(self, runtime: Runtime, sidecar: Sidecar, file: str) -> None:
        self.calls, self.sidecar, self.profile = runtime.calls, sidecar, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        model = widened(read(str(runtime.folder / file)))
        self.inputs = {value.name: value.type.tensor_type for value in model.graph.input}
        self.outputs = {value.name: value.type.tensor_type for value in model.graph.output}
        self.session = load(model.SerializeToString(), 1, folded=2**40, data=runtime.folder, as_it_stands=True)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.calls.note("set_optimization_profile_async", profile_index, stream_handle)
        # What was said of the last profile is forgotten.
        self.profile, self.shapes = profile_index, {}
        return 0 <= profile_index < len(self.sidecar.profiles)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self.calls.note("set_input_shape", name, tuple(shape))
        bounds = self.sidecar.profiles[self.profile].inputs.get(name)
        if bounds is not None:
            least, _, most = bounds
            if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.calls.note("set_tensor_address", name, memory)
        self.addresses[name] = memory
        return name in self.inputs or name in self.outputs

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        given = {"tokens": (1, 0), "logit_positions": (0,)} | self.shapes
        sizes = {"tokens": given["tokens"][1], "positions": given["logit_positions"][0]}
        dims = (self.inputs | self.outputs)[name].shape.dim
        return tuple(sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims)

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.calls.note("execute_async_v3", stream_handle)
        if {*self.inputs, *self.outputs} - self.addresses.keys():
            return False
        aliases = [pair for pair in self.sidecar.aliases.items() if pair[0] in self.outputs]
        if any(self.addresses[output] != self.addresses[given] for output, given in aliases):
            return False
        apart = [state.name for state in self.sidecar.states if f"{state.name}.out" not in self.sidecar.aliases]
        if any(self.addresses[f"{name}.out"] == self.addresses[name] for name in apart if name in self.inputs):
            return False
        binding = self.session.io_binding()
        for bind, values in ((binding.bind_input, self.inputs), (binding.bind_output, self.outputs)):
            for name, value in values.items():
                kind = TensorProto.BFLOAT16 if value.elem_type == TensorProto.BFLOAT16 else _numpy(value.elem_type)
                bind(name, "cpu", 0, kind, self.get_tensor_shape(name), self.addresses[name])
        self.session.run_with_iobinding(binding)
        return True


def _numpy(kind: int) -> Any:
    known: dict[int, Any] = {
        TensorProto.INT64: np.int64,
        TensorProto.FLOAT: np.float32,
        TensorProto.FLOAT16: np.float16,
    }
    return known[kind]


def double(folder: Path, *, separate: str = "") -> tuple[Library, Calls]:
    """A library whose engines run the artifact in a folder.

    Args:
        folder: The artifact.
        separate: A cache output that does not share its input's memory.
    """
    calls = Calls()
    runtime = type("Runtime", (Runtime,), {"folder": folder, "calls": calls, "separate": separate})
    module = type("tensorrt", (), {"Logger": Logger, "Runtime": runtime, "__version__": VERSION})
    return Library(module=module, name="tensorrt", version=VERSION), calls
