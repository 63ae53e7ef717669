"""ONNX artifacts on ONNX Runtime's CPU provider, caches bound in place. Needs no torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.artifact import ENCODE_IMAGE, MODEL_FILE, PREPROCESS_FILE, Manifest
from transom.backends.folder import MANIFEST
from transom.backends.onnxruntime.data import lies_elsewhere, relocate
from transom.backends.onnxruntime.huge_pages import huge_pages
from transom.backends.runtime import ArtifactRuntime, Call, Float, Result, Runtime, grown
from transom.errors import ArtifactError, TargetError
from transom.graphs.state import State
from transom.images.resize import Box, PixelSpec

MINIMUM = (1, 29)


class BoundRuntime(Runtime):
    """A decoder in ONNX Runtime, its states bound in place. `_attach` gives it its model."""

    title = "ONNX Runtime"

    def _attach(self, model: Any, taps: Sequence[str] = ()) -> None:
        self._model, self._taps = model, list(taps)
        self._binding = model.io_binding()
        self._arrays: dict[str, NDArray[Any]] = {}

    def _run(self, call: Call) -> Result:
        self._binding.bind_cpu_input("tokens", call.tokens)
        self._binding.bind_cpu_input("start", np.array(call.start[0]))
        self._binding.bind_cpu_input("logit_positions", call.logit_positions)
        if call.until is not None and call.soft is not None:
            self._binding.bind_cpu_input("until", call.until)
            self._binding.bind_cpu_input("soft", call.soft)
        for name in ("logits", *self._taps):
            self._binding.bind_output(name, "cpu")
        self._model.run_with_iobinding(self._binding)
        # Outputs come back in the order in which they were bound, and the logits are bound last.
        logits, *taps = (value.numpy() for value in self._binding.get_outputs()[len(self.states) :])
        return Result(logits=logits, taps=dict(zip(self._taps, taps, strict=True)))

    def allocate(self, slots: int) -> None:
        arrays = dict(self._arrays)
        for state in self.states:
            old = arrays.get(state.name)
            if old is None or state.grows:
                # Pages of zeros take no memory until they are written.
                new = np.zeros(state.shape(slots, batch=self.rows), self._dtypes(state)[0])
                arrays[state.name] = new if old is None else grown(old, new)
        self.hold(arrays, self.rows)

    def hold(self, arrays: Mapping[str, Any], rows: int) -> None:
        self._binding.clear_binding_outputs()
        self.rows, self._arrays = rows, dict(arrays)
        for state, array in self.state_arrays():
            # The runtime reads and writes one buffer in place.
            place: Any = ("cpu", 0, self._dtypes(state)[1], array.shape, array.ctypes.data)
            self._binding.bind_input(state.name, *place)
            self._binding.bind_output(f"{state.name}.out", *place)

    def _dtypes(self, state: State) -> tuple[Any, Any]:
        """What numpy and the runtime call the dtype of a state."""
        return state.dtype, np.dtype(state.dtype).type

    def state_arrays(self) -> Iterator[tuple[State, NDArray[Any]]]:
        for state in self.states:
            if state.name in self._arrays:
                yield state, self._arrays[state.name]


class OnnxRuntime(BoundRuntime, ArtifactRuntime):
    """An `onnxruntime` or `onnx` artifact.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        threads: Threads of the runtime; by default its own choice, one a core.
        rows: Sequences in every call, of any length; only `onnx` artifacts take more than one.

    Raises:
        TargetError: If ONNX Runtime is missing or too old, or the target takes no more than one row.
        ArtifactError: If it cannot load the model.
    """

    takes_rows = True

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None, rows: int = 1) -> None:
        super().__init__(manifest, rows=rows)
        # GroupQueryAttention: "batch_size must be 1 when sequence_length > 1 and past context is given".
        if rows > 1 and manifest.target == "onnxruntime":
            raise TargetError(f"{folder} runs one sequence at a time, not {rows}: export it with --target onnx")
        # Most sessions see no image, and the encoder takes memory.
        self._opened = functools.cache(functools.partial(self._load, folder, manifest, threads))
        self._files = manifest.files.keys()
        model = self._load(folder, manifest, threads)
        if reason := mismatch(model, manifest):
            raise ArtifactError(f"{folder / MANIFEST} is not of its model ({reason}): export the model again")
        self._attach(model, [tap.name for tap in manifest.decode.taps])

    def encode(self, pixels: Float) -> Mapping[str, NDArray[Any]]:
        if (file := f"{ENCODE_IMAGE}.onnx") not in self._files:
            return super().encode(pixels)
        model = self._opened(file=file)
        names = [value.name for value in model.get_outputs()]
        return dict(zip(names, model.run(names, {"pixels": pixels}), strict=True))

    def pixels(self, image: NDArray[np.uint8], box: Box, spec: PixelSpec) -> Float:
        if PREPROCESS_FILE not in self._files:
            return super().pixels(image, box, spec)
        given = {"image": np.ascontiguousarray(image), "box": np.array(box, np.int64)}
        pixels: Float = self._opened(file=PREPROCESS_FILE).run(["pixels"], given)[0]
        return pixels

    def _load(self, folder: Path, manifest: Manifest, threads: int | None, *, file: str = MODEL_FILE) -> Any:
        """Open a model."""
        floats = {entry["number"] for entry in manifest.conversions} - {"int4", "int8"}
        # Weights of 8-bit floats become float32 now, or they would at every call. Of other models the shared embedding
        # would be folded into a second copy for its other reader.
        folded = 2**40 if floats else 2**20
        path = folder / file
        if not lies_elsewhere(path, manifest.files):
            return load(str(path), threads, folded=folded)
        import onnx

        model = onnx.load(path, load_external_data=False)
        data = relocate(model, folder)
        return load(model.SerializeToString(), threads, folded=folded, data=data)


_GIVEN = {"tokens", "start", "logit_positions"}
_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}


def mismatch(runtime: Any, manifest: Manifest) -> str:
    """What a manifest says of the inputs and outputs of a model that is not so; "" if all is."""
    inputs, outputs = (
        {value.name: value for value in values} for values in (runtime.get_inputs(), runtime.get_outputs())
    )
    entry = manifest.decode
    names = [state.name for state in entry.states]
    if sorted(inputs) != sorted((*entry.inputs, *names)) or not _GIVEN <= entry.inputs.keys():
        return "its ports and states are not the model's inputs"
    taps = (tap.name for tap in entry.taps)
    if (
        sorted(outputs) != sorted((*entry.outputs, *(f"{name}.out" for name in names), *taps))
        or "logits" not in outputs
    ):
        return "its ports, states and taps are not the model's outputs"
    if outputs["logits"].shape[-1] != manifest.vocab_size:
        return f"a vocabulary of {manifest.vocab_size}, the logits have {outputs['logits'].shape[-1]}"
    for state in entry.states:
        value = inputs[state.name]
        # A size that callers choose is a name to the runtime.
        if [size if isinstance(size, int) else None for size in value.shape] != list(state.sizes):
            return f"{state.name} is {list(state.sizes)}, the model's {value.shape}"
        if value.type != _TYPES.get(state.dtype):
            return f"{state.name} is {state.dtype}, the model's {value.type}"
        if state.slots is not None and state.slots < min(manifest.chunk, manifest.context):
            return f"{state.name} has fewer slots than a call has tokens"
    return ""


def load(
    model: str | bytes,
    threads: int | None,
    *,
    folded: int = 2**20,
    data: Path | None = None,
    as_it_stands: bool = False,
) -> Any:
    """Make a session of the runtime.

    Args:
        model: A file, or what would stand in one.
        threads: Threads; by default the runtime's own choice.
        folded: Bytes of the largest constant that is computed when the model is loaded.
        data: The folder of the data of a model that is no file.
        as_it_stands: Fuse no operation with another.

    Raises:
        TargetError: If ONNX Runtime is missing or too old.
        ArtifactError: If it cannot load the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetError(f"running this artifact needs ONNX Runtime ({error}): pip install onnxruntime") from None
    major, minor = re.findall(r"\d+", onnxruntime.__version__)[:2]
    if (int(major), int(minor)) < MINIMUM:
        raise TargetError(
            f"ONNX Runtime {onnxruntime.__version__} has no windowed caches: pip install 'onnxruntime>=1.29'"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(folded))
    if data is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data))
    if as_it_stands:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        with huge_pages():
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime raises a dozen classes without a common base
        where = model if isinstance(model, str) else f"the model with data in {data}" if data else "the model"
        raise ArtifactError(f"ONNX Runtime cannot load {where}: {str(error).splitlines()[0]}") from error
