"""Attention sites in many spellings, and near misses that must stay as they are.

Every module is run before and after the pass: whatever was fused, the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

from tests.case import Case, export, run_graph
from tests.conftest import WINDOW
from tests.tolerances import FP32_ATTENTION
from transom.graphs.masks import MaskReading, mask_of, read_mask
from transom.graphs.ops import ATTENTION, FULL_ATTENTION, Mask
from transom.passes.base import Pipeline
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention
from transom.zoo.model import Model

INF = float("-inf")
N, K, H, T, W = 4, 2, 8, 40, 16

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q [B, N, T, H], k [B, K, T, H], v [B, K, T, H]) -> [B, N, T, H]."""


def hidden(tokens: int, window: int = W) -> torch.Tensor:
    """Where keys are hidden, bool [T, T]."""
    positions = torch.arange(tokens)
    distance = positions[:, None] - positions
    return (distance < 0) | (distance >= window)


def grown(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(N // K, dim=1)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """The way of Hugging Face's repeat_kv."""
    B, heads, S, width = x.shape
    return x[:, :, None, :, :].expand(B, heads, N // K, S, width).reshape(B, N, S, width)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ grown(k).transpose(2, 3) * 0.3


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores(q, k).masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ grown(v)


def negated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores(q, k).masked_fill(~~hidden(q.shape[2]), INF).softmax(-1) @ grown(v)


def least(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores(q, k).masked_fill(hidden(q.shape[2]), torch.finfo(torch.float32).min).softmax(-1) @ grown(v)


def where(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.where(~hidden(q.shape[2]), scores(q, k), INF).softmax(-1) @ grown(v)


def added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.zeros(q.shape[2], q.shape[2]).masked_fill(hidden(q.shape[2]), INF)
    return (scores(q, k) + bias).softmax(-1) @ grown(v)


def added_in_front(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.zeros(q.shape[2], q.shape[2]).masked_fill(hidden(q.shape[2]), INF)
    return (bias[None, None] + scores(q, k)).softmax(-1) @ grown(v)


def divided(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ expanded(k).transpose(-1, -2)) / 4 * 2).masked_fill(hidden(q.shape[2]), INF).softmax(3) @ expanded(v)


def in_double(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores(q, k).float().masked_fill(hidden(q.shape[2]), INF).softmax(-1, dtype=torch.float32) @ grown(v)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, grown(k), grown(v), ~hidden(q.shape[2]))


def sdpa_grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, ~hidden(q.shape[2]), scale=0.3, enable_gqa=True)


def sdpa_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def one_kv_head_broadcast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k[:, :1].transpose(2, 3)).masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ v[:, :1]


def in_segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(q.shape[2])
    other = (positions[:, None] // W != positions // W) | (positions > positions[:, None])
    return scores(q, k).masked_fill(other, INF).softmax(-1) @ grown(v)


MATCHES: dict[Attend, int | Mask] = {
    plain: W,
    negated: W,
    least: W,
    where: W,
    added: W,
    added_in_front: W,
    divided: W,
    in_double: W,
    sdpa: W,
    sdpa_grouped: W,
    sdpa_causal: 0,
    one_kv_head_broadcast: W,
    in_segments: Mask(segment=W),
}


def softmax_over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores(q, k).masked_fill(hidden(q.shape[2]), -1e9).softmax(2) @ grown(v)


def filled_with_zero(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores(q, k).masked_fill(hidden(q.shape[2]), 0.0).softmax(-1) @ grown(v)


def where_zero(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.where(~hidden(q.shape[2]), scores(q, k), 0.0).softmax(-1) @ grown(v)


def where_computed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.where(~hidden(q.shape[2]), scores(q, k), scores(q, k) - 1).softmax(-1) @ grown(v)


def subtracted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    bias = torch.zeros(q.shape[2], q.shape[2]).masked_fill(hidden(q.shape[2]), -1e9)
    return torch.add(scores(q, k), bias, alpha=-1).softmax(-1) @ grown(v)


def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores(q, k).softmax(-1) @ grown(v)


def sdpa_unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, grown(k), grown(v))


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(q.shape[2])
    bias = (positions - positions[:, None]) * 0.1
    return (scores(q, k) + bias.masked_fill(hidden(q.shape[2]), INF)).softmax(-1) @ grown(v)


def overlapping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Segments, each of which sees the one before it too."""
    positions = torch.arange(q.shape[2])
    other = (positions[:, None] // W - positions // W > 1) | (positions > positions[:, None])
    return scores(q, k).masked_fill(other, INF).softmax(-1) @ grown(v)


def masked_by_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores(q, k).masked_fill(hidden(q.shape[2]) | (k[:, :1, None, :, 0] > 9), INF).softmax(-1) @ grown(v)


def tiled_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Heads repeated as 0 1 0 1, not 0 0 1 1: may be fused only with the repetition left in."""
    tiled = [x.repeat(1, N // K, 1, 1) for x in (k, v)]
    return (q @ tiled[0].transpose(2, 3)).masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ tiled[1]


def keys_grown_values_tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores(q, k).masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ v.repeat(1, N // K, 1, 1)


def keys_reversed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ grown(k).flip(2).transpose(2, 3)).masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ grown(v)


MISSES: dict[Attend, str] = {
    softmax_over_queries: "softmax",
    filled_with_zero: "fill",
    where_zero: "fill",
    where_computed: "fill",
    subtracted: "no mask",
    biased: "adds a bias",
    overlapping: "neither causal nor a causal window",
    masked_by_values: "depends on the values of k",
}

EITHER: tuple[Attend, ...] = (tiled_heads, keys_grown_values_tiled, keys_reversed)
"""Fused or not, the numbers count."""


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attend(q, k, v)


def inputs(tokens: int = T) -> tuple[torch.Tensor, ...]:
    noise = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, tokens, H, generator=noise) for heads in (N, K, K))


def fuse(attend: Attend, *, dynamic: bool) -> Case:
    tokens = Dim("T", min=2, max=256)
    sizes = ({2: tokens}, {2: tokens}, {2: tokens}) if dynamic else None
    case = Case(graph=export(Attention(attend), *inputs(), dynamic_shapes=sizes)).run(Canonicalize(), FuseAttention())
    for length in (W - 1, W, W + 1, 3 * W + 5) if dynamic else (T,):
        given = inputs(length)
        (output,) = run_graph(case.graph, *given)
        torch.testing.assert_close(output, attend(*given), atol=FP32_ATTENTION, rtol=0)
    return case


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("attend", MATCHES, ids=lambda attend: attend.__name__)
def test_a_site_is_fused_with_its_window(attend: Attend, dynamic: bool) -> None:
    case = fuse(attend, dynamic=dynamic).expect({ATTENTION: 1}).expect_skipped().settled()
    (node,) = case.graph.calls(ATTENTION)
    expected = MATCHES[attend]
    assert mask_of(node) == (expected if isinstance(expected, Mask) else Mask(window=expected))
    assert node.args[3] is None
    if attend in (plain, divided, sdpa, sdpa_grouped):
        assert node.args[1].meta["val"].shape[1] == K, "repeated heads are folded in"


@pytest.mark.parametrize("attend", MISSES, ids=lambda attend: attend.__name__)
def test_a_near_miss_stays_and_is_reported(attend: Attend) -> None:
    fuse(attend, dynamic=True).expect({ATTENTION: 0}).expect_skipped(MISSES[attend])


@pytest.mark.parametrize("attend", (unmasked, sdpa_unmasked), ids=lambda attend: attend.__name__)
def test_without_a_mask_every_key_is_seen(attend: Attend) -> None:
    case = fuse(attend, dynamic=True).expect({ATTENTION: 0, FULL_ATTENTION: 1}).expect_skipped().settled()
    assert case.graph.calls(FULL_ATTENTION)[0].args[1].meta["val"].shape[1] == K, "repeated heads are folded in"


@pytest.mark.parametrize("attend", EITHER, ids=lambda attend: attend.__name__)
def test_whatever_is_fused_keeps_its_numbers(attend: Attend) -> None:
    fuse(attend, dynamic=False)


def test_one_mask_read_in_both_senses() -> None:
    """One site hides where the mask is set; the other sees there. Only the first is causal."""

    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        first = scores(q, k).masked_fill(mask, -1e9).softmax(-1) @ grown(v)
        return first + torch.where(mask, scores(q, k), -1e9).softmax(-1) @ grown(v)

    case = fuse(both, dynamic=False).expect({ATTENTION: 1})
    case.expect_skipped("neither causal nor a causal window")


def test_cross_attention_with_the_causal_flag() -> None:
    """`is_causal` lines the first query up with the first key, also where there are more keys than queries."""

    class Cross(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own = scaled_dot_product_attention(q, q, q, is_causal=True)
            return own + scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    graph, _ = Pipeline([Canonicalize(), FuseAttention()]).run(export(Cross(), q, k, v))
    assert len(graph.calls(ATTENTION)) == 1
    torch.testing.assert_close(run_graph(graph, q, k, v)[0], Cross()(q, k, v), atol=FP32_ATTENTION, rtol=0)


def test_reasons_name_the_layer_and_the_line() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention(overlapping)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.layer(q, k, v)  # type: ignore[no-any-return]

    _, records = Pipeline([Canonicalize(), FuseAttention()]).run(export(Model(), *inputs()))
    (reason,) = records[-1].skipped
    assert reason.startswith("layer: ") and "test_fuse_attention.py:" in reason and "return self.attend(" in reason


def test_layers_of_one_kind_are_read_once(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers make six masks, of two kinds."""
    masks = []

    def read(*args: Any, **options: Any) -> MaskReading:
        reading = read_mask(*args, **options)
        masks.append(reading.mask)
        return reading

    monkeypatch.setattr("transom.passes.fuse_attention.read_mask", read)
    graph, _ = Pipeline([Canonicalize(), FuseAttention()]).run(tiny.trace())
    assert len(graph.calls(ATTENTION)) == tiny.config.num_layers == 6
    assert len(masks) == 2 and set(masks) == {Mask(), Mask(window=WINDOW)}
