"""StableHLO programs on XLA, through jax. Needs no torch.

Caches are static: those of global layers have the whole context from the start. Every call gives them up and gets them
back, so XLA writes into the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.artifact import ENCODE_IMAGE, Manifest
from transom.backends.runtime import ArtifactRuntime, Call, Float, Result
from transom.backends.xla.library import CACHES, load_jax, require_platform
from transom.backends.xla.parameters import WEIGHTS_FILE, Parameter, read_parameters
from transom.errors import ArtifactError
from transom.graphs.state import State


class XlaRuntime(ArtifactRuntime):
    """An `xla` artifact, on jax's first device: a GPU if jax has one, else a CPU, unless JAX_PLATFORMS says otherwise.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        threads: Threads of XLA on a CPU; see `library.load_jax`.

    Raises:
        TargetError: If jax is not installed, or runs on a platform that the programs are not for.
        ArtifactError: If jax cannot read the programs, or the weights are damaged.
    """

    title = "XLA"

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        super().__init__(manifest)
        self._jax = load_jax(threads)
        details = manifest.details
        require_platform(self._jax, details["platforms"])
        self._exporter = f"jax {details['jax']} on {details['date']}"
        self._programs = {
            entry["tokens"]: self._program(folder / Path(entry["file"]).name) for entry in details["programs"].values()
        }
        self._tap_axes: dict[str, dict[str, int]] = {
            tap.name: details["tap_axes"][tap.name] for tap in manifest.decode.taps
        }
        self._parameters = self._read(folder / WEIGHTS_FILE, details["parameters"])
        self._folder, self._entries = folder, manifest.entries
        self._encoder_details = details.get(ENCODE_IMAGE)
        self._encoder: Any = None
        self._compiled: dict[tuple[int, int], Any] = {}
        self._arrays: list[Any] = []

    def _read(self, path: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        parameters = {
            name: Parameter(**{**entry, "file_shape": tuple(entry["file_shape"]), "axes": tuple(entry["axes"])})
            for name, entry in entries.items()
        }
        return read_parameters(path, parameters, self._jax.device_put)

    def _program(self, path: Path) -> Any:
        import jax.export

        try:
            return jax.export.deserialize(bytearray(path.read_bytes()))
        except Exception as error:  # of several classes, by what is wrong
            raise self._unreadable(path.name, error) from error

    def _unreadable(self, name: str, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"jax {self._jax.__version__} cannot read {name}, made by {self._exporter} ({_first_line(error)}): "
            "export the model again"
        )

    def _run(self, call: Call) -> Result:
        rows, count = call.tokens.shape
        length = min(length for length in self._programs if length >= count)
        # Only these two numbers of positions, so that no more programs need compiling.
        wanted = 1 if call.logit_positions.size <= 1 else length
        padded, positions = np.zeros((rows, length), np.int32), np.zeros(wanted, np.int32)
        padded[:, :count], positions[: call.logit_positions.size] = call.tokens, call.logit_positions
        if not self._arrays:
            self._arrays = self._zeros()
        arguments = (padded, np.int32(call.start[0]), np.int32(count), positions, *self._images(call, length))
        run = self._executable(length, wanted, arguments)
        # A call that is cut short takes the caches with it.
        caches, self._arrays = self._arrays, []
        logits, self._arrays, taps = run(self._parameters, caches, *arguments)
        return Result(
            logits=np.asarray(logits)[:, : call.logit_positions.size].astype(np.float32),
            taps={
                name: self._cut(np.asarray(tap), axes, count, call.logit_positions.size)
                for (name, axes), tap in zip(self._tap_axes.items(), taps, strict=True)
            },
        )

    def _images(self, call: Call, length: int) -> tuple[NDArray[Any], ...]:
        """What a program of so many tokens takes if its model sees images, padded."""
        if call.until is None or call.soft is None:
            return ()
        padding = length - call.until.size
        until = np.pad(call.until.astype(np.int32), (0, padding))
        return until, np.pad(call.soft, ((0, 0), (0, padding), (0, 0)))

    def encode(self, pixels: Float) -> Mapping[str, NDArray[Any]]:
        if self._encoder_details is None:
            return super().encode(pixels)
        if self._encoder is None:
            # Most sessions see no image, and the encoder takes memory.
            details, file = self._encoder_details, Path(self._entries[ENCODE_IMAGE].payload).name
            parameters = self._read(self._folder / Path(details["weights"]).name, details["parameters"])
            self._encoder = self._jax.jit(self._program(self._folder / file).call), parameters
        encode, parameters = self._encoder
        soft_BQD, _, taps = encode(parameters, [], pixels)
        names = ["soft", *(tap.name for tap in self._entries[ENCODE_IMAGE].taps)]
        return {name: np.asarray(value) for name, value in zip(names, [soft_BQD, *taps], strict=True)}

    def _executable(self, length: int, wanted: int, arguments: tuple[Any, ...]) -> Any:
        """The program for so many tokens and positions, compiled when it is first needed."""
        if (length, wanted) not in self._compiled:
            # Only the caller's donation lets XLA reuse the memory of the caches.
            try:
                program = self._jax.jit(self._programs[length].call, donate_argnums=(CACHES,))
                self._compiled[length, wanted] = program.lower(self._parameters, self._arrays, *arguments).compile()
            except Exception as error:  # the compiler's errors have no common base
                raise ArtifactError(
                    f"XLA cannot compile the program for {length} tokens, made by {self._exporter} "
                    f"({_first_line(error)}): run it where its platforms are and memory is enough, or export the model "
                    "again"
                ) from error
        return self._compiled[length, wanted]

    def scratch_bytes(self) -> int:
        """Most that a program that ran takes beside weights and caches, as XLA plans it; 0 where XLA does not tell."""
        plans = [program.memory_analysis() for program in self._compiled.values()]
        return max((plan.temp_size_in_bytes for plan in plans if plan is not None), default=0)

    def _cut(self, tap: NDArray[Any], axes: dict[str, int], tokens: int, positions: int) -> Float:
        """A tap without its padding."""
        for kind, count in (("tokens", tokens), ("positions", positions)):
            if kind in axes:
                tap = np.take(tap, np.arange(count), axes[kind])
        return tap.astype(np.float32)

    def allocate(self, slots: int) -> None:
        if not self._arrays:
            self._arrays = self._zeros()

    def _zeros(self) -> list[Any]:
        zeros, numpy = self._jax.numpy.zeros, self._jax.numpy
        return [zeros(state.shape(self.context, batch=self.rows), getattr(numpy, state.dtype)) for state in self.states]

    def state_arrays(self) -> Iterator[tuple[State, Any]]:
        yield from zip(self.states, self._arrays, strict=False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
