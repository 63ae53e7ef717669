"""Every softmax that is left before a product with values is reported once, whatever stands between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.case import Case, export
from tests.passes.test_fuse_attention import INF, MISSES, Attend, Attention, fuse, grown, hidden, inputs, plain, scores
from transom.graphs.ops import ATTENTION
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention


def masked(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return scores(q, k).masked_fill(hidden(q.shape[2]), INF)


def sinks_in_front(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    sink = torch.zeros(q.shape[0], q.shape[1], q.shape[2], 1)
    weights = torch.cat((sink, masked(q, k)), -1).softmax(-1, dtype=torch.float32)
    _, shares = torch.split_with_sizes(weights, [1, k.shape[2]], -1)
    return shares.to(v.dtype) @ grown(v)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    exponentials = (masked(q, k) - masked(q, k).amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True) @ grown(v)


def normalised_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    exponentials = masked(q, k).exp()
    return exponentials @ grown(v) / exponentials.float().sum(-1, keepdim=True)


def off_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    exponentials = masked(q, k).exp()
    return exponentials / (1 + exponentials.sum(-1, keepdim=True)) @ grown(v)


def by_logsumexp(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (masked(q, k) - masked(q, k).logsumexp(-1, keepdim=True)).exp() @ grown(v)


def exponential_of_log(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return masked(q, k).log_softmax(-1).exp() @ grown(v)


def scaled_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return masked(q, k).softmax(-1) * 0.5 @ grown(v)


def masked_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return masked(q, k).softmax(-1) * ~hidden(q.shape[2], 4) @ grown(v)


def safe(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights: torch.Tensor = torch.ops.aten._safe_softmax(masked(q, k), -1)
    return weights @ grown(v)


def flattened(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = masked(q, k).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), grown(v).flatten(0, 1)).view(q.shape)


def values_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (grown(v).mT @ masked(q, k).softmax(-1).mT).mT


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bnts,bnsh->bnth", masked(q, k).softmax(-1) + 0.0, grown(v))


def in_linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear((masked(q, k).softmax(-1) + 0.0)[0, 0], v[0, 0].mT)


LEFT: dict[Attend, str] = {
    sinks_in_front: "by softmax, split_with_sizes, getitem",
    by_hand: "by exp, div and matmul",
    normalised_last: "by exp and matmul",
    off_by_one: "by exp, div and matmul",
    by_logsumexp: "by sub, exp and matmul",
    exponential_of_log: "by log_softmax, exp and matmul",
    scaled_after: "by softmax, mul and matmul",
    masked_after: "by softmax, mul and matmul",
    safe: "by safe_softmax and matmul",
    flattened: "by softmax, ",
    values_first: "by softmax, ",
    by_einsum: "by softmax, add and einsum",
    in_linear: "by softmax, add, ",
}


@pytest.mark.parametrize("attend", LEFT, ids=lambda attend: attend.__name__)
def test_a_softmax_before_values_is_reported_once(attend: Attend) -> None:
    case = fuse(attend, dynamic=False).expect({ATTENTION: 0}).expect_skipped(LEFT[attend])
    (reason,) = case.records[-1].skipped
    assert "is not recognised [test_" in reason
    case.settled()


def in_double(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (masked(q, k).double().softmax(-1) @ grown(v).double()).float()


def test_a_softmax_in_float64_is_taken_or_reported() -> None:
    case = fuse(in_double, dynamic=False)
    assert len(case.graph.calls(ATTENTION)) + len(case.records[-1].skipped) == 1


def test_layers_are_reported_beside_what_is_fused() -> None:
    """Of three layers one is taken, and each of the others has one line with its own path."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention(attend) for attend in (plain, sinks_in_front, next(iter(MISSES))))

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                q = layer(q, k, v)
            return q

    case = Case(graph=export(Model(), *inputs())).run(Canonicalize(), FuseAttention()).expect({ATTENTION: 1})
    assert [line.split(":")[0] for line in case.records[-1].skipped] == ["layers.2", "layers.1"]


class Experts(nn.Module):
    """Routers, and other softmaxes that are no attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.router, self.up = nn.Linear(8, 4, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares: torch.Tensor = self.router(x).softmax(-1)
        if self.kind == "every expert":
            x = sum((shares[..., e, None] * torch.tanh(self.up(x) + e) for e in range(4)), x)
        elif self.kind == "the best two":
            best, _ = shares.topk(2, -1)
            x = x + ((best / best.sum(-1, keepdim=True))[..., None] * torch.tanh(self.up(x))[..., None, :]).sum(-2)
        elif self.kind == "gate of features":
            x = x * self.up(x).softmax(-1)
        else:
            return shares
        out: torch.Tensor = self.up(x)
        return out


@pytest.mark.parametrize("kind", ["every expert", "the best two", "gate of features", "a result"])
def test_a_router_is_no_attention(kind: str) -> None:
    Case(graph=export(Experts(kind), torch.randn(2, 5, 8))).run(Canonicalize(), FuseAttention()).expect_skipped()
