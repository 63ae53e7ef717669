"""Runs an engine on a GPU, through torch's tensors: caches stay there. Rings are written in place.

An engine promises that of rings only. Of a summary there are two tensors, which take turns: what a call gives is what
the next one takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.artifact import ENCODE_IMAGE, Manifest
from transom.backends.runtime import ArtifactRuntime, Call, Float, Result
from transom.backends.tensorrt.engines import EngineRecord
from transom.backends.tensorrt.library import Library
from transom.backends.tensorrt.rings import Rings
from transom.backends.tensorrt.sidecar import read_sidecar
from transom.errors import ArtifactError, SessionError
from transom.graphs.state import State


class _Engine:
    """An engine in the memory of a GPU.

    Args:
        path: The file.
        record: Which engine.
        library: TensorRT of the engine's version.
        device: A GPU.

    Raises:
        ArtifactError: If the library cannot read it, or the GPU has no memory for it.
    """

    def __init__(self, path: Path, record: EngineRecord, library: Library, device: torch.device) -> None:
        self._device, trt = device, library.module
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise ArtifactError(
                f"{library.title} cannot read {record.file}, which {record.title} built: build it "
                "again with transom build"
            )
        if record.weight_streaming:
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self._context = self.engine.create_execution_context()
        if self._context is None:
            raise ArtifactError(f"the GPU has no memory to run {record.file}: export with a shorter --context")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._handle = 0 if self._stream is None else self._stream.cuda_stream
        self.where = "the start"
        """What it is given, in words."""

    def choose_profile(self, index: int) -> None:
        """Go on with another profile, for which all is to be bound again."""
        self._must(self._context.set_optimization_profile_async(index, self._handle), f"has no profile {index}")

    def bind(self, name: str, tensor: torch.Tensor) -> None:
        """Let an input or an output be a tensor's memory."""
        self._must(self._context.set_tensor_address(name, tensor.data_ptr()), f"takes no {name}")

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
        """Arrays of outputs, float32, of arrays of inputs."""
        tensors = {name: torch.as_tensor(array).contiguous().to(self._device) for name, array in inputs.items()}
        for name, tensor in tensors.items():
            self._must(self._context.set_input_shape(name, tuple(tensor.shape)), f"takes no {name} of this shape")
            self.bind(name, tensor)
        results = {name: self._output(name) for name in outputs}
        if self._stream is not None:
            # The copies above ran on torch's stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._must(self._context.execute_async_v3(self._handle), "could not run")
        if self._stream is not None:
            self._stream.synchronize()
        return {name: tensor.cpu().numpy() for name, tensor in results.items()}

    def _output(self, name: str) -> torch.Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        tensor = torch.empty(shape, dtype=torch.float32, device=self._device)
        self.bind(name, tensor)
        return tensor

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise SessionError(f"the engine {what}, at {self.where}: see TensorRT's messages above")


class EngineRuntime(ArtifactRuntime):
    """A `tensorrt` artifact with an engine.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        record: Which engine.
        library: TensorRT of the engine's version.
        device: A GPU.
        encoder: The engine that encodes images; None if there is none.

    Raises:
        ArtifactError: If the library cannot read the engine, or would not keep the caches in place.
    """

    title = "the engine"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        record: EngineRecord,
        library: Library,
        *,
        device: str = "cuda",
        encoder: EngineRecord | None = None,
    ) -> None:
        super().__init__(manifest)
        self._rings = Rings(manifest.decode.inputs)
        self.whole_writes = not self._rings.positions
        self._device, self._sidecar = torch.device(device), read_sidecar(folder)
        self._engine = _Engine(folder / record.file, record, library, self._device)
        for output, given in self._sidecar.aliases.items():
            if (aliased := self._engine.engine.get_aliased_input_tensor(output)) != given:
                raise ArtifactError(
                    f"{record.file} does not write the state {given!r} in place (its output shares memory with "
                    f"{aliased!r}): build it again with transom build"
                )
        self._profiles = {profile.name: index for index, profile in enumerate(self._sidecar.profiles)}
        self._profile: int | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._next: dict[str, torch.Tensor] = {}
        """What the next call makes of every summary."""
        self._taps = [tap.name for tap in manifest.decode.taps]
        self._encoder_taps = [tap.name for tap in manifest.entries[ENCODE_IMAGE].taps] if encoder else []
        self._encoder: Callable[[], _Engine] | None = None
        if encoder is not None:
            # Opened when it is first asked for: most sessions see no image, and the encoder takes memory.
            opened = functools.partial(_Engine, folder / encoder.file, encoder, library, self._device)
            self._encoder = functools.cache(opened)

    def _run(self, call: Call) -> Result:
        start, tokens = int(call.start[0]), call.tokens.shape[1]
        self._engine.where = f"position {start}"
        # An engine wants at least one position; what nobody asked for is not read.
        wanted = call.logit_positions if call.logit_positions.size else np.zeros(1, np.int64)
        self._choose_profile("decode" if tokens == 1 else "prefill")
        inputs: dict[str, Any] = {"tokens": call.tokens, "start": np.array(start), "logit_positions": wanted}
        if self.width:
            inputs |= {"until": call.until, "soft": call.soft}
        for name, tensor in self._next.items():
            self._engine.bind(name, self._tensors[name])
            self._engine.bind(f"{name}.out", tensor)
        outputs = self._engine.run({**inputs, **self._rings.place(start, tokens)}, ("logits", *self._taps))
        for name, tensor in self._next.items():
            self._tensors[name], self._next[name] = tensor, self._tensors[name]
        return Result(logits=outputs.pop("logits")[:, : call.logit_positions.size], taps=outputs)

    def encode(self, pixels: Float) -> Mapping[str, NDArray[Any]]:
        if self._encoder is None:
            raise SessionError(f"no engine of {ENCODE_IMAGE} is for this GPU: build it with transom build")
        engine = self._encoder()
        engine.where = "an image"
        return engine.run({"pixels": pixels}, ["soft", *self._encoder_taps])

    def _choose_profile(self, name: str) -> None:
        index = self._profiles[name]
        if index != self._profile:
            self._engine.choose_profile(index)
            self._profile = index
            self._bind_caches()

    def allocate(self, slots: int) -> None:
        """Caches are static, so they are made once, and both names of each are bound to one address."""
        if self._tensors:
            return
        for state in self.states:
            shape, dtype = state.shape(slots, batch=self.rows), getattr(torch, state.dtype)
            self._tensors[state.name] = torch.zeros(shape, dtype=dtype, device=self._device)
            if not state.is_ring:
                self._next[state.name] = torch.zeros_like(self._tensors[state.name])
        self._bind_caches()

    def _bind_caches(self) -> None:
        for output, given in self._sidecar.aliases.items():
            for name in (given, output):
                self._engine.bind(name, self._tensors[given])

    def state_arrays(self) -> Iterator[tuple[State, Any]]:
        for state in self.states:
            for tensors in (self._tensors, self._next):
                if state.name in tensors:
                    yield state, tensors[state.name]
