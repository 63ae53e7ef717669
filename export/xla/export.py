"""The exporter of the target `xla`: one StableHLO program for each number of new tokens, and the weights beside them.

Programs have static shapes, and take the weights as arguments. Prompts are cut into chunks, and the last one is padded
to the smallest program that it fits into. An encoder is one more program, with weights of its own.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from transom.backends.artifact import Entry
from transom.backends.xla.library import CACHES, load_jax
from transom.backends.xla.parameters import WEIGHTS_FILE, Parameter
from transom.export.exporter import Lowered, Progress, entry
from transom.export.lowering import require_supported
from transom.export.options import Options
from transom.export.xla import weights
from transom.export.xla.interpreter import COUNT, Step, input_names, step
from transom.export.xla.lowerings import DTYPES, TABLE
from transom.export.xla.topology import Program, compile_programs
from transom.graphs.graph import Graph
from transom.graphs.state import BATCH

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
"""What every program is lowered for; they share one text, as no operation has a custom call."""

SMALLEST_PREFILL = 8
"""Shorter prompts are padded to at least this, in place of having programs of their own."""


def lengths(chunk: int) -> list[int]:
    """Numbers of new tokens that get a program: 1, then the chunk and its quarters."""
    counts = {1, chunk}
    while chunk > 4 * SMALLEST_PREFILL:
        chunk = -(-chunk // 4)
        counts.add(chunk)
    return sorted(counts)


def program_name(tokens: int) -> str:
    """What the program for so many new tokens is called."""
    return "decode" if tokens == 1 else f"prefill_{tokens}"


def export(graph: Graph, folder: Path, options: Options, progress: Progress) -> Lowered:
    """Write `weights.safetensors` and a `.jaxexport` file a program.

    Raises:
        UnsupportedOpsError: Naming every operation that has no lowering.
        TargetError: If the topology is unknown, or the TPU compiler is not installed.
    """
    require_supported(graph, TABLE, options.target)
    load_jax()
    lowered = _entry(graph, f"{program_name(1)}.jaxexport", options.context)
    run, parameters, shapes = _program(graph)
    caches = [jax.ShapeDtypeStruct(state.shape(options.context), jnp.dtype(state.dtype)) for state in lowered.states]
    sizes = lengths(options.chunk)
    count = len(sizes) * (2 if options.topology else 1)
    tpu = None
    if options.topology:
        programs = [
            Program(
                name=program_name(tokens), function=run, parameters=shapes, caches=caches, inputs=_inputs(graph, tokens)
            )
            for tokens in sizes
        ]
        tpu = compile_programs(programs, options.topology, on_program=lambda done, _: progress.on_program(done, count))
    donating = jax.jit(run, donate_argnums=(CACHES,))
    for index, tokens in enumerate(sizes):
        positions = (1,) if tokens == 1 else jax.export.symbolic_shape("P", constraints=(f"P <= {tokens}",))
        exported = jax.export.export(donating, platforms=PLATFORMS)(shapes, caches, *_inputs(graph, tokens, positions))
        (folder / f"{program_name(tokens)}.jaxexport").write_bytes(exported.serialize())
        progress.on_program(count - len(sizes) + index + 1, count)
    weights.write(graph, folder / WEIGHTS_FILE, on_bytes=progress.on_bytes)
    today = datetime.date.today().isoformat()
    return Lowered(
        entry=lowered,
        libraries=("jax", "jaxlib", "ml-dtypes"),
        tpu=tpu,
        details={
            "programs": {
                program_name(tokens): {"file": f"{program_name(tokens)}.jaxexport", "tokens": tokens}
                for tokens in sizes
            },
            "parameters": {name: dataclasses.asdict(parameter) for name, parameter in parameters.items()},
            "tap_axes": _tap_axes(graph),
            "platforms": list(PLATFORMS),
            "jax": jax.__version__,
            "date": today,
        },
        not_done=(
            f"the programs were made by jax {jax.__version__} on {today}; jax promises to read them for six months, "
            "with versions no more than three weeks older: after that, run the same export again",
        ),
    )


def export_encoder(graph: Graph, folder: Path, options: Options, progress: Progress) -> Lowered:
    """Write a program and its weights, called after the graph's task; for the errors see `export`."""
    require_supported(graph, TABLE, options.target)
    load_jax()
    program, parameters = encoder_program(graph)
    file, stored = f"{graph.task}.jaxexport", f"{graph.task}.safetensors"
    tpu = compile_programs([program], options.topology) if options.topology else None
    lower = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)
    exported = lower(program.parameters, [], *program.inputs)
    (folder / file).write_bytes(exported.serialize())
    weights.write(graph, folder / stored, on_bytes=progress.on_bytes)
    records = {name: dataclasses.asdict(parameter) for name, parameter in parameters.items()}
    return Lowered(entry=entry(graph, file), tpu=tpu, details={"weights": stored, "parameters": records})


def encoder_program(graph: Graph) -> tuple[Program, dict[str, Parameter]]:
    """The program of a graph without states, and its parameters."""
    run, parameters, shapes = _program(graph)
    return Program(name=graph.task, function=run, parameters=shapes, caches=(), inputs=_inputs(graph)), parameters


def _program(graph: Graph) -> tuple[Step, dict[str, Parameter], dict[str, jax.ShapeDtypeStruct]]:
    """The graph as a function, its parameters, and their shapes."""
    parameters = weights.parameters(graph)
    shapes = {
        name: jax.ShapeDtypeStruct(parameter.shape, jnp.dtype(parameter.dtype))
        for name, parameter in parameters.items()
    }
    return step(graph, weights.stored_names(graph)), parameters, shapes


def _entry(graph: Graph, payload: str, context: int) -> Entry:
    """The graph as sessions see it: positions are int32, and padded calls say how many tokens are real."""
    ports = entry(graph, payload).inputs
    narrow = {
        name: dataclasses.replace(port, dtype="int32") if port.dtype == "int64" else port
        for name, port in ports.items()
    }
    narrow[COUNT] = narrow["start"]
    return dataclasses.replace(entry(graph, payload, batch=1, slots=context), inputs=narrow)


def _inputs(graph: Graph, tokens: int = 1, positions: tuple[Any, ...] = (1,)) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of what a program takes after parameters and caches; see `interpreter.Step`."""
    axes, sizes = graph.symbols(), {BATCH: 1, "tokens": tokens, "positions": positions[0]}
    shapes = {
        name: jax.ShapeDtypeStruct(
            tuple(size if isinstance(size, int) else sizes[axes[str(size)]] for size in node.meta["val"].shape),
            DTYPES[node.meta["val"].dtype],
        )
        for name, node in graph.inputs.items()
        if name not in graph.states
    }
    return tuple({**shapes, COUNT: jax.ShapeDtypeStruct((), jnp.int32)}[name] for name in input_names(graph))


def _tap_axes(graph: Graph) -> dict[str, dict[str, int]]:
    """The axis of every tap that has an entry a token, or a wanted position: there padding is to be cut off."""
    axes, returned = graph.symbols(), graph.outputs
    named = {tap.name: [axes.get(str(size)) for size in returned[tap.name].meta["val"].shape] for tap in graph.taps}
    return {
        name: {kind: shape.index(kind) for kind in ("tokens", "positions") if kind in shape}
        for name, shape in named.items()
    }
