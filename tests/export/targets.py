"""A small decoder lowered to a target and run there, without an artifact: what tests of single operations share."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.case import export
from transom.export.exporter import Progress, exporter
from transom.export.onnx import emitter, onnxruntime, standard
from transom.export.onnx.dialect import Dialect
from transom.export.options import Options
from transom.export.tensorrt import dialect
from transom.graphs.graph import Graph
from transom.graphs.state import BATCH, SLOTS, State

LONGEST_CALL = 64
"""Most tokens, and most wanted positions, of a call."""

Program = Callable[[torch.Tensor, int, torch.Tensor, Sequence[torch.Tensor]], list[torch.Tensor]]
"""`(tokens [1, T], start, logit_positions [P], states) -> [logits [P, V], *states]`."""


def decoder(
    module: nn.Module, *states: torch.Tensor, window: int | None = None, axes: Sequence[str] = ("heads", SLOTS, "width")
) -> Graph:
    """Trace a module that takes what a decoder takes, and calls operations of `graphs.ops` as it likes.

    Args:
        module: `(tokens [B, T], start, logit_positions [P], *states) -> logits [B, P, V]`, or a tuple of logits and
            the states as they are then.
        states: One of every state's shape and dtype, of one layer: keys [1, K, S, H], then values, or a summary.
        window: Keys that the layer sees; None for all.
        axes: Of a state, beside that of the batch.
    """
    batch, tokens, positions = Dim("B", min=1, max=8), *(Dim(name, min=1, max=LONGEST_CALL) for name in ("T", "P"))
    shapes: tuple[Any, ...] = ({0: batch, 1: tokens}, None, {0: positions})
    if states:
        shapes = (*shapes, tuple({0: batch} for _ in states))
    # Two rows, as a size of 1 would be taken for one that is always 1.
    inputs = (
        torch.arange(5).expand(2, -1),
        torch.tensor(0),
        torch.arange(3),
        *(torch.cat([one] * 2) for one in states),
    )
    graph = export(module, *inputs, dynamic_shapes=shapes)
    names = [f"cache.0.{role}" for role in ("key", "value")][: len(states)]
    graph.task, graph.input_names = "decode", ("tokens", "start", "logit_positions", *names)
    graph.output_names = ("logits", *names)
    graph.axes = {
        "tokens": (BATCH, "tokens"),
        "start": (),
        "logit_positions": ("positions",),
        "logits": (BATCH, "positions", "vocabulary"),
    }
    graph.states = {
        name: State(
            name=name,
            layer=0,
            axes=(BATCH, *axes),
            sizes=(None, *state.shape[1:]),
            dtype=str(state.dtype).removeprefix("torch."),
            window=window,
        )
        for name, state in zip(names, states, strict=True)
    }
    return graph


def _onnx(graph: Graph, folder: Path, dialect: Dialect) -> Program:
    model = emitter.write(graph, dialect, folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Activations stay as they are, and nothing is fused that is rounded to int8.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    (folder / "exact.onnx").write_bytes(model.SerializeToString())
    session = ort.InferenceSession(folder / "exact.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs() if value.name.startswith("cache.")]

    def run(tokens: torch.Tensor, start: int, positions: torch.Tensor, states: Sequence[torch.Tensor]) -> list[Any]:
        arrays, binding = [state.numpy().copy() for state in states], session.io_binding()
        inputs = {"tokens": tokens.numpy(), "start": np.array(start), "logit_positions": positions.numpy()}
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")
        # In place, as sessions do it: GroupQueryAttention depends on it.
        for name, array in zip(names, arrays, strict=True):
            place: Any = ("cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(f"{name}.out", *place)
        session.run_with_iobinding(binding)
        logits = binding.get_outputs()[0].numpy()[0]
        return [torch.from_numpy(array) for array in (logits, *arrays)]

    return run


def _xla(graph: Graph, folder: Path) -> Program:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_platforms", "cpu")
    from transom.backends.xla.parameters import WEIGHTS_FILE, read_parameters
    from transom.export.xla import weights
    from transom.export.xla.interpreter import step

    weights.write(graph, folder / WEIGHTS_FILE)
    parameters = read_parameters(folder / WEIGHTS_FILE, weights.parameters(graph), jax.numpy.asarray)
    program = jax.jit(step(graph, weights.stored_names(graph)))

    def run(tokens: torch.Tensor, start: int, positions: torch.Tensor, states: Sequence[torch.Tensor]) -> list[Any]:
        ids, count = tokens.numpy().astype(np.int32), np.int32(tokens.shape[1])
        caches = [state.numpy() for state in states]
        logits, after, _ = program(parameters, caches, ids, np.int32(start), count, positions.numpy().astype(np.int32))
        return [torch.from_numpy(np.array(value)) for value in (np.asarray(logits[0], np.float32), *after)]

    return run


def _tvm(graph: Graph, folder: Path) -> Program:
    pytest.importorskip("tvm")
    from transom.backends.safetensors import reading, zeros
    from transom.backends.tvm.artifact import DECODE, LIBRARY, PARAMETERS, PREFILL
    from transom.backends.tvm.library import load_machine, runtime

    options = Options(target="tvm", context=LONGEST_CALL, chunk=LONGEST_CALL)
    lowered = exporter("tvm")(graph, folder, options, Progress())
    with reading(folder / PARAMETERS) as file:
        weights = [file.read(name) for name in lowered.details["parameters"]]
    machine = load_machine(folder / LIBRARY)

    def run(tokens: torch.Tensor, start: int, positions: torch.Tensor, states: Sequence[torch.Tensor]) -> list[Any]:
        inputs = [*weights]
        for value in reversed((tokens[0], torch.tensor(start), positions, *states)):
            # Kernels read whole vectors, from addresses that numpy does not promise; they write states in place.
            inputs.insert(0, zeros(tuple(value.shape), value.numpy().dtype))
            inputs[0][...] = value.numpy()
        results = machine[DECODE if tokens.shape[1] == 1 else PREFILL](*map(runtime().from_dlpack, inputs))
        return [torch.from_numpy(np.array(np.from_dlpack(value))) for value in results]

    return run


LOWER: dict[str, Callable[[Graph, Path], Program]] = {
    "onnxruntime": lambda graph, folder: _onnx(graph, folder, onnxruntime.DIALECT),
    "onnx": lambda graph, folder: _onnx(graph, folder, standard.DIALECT),
    "tensorrt": lambda graph, folder: _onnx(graph, folder, dialect.DIALECT),
    "xla": _xla,
    "tvm": _tvm,
}
"""How a graph in a target's operations becomes a program, by target. The folder, which is empty, takes its files."""


def _tables() -> Mapping[str, Mapping[Any, Any]]:
    tables: dict[str, Mapping[Any, Any]] = {
        one.name: one.lowerings for one in (onnxruntime.DIALECT, standard.DIALECT, dialect.DIALECT)
    }
    for target in ("xla", "tvm"):
        with contextlib.suppress(ImportError):
            tables[target] = importlib.import_module(f"transom.export.{target}.lowerings").TABLE
    return tables


TABLES = _tables()
"""Lowerings by operation, by target; without those whose compiler is not installed."""
