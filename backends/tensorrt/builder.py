"""Builds an engine from the ONNX file of an artifact. TensorRT for RTX needs no GPU for it. Needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from transom.backends.artifact import DECODE, hash_of, read_manifest
from transom.backends.tensorrt.engines import EngineRecord, engines, note_engine
from transom.backends.tensorrt.gpu import this_gpu
from transom.backends.tensorrt.library import Library
from transom.backends.tensorrt.sidecar import Sidecar, read_sidecar
from transom.errors import ArtifactError, BuildError, TargetError

RTX_DEFAULT = (80, 86, 89, 120)
"""Compute capabilities, times ten, that an RTX engine covers unless others are named: those of RTX's own default, the
last one with those after it."""

OnProgress = Callable[[str, int, int], None]


def build_engine(
    folder: Path,
    library: Library,
    *,
    entry: str = DECODE,
    compute: Sequence[int] | None = None,
    portable: bool = False,
    weight_streaming: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> EngineRecord:
    """Build an engine, write it into the artifact, and note it in the manifest.

    Args:
        folder: A `tensorrt` artifact.
        library: What to build with.
        entry: Which entry of the artifact.
        compute: For TensorRT for RTX: compute capabilities, times ten, such as 89 and 120; by default those of
            `RTX_DEFAULT` that the artifact can run on.
        portable: For TensorRT: an engine for Ampere and newer, in place of this GPU alone.
        weight_streaming: Let weights stay in host memory when it runs, where the library can.
        overwrite: Whether to replace an engine of that name.
        on_progress: Told of the builder's phases.

    Raises:
        ArtifactError: If the folder is no `tensorrt` artifact, is damaged, has no such entry, or has such an engine.
        TargetError: If the library cannot do what is asked, or finds no GPU that it needs.
        BuildError: If the library does not take the model, or cannot build it.
    """
    manifest = read_manifest(folder)
    if manifest.target != "tensorrt":
        raise ArtifactError(f"{folder} is for the target {manifest.target!r}: export it with --target tensorrt")
    if entry not in manifest.entries:
        raise ArtifactError(f"{folder} has no entry {entry!r}, only {', '.join(manifest.entries)}: build one of these")
    model, sidecar = folder / manifest.entries[entry].payload, read_sidecar(folder)
    if entry != DECODE:
        # Encoders have fixed sizes.
        sidecar = dataclasses.replace(sidecar, profiles=())
    chosen = _compute(library, sidecar, compute)
    if portable and library.is_rtx:
        raise TargetError("an engine of TensorRT for RTX is for the GPUs of --cc: leave out --portable")
    name = "" if entry == DECODE else f"{entry}-"
    name += f"{library.name}{''.join(f'-sm{one}' for one in chosen)}{'-portable' if portable else ''}.engine"
    path = folder / name
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} exists already: pass --overwrite")
    if path.exists() and name not in {record.file for record in engines(manifest)}:
        raise ArtifactError(f"{path} is not an engine of this artifact, so it is not replaced: move it away")
    draft = folder / f".{name}.partial-{uuid.uuid4().hex[:8]}"
    began = time.perf_counter()
    try:
        with open(draft, "wb") as file:
            _build(model, file, library, sidecar, chosen, portable, weight_streaming, on_progress)
        seconds = time.perf_counter() - began
        own, gpu = _this_gpu() if not library.is_rtx else (0, "")
        record = EngineRecord(
            file=name,
            library=library.name,
            version=library.version,
            compute=chosen or ((own,) if own else ()),
            gpu=gpu,
            portable=portable,
            weight_streaming=weight_streaming,
            bytes=draft.stat().st_size,
            seconds=round(seconds, 1),
            sha256=hash_of(draft),
            entry=entry,
        )
        # Not before all is known of it, so that file and manifest change together.
        os.replace(draft, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
    note_engine(folder, record)
    return record


def _this_gpu() -> tuple[int, str]:
    """Compute capability, times ten, and name of the first GPU; 0 and "" where torch finds none."""
    try:
        return this_gpu()
    except TargetError:
        return 0, ""


def _compute(library: Library, sidecar: Sidecar, capabilities: Sequence[int] | None) -> tuple[int, ...]:
    if not library.is_rtx:
        if capabilities:
            raise TargetError("TensorRT builds for the GPU of this machine: leave out --cc, or pass --rtx")
        return ()
    kinds = library.module.ComputeCapability
    known = [number for number in range(200) if hasattr(kinds, f"SM{number}")]
    chosen = capabilities or [number for number in RTX_DEFAULT if number >= sidecar.least_sm and number in known]
    for number in chosen:
        if number not in known:
            raise TargetError(
                f"{library.title} builds for no compute capability {number}: choose of {', '.join(map(str, known))}"
            )
        if number < sidecar.least_sm:
            raise TargetError(
                f"this artifact needs a compute capability of {sidecar.least_sm} or more, not {number}: leave it out "
                "of --cc, or export in another --dtype or --quant"
            )
    return tuple(sorted(set(chosen)))


def _build(
    model: Path,
    file: BinaryIO,
    library: Library,
    sidecar: Sidecar,
    compute: tuple[int, ...],
    portable: bool,
    weight_streaming: bool,
    on_progress: OnProgress,
) -> None:
    trt = library.module
    log = _logger(trt)
    builder = _builder(library, log)
    # Ignored from 11 on, where nothing else exists; needed before.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    on_progress("parse", 0, 1)
    # By its path, as its weights lie beside it.
    if not parser.parse_from_file(str(model)):
        raise BuildError(f"{library.title} does not take {model}:\n{_refusals(parser)}")
    on_progress("parse", 1, 1)
    config = builder.create_builder_config()
    if compute:
        config.num_compute_capabilities = len(compute)
    for index, number in enumerate(compute):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), index)
    if portable:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if weight_streaming:
        if not hasattr(trt.BuilderFlag, "WEIGHT_STREAMING"):
            raise TargetError(f"{library.title} cannot stream weights: leave out --weight-streaming")
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    for wanted in sidecar.profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in wanted.inputs.items():
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{library.title} does not take the profile {wanted.name!r}: {log.cause()}")
    raised: list[BaseException] = []
    monitor = _monitor(trt, on_progress, raised)
    if monitor is not None:
        config.progress_monitor = monitor
    done = _serialize(trt, builder, network, config, file, raised)
    if raised:
        raise raised[0]
    if not done:
        raise BuildError(f"{library.title} cannot build {model}: {log.cause()}")


def _builder(library: Library, log: Any) -> Any:
    """A builder; without a GPU, TensorRT does not even make that."""
    try:
        return library.module.Builder(log)
    except (TypeError, RuntimeError) as error:
        raise TargetError(
            f"{library.title} finds no GPU to build on ({log.cause() or error}): build with --rtx, which needs none"
        ) from None


def _refusals(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "\n".join(
        f"  {error.node_name() or 'the model'} ({error.node_operator()}): {error.desc()}" for error in errors
    )


def _serialize(trt: Any, builder: Any, network: Any, config: Any, file: BinaryIO, raised: list[BaseException]) -> bool:
    """Write the engine piece by piece where the library can, so that it never stands in memory twice.

    The library swallows what its callbacks raise, so that is kept in `raised`.
    """
    if not hasattr(builder, "build_serialized_network_to_stream"):
        engine = builder.build_serialized_network(network, config)
        if engine is not None:
            file.write(memoryview(engine))
        return engine is not None

    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # found when it runs
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
                file.flush()
            except BaseException as error:
                raised.append(error)
                return 0
            return len(data)

    return bool(builder.build_serialized_network_to_stream(network, config, Writer()))


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # found when it runs
        """Keeps what went wrong, and says nothing by itself."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))

        def cause(self) -> str:
            # The first error is the cause; every build without a GPU also reports that there is none.
            causes = [error for error in self.errors if "cudaError" not in error] or self.errors
            return causes[0][:400] if causes else ""

    return Logger()


def _monitor(trt: Any, on_progress: OnProgress, raised: list[BaseException]) -> Any:
    """Tells of the outermost phases of a build, and ends it if that raises, as Ctrl-C does."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    def tell(done: int, total: int) -> bool:
        try:
            if not raised:
                on_progress("build", done, total)
        except BaseException as error:
            raised.append(error)
        return not raised

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # found when it runs
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps
                tell(0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name)
            return not raised if steps is None else tell(step + 1, steps)

        def phase_finish(self, phase_name: str) -> None:
            if steps := self._steps.pop(phase_name, None):
                tell(steps, steps)

    return Monitor()
