"""Linears with a bias and gated MLPs of every activation, quantised, on every target.

Without a bias, gate and up are fused where the target wants it; with one, and after a sigmoid, the activation stands
alone in the graph.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.case import run_graph
from tests.export.targets import LOWER
from tests.export.targets import decoder as trace
from tests.tolerances import FP32_LOGITS
from transom.export.onnx import emitter
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
    return trace(Decoder(activation, gate_bias=gate_bias).to(dtype))


@pytest.mark.parametrize("gate_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("target", LOWER)
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
    (logits,) = LOWER[target](lowered, tmp_path)(IDS, 0, WANTED, ())
    torch.testing.assert_close(logits, expected[0], atol=FP32_LOGITS, rtol=0)
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
