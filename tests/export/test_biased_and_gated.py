"""Linears with a bias and gated MLPs of every activation, quantised, on every target.

Without a bias, gate and up are fused where the target wants it; with one, and after a sigmoid, the activation stands
alone in the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import Dim

from tests.case import export, run_graph
from tests.tolerances import FP32_LOGITS
from transom.export.exporter import Progress, exporter
from transom.export.onnx import emitter, onnxruntime, standard
from transom.export.options import Options
from transom.export.tensorrt import dialect
from transom.export.tensorrt.verify.verify import require
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.passes.base import Pipeline, rewrites
from transom.passes.convert_quantized import Converted, ConvertQuantized
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.pipelines import pipeline

VOCABULARY, WIDTH, HIDDEN, TOKENS = 64, 64, 96, 5
SCHEME = {"tensorrt": "int4_block32_bf16"}
"""By target; others take int8."""

ACTIVATIONS: dict[str, nn.Module] = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
}


class Decoder(nn.Module):
    """No attention, but what a decoder takes: tokens [1, T], start, wanted positions [P] -> logits [1, P, V]."""

    def __init__(self, activation: str, *, gate_bias: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=True)
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=gate_bias)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=gate_bias)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=True)
        self.activation = ACTIVATIONS[activation]

    def forward(self, tokens: torch.Tensor, start: torch.Tensor, logit_positions: torch.Tensor) -> torch.Tensor:
        x = self.o_proj(self.embed_tokens(tokens))
        x = x + self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return nn.functional.linear(x, self.embed_tokens.weight).index_select(1, logit_positions)


IDS, WANTED = torch.arange(3, 3 + TOKENS)[None], torch.tensor([0, 2, 4])


@functools.cache
def decoder(activation: str, *, gate_bias: bool, dtype: torch.dtype = torch.float32) -> Graph:
    torch.manual_seed(0)
    module = Decoder(activation, gate_bias=gate_bias).to(dtype)
    shapes: Any = ({1: Dim("T", min=1, max=64)}, None, {0: Dim("P", min=1, max=64)})
    graph = export(module, IDS, torch.tensor(0), WANTED, dynamic_shapes=shapes)
    graph.task, graph.input_names = "decode", ("tokens", "start", "logit_positions")
    graph.output_names = ("logits",)
    graph.axes = {"tokens": ("batch", "tokens"), "logit_positions": ("positions",)}
    return graph


def of_onnx(graph: Graph, folder: Path, dialect: emitter.Dialect) -> NDArray[np.float32]:
    model = emitter.write(graph, dialect, folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # Activations stay as they are, and nothing is fused that is rounded to int8.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    (folder / "exact.onnx").write_bytes(model.SerializeToString())
    session = ort.InferenceSession(folder / "exact.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {"tokens": IDS.numpy(), "start": np.array(0), "logit_positions": WANTED.numpy()}
    logits: NDArray[np.float32] = session.run(["logits"], feeds)[0][0]
    return logits


def of_xla(graph: Graph, folder: Path) -> NDArray[np.float32]:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_platforms", "cpu")
    from transom.backends.xla.parameters import WEIGHTS_FILE, read_parameters
    from transom.export.xla import weights
    from transom.export.xla.interpreter import step

    weights.write(graph, folder / WEIGHTS_FILE)
    parameters = read_parameters(folder / WEIGHTS_FILE, weights.parameters(graph), jax.numpy.asarray)
    run = jax.jit(step(graph, weights.stored_names(graph)))
    logits, _, _ = run(parameters, (), IDS.numpy().astype(np.int32), np.int32(0), np.int32(TOKENS), WANTED.numpy())
    rows: NDArray[np.float32] = np.asarray(logits)[0]
    return rows


def of_tvm(graph: Graph, folder: Path) -> NDArray[np.float32]:
    pytest.importorskip("tvm")
    from transom.backends.safetensors import reading
    from transom.backends.tvm.artifact import LIBRARY, PARAMETERS, PREFILL
    from transom.backends.tvm.runtime import load_machine, runtime

    lowered = exporter("tvm")(graph, folder, Options(target="tvm", context=64, chunk=TOKENS), Progress())
    with reading(folder / PARAMETERS) as file:
        weights = [file.read(name) for name in lowered.details["parameters"]]
    inputs = (IDS[0].numpy(), np.zeros((), np.int64), WANTED.numpy(), *weights)
    logits, *_ = load_machine(folder / LIBRARY)[PREFILL](*map(runtime().from_dlpack, inputs))
    return np.array(np.from_dlpack(logits))


TARGETS: dict[str, Callable[[Graph, Path], NDArray[np.float32]]] = {
    "onnxruntime": lambda graph, folder: of_onnx(graph, folder, onnxruntime.DIALECT),
    "onnx": lambda graph, folder: of_onnx(graph, folder, standard.DIALECT),
    "tensorrt": lambda graph, folder: of_onnx(graph, folder, dialect.DIALECT),
    "xla": of_xla,
    "tvm": of_tvm,
}


@pytest.mark.parametrize("gate_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_biases_and_activations(target: str, activation: str, gate_bias: bool, tmp_path: Path) -> None:
    graph, quant = decoder(activation, gate_bias=gate_bias), scheme(SCHEME.get(target, "int8"))
    passes = pipeline(target, chunk=TOKENS, scheme=quant)
    lowered, records = passes.run(graph)
    assert not any(record.skipped for record in records)
    fuses = any(isinstance(current, FuseGatedMLP) for current in passes.passes)
    fused = fuses and not gate_bias and activation in ops.ACTIVATIONS
    assert [node.args[1] for node in lowered.calls(ops.GATED)] == [activation] * fused
    (converted,) = rewrites(records, Converted)
    # The reference: the plain module with the numbers of the codes.
    rounded, _ = Pipeline([ConvertQuantized(quant)]).run(graph)
    (expected,) = run_graph(rounded, IDS, torch.tensor(0), WANTED)
    (interpreted,) = run_graph(lowered, IDS, torch.tensor(0), WANTED)
    torch.testing.assert_close(interpreted, expected, atol=FP32_LOGITS, rtol=0)
    logits = TARGETS[target](lowered, tmp_path)
    np.testing.assert_allclose(logits, expected[0].numpy(), atol=FP32_LOGITS, rtol=0)
    assert {record.weight for record in converted.conversions} == {
        f"{name}.weight" for name in ("embed_tokens", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("gate_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tensorrt_takes_them(activation: str, gate_bias: bool, tmp_path: Path) -> None:
    graph = decoder(activation, gate_bias=gate_bias, dtype=torch.bfloat16)
    passes = pipeline("tensorrt", chunk=TOKENS, scheme=scheme(SCHEME["tensorrt"]))
    require(emitter.write(passes.run(graph)[0], dialect.DIALECT, tmp_path))


def test_every_bias_matters() -> None:
    """Without one the logits are others, so the test above would see that it is missing."""
    graph = decoder("silu", gate_bias=True)
    (expected,) = run_graph(graph, IDS, torch.tensor(0), WANTED)
    for name in [name for name in graph.weights if name.endswith(".bias")]:
        spoiled = graph.clone()
        spoiled.weights[name] = spoiled.weights[name].map_rows(torch.zeros_like)
        (logits,) = run_graph(spoiled, IDS, torch.tensor(0), WANTED)
        assert float((logits - expected).abs().max()) > 10 * FP32_LOGITS, name
