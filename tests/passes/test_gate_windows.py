"""Attention over a mixture of windows: certain gates are a window, mixed ones a mean, and gradients are right."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import FP32_GRADIENTS, FP32_LOGITS
from transom.errors import InvariantError
from transom.graphs import ops
from transom.graphs.gated_windows import gated_attention
from transom.graphs.graph import Graph
from transom.passes.base import Pass, Pipeline
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention
from transom.passes.gate_windows import GATES, GateWindows
from transom.passes.share_embedding import ShareEmbedding
from transom.training.stages import Stages
from transom.zoo.model import Model

WINDOWS = (4, 16, 0)
W = 16


def drawn(tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    shapes = ((2, 4, tokens, 16), (2, 2, tokens, 16), (2, 2, tokens, 16))
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


def within(window: int, tokens: int) -> torch.Tensor:
    """Attention's reference body."""
    attended: torch.Tensor = ops.BODIES[ops.ATTENTION](*drawn(tokens), None, scale=0.25, window=window)
    return attended


@pytest.mark.parametrize("tokens", [W - 1, W, W + 1, 2 * W, 3 * W + 5])
def test_gates_mix_attention_within_windows(tokens: int) -> None:
    apart = [within(window, tokens) for window in WINDOWS]
    for index in range(len(WINDOWS)):
        certain = torch.zeros(len(WINDOWS))
        certain[index] = 1e4
        alone = gated_attention(*drawn(tokens), certain, scale=0.25, windows=WINDOWS)
        assert (alone - apart[index]).abs().max() < FP32_LOGITS
    shares = torch.tensor([0.2, 0.5, 0.3])
    mixed = gated_attention(*drawn(tokens), shares.log(), scale=0.25, windows=WINDOWS)
    mean = sum(share * one for share, one in zip(shares, apart, strict=True))
    assert (mixed - mean).abs().max() < FP32_LOGITS


def test_gradients_are_those_of_the_mean() -> None:
    inputs = [tensor.requires_grad_(True) for tensor in drawn(3 * W + 5)]
    gates = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    towards = torch.randn(2, 4, 3 * W + 5, 16, generator=torch.Generator().manual_seed(1))
    (gated_attention(*inputs, gates, scale=0.25, windows=WINDOWS) * towards).sum().backward()
    ours = [tensor.grad for tensor in (*inputs, gates)]
    q, k, v = (tensor.detach().requires_grad_(True) for tensor in inputs)
    again = gates.detach().requires_grad_(True)
    k_heads, v_heads = (x.repeat_interleave(2, 1) for x in (k, v))
    mean = torch.zeros_like(towards)
    for window, share in zip(WINDOWS, again.softmax(0), strict=True):
        places = torch.arange(3 * W + 5)
        apart = places[:, None] - places
        hidden = (apart < 0) | (apart >= window) if window else apart < 0
        scores = (q @ k_heads.transpose(2, 3) * 0.25).masked_fill(hidden, float("-inf"))
        mean = mean + share * (scores.softmax(-1) @ v_heads)
    (mean * towards).sum().backward()  # type: ignore[no-untyped-call]
    for actual, leaf in zip(ours, (q, k, v, again), strict=True):
        assert actual is not None and leaf.grad is not None
        assert (actual - leaf.grad).abs().max() < FP32_GRADIENTS * max(1.0, float(leaf.grad.abs().max()))


def gated(graph: Graph) -> Graph:
    passes: list[Pass] = [Canonicalize(), ShareEmbedding(), FuseAttention(), GateWindows(WINDOWS)]
    return Pipeline(passes).run(graph)[0]


def test_a_model_with_certain_gates_is_the_model(tiny: Model) -> None:
    """Local and global layers, past the window: the gates' order is that of the layers."""
    graph = gated(tiny.trace(task="score"))
    names = [f"layers.{index}.{GATES}" for index in range(tiny.config.num_layers)]
    assert [name for name in graph.weights if name.endswith(GATES)] == names
    assert tiny.config.longest_window == WINDOWS[1]
    weights = {name: weight.read().float() for name, weight in graph.weights.items()}
    for name, layer in zip(names, tiny.config.layers, strict=True):
        weights[name][WINDOWS.index(layer.window or 0)] = 1e4
    ids = torch.tensor([[(7 * step) % 500 for step in range(3 * W + 5)]])
    logits = tiny.eager()(ids, torch.tensor(0), None)[0]
    hidden = Stages(graph).hidden(ids, weights)
    assert (hidden @ weights["embed_tokens.weight"].T - logits).abs().max() < FP32_LOGITS


def test_caches_are_refused(tiny: Model) -> None:
    with pytest.raises(InvariantError, match="without caches"):
        gated(tiny.trace())
