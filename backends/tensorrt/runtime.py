"""Runs an engine on a GPU, through torch's tensors: caches stay there, and are written in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transom.backends.artifact import Manifest
from transom.backends.runtime import ArtifactRuntime, Call, Result
from transom.backends.tensorrt.engines import EngineRecord
from transom.backends.tensorrt.library import Library
from transom.backends.tensorrt.rings import Rings
from transom.backends.tensorrt.sidecar import read_sidecar
from transom.errors import ArtifactError, SessionError
from transom.graphs.state import State


class EngineRuntime(ArtifactRuntime):
    """A `tensorrt` artifact with an engine.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        record: Which engine.
        library: TensorRT of the engine's version.
        device: A GPU.

    Raises:
        ArtifactError: If the library cannot read the engine, or would not keep the caches in place.
    """

    title, whole_writes = "the engine", True

    def __init__(
        self, folder: Path, manifest: Manifest, record: EngineRecord, library: Library, *, device: str = "cuda"
    ) -> None:
        super().__init__(manifest)
        self._rings = Rings(manifest.decode.inputs)
        self.whole_writes = not self._rings.positions
        self._device, self._sidecar, trt = torch.device(device), read_sidecar(folder), library.module
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine((folder / record.file).read_bytes())
        if engine is None:
            raise ArtifactError(
                f"{library.title} cannot read {record.file}, which {record.title} built: build it "
                "again with transom build"
            )
        for output, given in self._sidecar.aliases.items():
            if (aliased := engine.get_aliased_input_tensor(output)) != given:
                raise ArtifactError(
                    f"{record.file} does not write the state {given!r} in place (its output shares memory with "
                    f"{aliased!r}): build it again with transom build"
                )
        if record.weight_streaming:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        self._engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise ArtifactError(f"the GPU has no memory to run {record.file}: export with a shorter --context")
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._profiles = {profile.name: index for index, profile in enumerate(self._sidecar.profiles)}
        self._profile: int | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._position = 0
        self._taps = [tap.name for tap in manifest.decode.taps]

    def _run(self, call: Call) -> Result:
        self._position = int(call.start[0])
        # An engine wants at least one position; what nobody asked for is not read.
        wanted = call.logit_positions if call.logit_positions.size else np.zeros(1, np.int64)
        handle = 0 if self._stream is None else self._stream.cuda_stream
        self._choose_profile("decode" if call.tokens.shape[1] == 1 else "prefill", handle)
        inputs = {
            "tokens": call.tokens,
            "start": call.start[0],
            "logit_positions": wanted,
            "until": call.until,
            "soft": call.soft,
            **self._rings.place(self._position, call.tokens.shape[1]),
        }
        tensors = {
            name: torch.as_tensor(array).contiguous().to(self._device)
            for name, array in inputs.items()
            if array is not None
        }
        for name, tensor in tensors.items():
            self._must(self._context.set_input_shape(name, tuple(tensor.shape)), f"takes no {name} of this shape")
            self._bind(name, tensor)
        outputs = {name: self._output(name) for name in ("logits", *self._taps)}
        if self._stream is not None:
            # The copies above ran on torch's stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._must(self._context.execute_async_v3(handle), "could not run")
        if self._stream is not None:
            self._stream.synchronize()
        logits_BPV, taps = outputs.pop("logits")[:, : call.logit_positions.size], outputs
        return Result(
            logits=logits_BPV.cpu().numpy(), taps={name: tensor.cpu().numpy() for name, tensor in taps.items()}
        )

    def _choose_profile(self, name: str, handle: int) -> None:
        index = self._profiles[name]
        if index != self._profile:
            self._must(self._context.set_optimization_profile_async(index, handle), f"has no profile {name!r}")
            self._profile = index
            self._bind_caches()

    def _output(self, name: str) -> torch.Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        tensor = torch.empty(shape, dtype=torch.float32, device=self._device)
        self._bind(name, tensor)
        return tensor

    def _bind(self, name: str, tensor: torch.Tensor) -> None:
        self._must(self._context.set_tensor_address(name, tensor.data_ptr()), f"takes no {name}")

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise SessionError(f"the engine {what}, at position {self._position}: see TensorRT's messages above")

    def allocate(self, slots: int) -> None:
        """Caches are static, so they are made once, and both names of each are bound to one address."""
        if self._tensors:
            return
        for state in self.states:
            shape, dtype = state.shape(slots, batch=self.rows), getattr(torch, state.dtype)
            self._tensors[state.name] = torch.zeros(shape, dtype=dtype, device=self._device)
        self._bind_caches()

    def _bind_caches(self) -> None:
        for output, given in self._sidecar.aliases.items():
            for name in (given, output):
                self._bind(name, self._tensors[given])

    def state_arrays(self) -> Iterator[tuple[State, Any]]:
        for state in self.states:
            if state.name in self._tensors:
                yield state, self._tensors[state.name]
