"""Compiles programs for TPUs that are not there, and reports the bytes that they will take.

libtpu holds the real compiler, and needs no TPU to run. What it makes is thrown away, as it is tied to one version of
libtpu. What it says goes into the manifest under `tpu`, and a program that would copy its caches is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transom.errors import InvariantError, TargetError
from transom.export.xla.sharding import CHIPS, cache_spec, parameter_specs, spread

KNOWN = (
    *("v4:1x1x1", "v4:2x2x1", "v4:2x2x2", "v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:16x16"),
    *("v5p:1x1x1", "v5p:2x2x1", "v5p:2x2x2", "v6e:1x1", "v6e:2x2", "v6e:2x4", "v6e:16x16"),
    *("tpu7x:1x1x1", "tpu7x:2x2x1"),
)
"""Topologies that were tried; libtpu knows more sizes of each."""

_ENVIRONMENT = {
    # Do not ask a cloud's metadata server which TPU this machine has.
    "TPU_SKIP_MDS_QUERY": "1",
    # Processes that compile at the same time must not stop at one lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    # Without these libtpu guesses, and complains that it cannot.
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is to be compiled.

    Attributes:
        name: Such as "decode".
        function: `(parameters, caches, *inputs) -> (results, caches, *more)`, for jax to trace.
        parameters: Shapes by name; see `sharding.parameter_specs` for what the names mean.
        caches: Shapes [B, K, S, H]; their buffers are given up and come back.
        inputs: Shapes of what else it takes, none of them symbolic.
    """

    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, jax.ShapeDtypeStruct]
    caches: Sequence[jax.ShapeDtypeStruct]
    inputs: Sequence[jax.ShapeDtypeStruct]


def compile_programs(
    programs: Sequence[Program],
    topology: str,
    *,
    on_program: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compile programs for a topology, spread over all its devices; only shapes are needed, never a weight.

    Returns:
        Plain data: topology, libtpu's version, chips and devices, and for each program the bytes **of one device**.
        "peak_bytes" is arguments + outputs - alias + temp. "optimal_s" is libtpu's own estimate: good for ratios
        only, as it knows no time for some operations and counts the bodies of loops once.

    Raises:
        TargetError: If libtpu is not installed, or does not know the topology.
        InvariantError: If a program does not update its caches in place.
    """
    reports = {}
    with _environment():
        mesh = Mesh(np.array(_devices(topology)), (CHIPS,))
        for done, program in enumerate(programs, 1):
            reports[program.name] = _compile(program, mesh)
            on_program(done, len(programs))
    return {
        "topology": topology,
        "libtpu": importlib.metadata.version("libtpu"),
        # A chip of some generations is two devices.
        "chips": len({tuple(device.coords) for device in mesh.devices.flat}),
        "devices": mesh.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "programs": reports,
    }


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The variables that libtpu needs here, for as long as the block lasts; what the user has set stays."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _devices(topology: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise TargetError("compiling for a TPU topology needs libtpu: pip install 'transom[tpu]'")
    from jax.experimental import topologies

    try:
        if not topology:
            raise ValueError("no name")
        devices: list[Any] = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise TargetError(f"no TPU topology {topology!r} ({reason}): such as {', '.join(KNOWN)}") from error
    return devices


def shard(program: Program, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The program as a function of jit that gives up its caches, and its arguments' shapes, both spread over a mesh."""
    everywhere = PartitionSpec()
    cache_specs = [cache_spec(cache, mesh.size) for cache in program.caches]
    caches = spread(list(program.caches), cache_specs, mesh)
    specs = parameter_specs(program.parameters, program.caches, mesh.size)
    arguments = (
        spread(dict(program.parameters), specs, mesh),
        caches,
        *spread(list(program.inputs), [everywhere] * len(program.inputs), mesh),
    )
    results, _, *more = jax.eval_shape(program.function, program.parameters, list(program.caches), *program.inputs)
    outside = [jax.tree.map(lambda _: NamedSharding(mesh, everywhere), part) for part in (results, *more)]
    placed = (outside[0], [cache.sharding for cache in caches], *outside[1:])
    return jax.jit(program.function, donate_argnums=(1,), out_shardings=placed), arguments


def _compile(program: Program, mesh: Mesh) -> dict[str, Any]:
    function, arguments = shard(program, mesh)
    began = time.perf_counter()
    lowered = function.trace(*arguments).lower(lowering_platforms=("tpu",))
    try:
        compiled = lowered.compile()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise TargetError(
            f"the TPU's compiler refuses {program.name} ({reason}): take more chips, a smaller --context or --chunk, "
            "or a scheme with fewer bits"
        ) from error
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cache_bytes = sum(
        math.prod(cache.sharding.shard_shape(cache.shape)) * cache.dtype.itemsize for cache in arguments[1]
    )
    alias = int(memory.alias_size_in_bytes)
    if alias < cache_bytes:
        raise InvariantError(
            f"{program.name}: {alias} of {cache_bytes} cache bytes are updated in place, the rest would be copied at "
            "each call: report this program"
        )
    argument, output, temp = (int(getattr(memory, f"{kind}_size_in_bytes")) for kind in ("argument", "output", "temp"))
    optimal = cost.get("optimal_seconds")
    return {
        "argument_bytes": argument,
        "output_bytes": output,
        "alias_bytes": alias,
        "temp_bytes": temp,
        "peak_bytes": argument + output - alias + temp,
        "cache_bytes": cache_bytes,
        "compile_s": round(seconds, 2),
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        # Each operation without an estimate adds -1 s.
        "optimal_s": None if optimal is None else optimal - min(0, math.floor(optimal)),
    }
