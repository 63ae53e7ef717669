"""ONNX artifacts on ONNX Runtime's CPU provider, caches bound in place. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.artifact import MODEL_FILE, CacheRecord, Manifest
from transom.backends.folder import MANIFEST
from transom.backends.onnxruntime.data import lies_elsewhere, relocate
from transom.backends.onnxruntime.huge_pages import huge_pages
from transom.backends.session import Float, Session, Tokenizer
from transom.errors import ArtifactError, TargetError

MINIMUM = (1, 29)


class OnnxRuntimeSession(Session):
    """An `onnxruntime` or `onnx` artifact.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        tokenizer: Its tokenizer.
        threads: Threads of the runtime; by default its own choice, one a core.

    Raises:
        TargetError: If ONNX Runtime is missing or too old.
        ArtifactError: If it cannot load the model.
    """

    whole_writes = False

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
            whole_writes=self.whole_writes,
        )
        self._runtime = self._load(folder, manifest, threads)
        if reason := mismatch(self._runtime, manifest):
            raise ArtifactError(f"{folder / MANIFEST} is not of its model ({reason}): export the model again")
        self._binding = self._runtime.io_binding()
        self._arrays: dict[str, NDArray[Any]] = {}
        self._taps = [tap.name for tap in manifest.taps]

    def _run(self, tokens: NDArray[np.int64], logit_positions: NDArray[np.int64]) -> Float:
        with self._running("ONNX Runtime"):
            self._binding.bind_cpu_input("tokens", tokens[None])
            self._binding.bind_cpu_input("start", np.array(self.position))
            self._binding.bind_cpu_input("logit_positions", logit_positions)
            for name in ("logits", *self._taps):
                self._binding.bind_output(name, "cpu")
            self._runtime.run_with_iobinding(self._binding)
        logits, *taps = (value.numpy() for value in self._binding.get_outputs()[self._logits_index :])
        self.tapped = dict(zip(self._taps, taps, strict=True))
        rows: Float = logits[0]
        return rows

    def _allocate(self, slots: int) -> None:
        arrays = dict(self._arrays)
        for cache in self.caches:
            old = arrays.get(cache.name)
            if old is None or cache.slots is None:
                # Pages of zeros take no memory until they are written.
                new = np.zeros((1, cache.heads, cache.slots or slots, cache.width), self._cache_type(cache)[0])
                if old is not None:
                    new[:, :, : old.shape[2]] = old
                arrays[cache.name] = new
        self._binding.clear_binding_outputs()
        self._arrays = arrays
        for cache in self.caches:
            self._bind(cache)
        # Outputs come back in the order in which they were bound, and the logits are bound last.
        self._logits_index = len(self.caches)

    def _bind(self, cache: CacheRecord) -> None:
        """Let the runtime read and write one buffer in place."""
        array = self._arrays[cache.name]
        place: Any = ("cpu", 0, self._cache_type(cache)[1], array.shape, array.ctypes.data)
        self._binding.bind_input(cache.name, *place)
        self._binding.bind_output(f"{cache.name}.out", *place)

    def _cache_type(self, cache: CacheRecord) -> tuple[Any, Any]:
        """What numpy and the runtime call the dtype of a cache."""
        return cache.dtype, np.dtype(cache.dtype).type

    def _load(self, folder: Path, manifest: Manifest, threads: int | None) -> Any:
        """Open the model."""
        floats = {entry["number"] for entry in manifest.conversions} - {"int4", "int8"}
        # Weights of 8-bit floats become float32 now, or they would at every call. Of other models the shared embedding
        # would be folded into a second copy for its other reader.
        folded = 2**40 if floats else 2**20
        path = folder / MODEL_FILE
        if not lies_elsewhere(path, manifest.files):
            return load(str(path), threads, folded=folded)
        import onnx

        model = onnx.load(path, load_external_data=False)
        data = relocate(model, folder)
        return load(model.SerializeToString(), threads, folded=folded, data=data)

    def _cache_arrays(self) -> Iterator[tuple[CacheRecord, NDArray[Any]]]:
        for cache in self.caches:
            if cache.name in self._arrays:
                yield cache, self._arrays[cache.name]


_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}


def mismatch(runtime: Any, manifest: Manifest) -> str:
    """What a manifest says of the inputs and outputs of a model that is not so; "" if all is."""
    inputs, outputs = (
        {value.name: value for value in values} for values in (runtime.get_inputs(), runtime.get_outputs())
    )
    names = [cache.name for cache in manifest.caches]
    if sorted(inputs) != sorted(("tokens", "start", "logit_positions", *names)):
        return "its caches are not the model's inputs"
    if sorted(outputs) != sorted(("logits", *(f"{name}.out" for name in names), *(tap.name for tap in manifest.taps))):
        return "its caches and taps are not the model's outputs"
    if outputs["logits"].shape[-1] != manifest.vocab_size:
        return f"a vocabulary of {manifest.vocab_size}, the logits have {outputs['logits'].shape[-1]}"
    for cache in manifest.caches:
        value, shape = inputs[cache.name], [cache.heads, cache.slots, cache.width]
        # A size that grows is a name to the runtime.
        if [size if isinstance(size, int) else None for size in value.shape[1:]] != shape:
            return f"{cache.name} is {shape}, the model's {value.shape[1:]}"
        if value.type != _TYPES.get(cache.dtype):
            return f"{cache.name} is {cache.dtype}, the model's {value.type}"
        if cache.slots is not None and cache.slots < min(manifest.chunk, manifest.context):
            return f"{cache.name} has fewer slots than a call has tokens"
    return ""


def load(
    model: str | bytes, threads: int | None, *, folded: int, data: Path | None = None, as_it_stands: bool = False
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
        where = model if isinstance(model, str) else f"the model with data in {data}"
        raise ArtifactError(f"ONNX Runtime cannot load {where}: {str(error).splitlines()[0]}") from error
