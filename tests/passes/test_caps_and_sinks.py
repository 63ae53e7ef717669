"""Soft caps and sinks in the spellings of models, and near misses, which stay as they are and keep their numbers."""

from __future__ import annotations

import pytest
import torch

from tests.case import Case
from tests.passes.test_fuse_attention import INF, Attend, K, N, fuse, grown, hidden, scores
from transom.graphs.ops import ATTENTION, FULL_ATTENTION

CAP = 5.0


def masked(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return scores(q, k).masked_fill(hidden(q.shape[2]), INF)


def sinks(heads: int = N) -> torch.Tensor:
    return torch.linspace(-1, 2, heads)


def column(q: torch.Tensor) -> torch.Tensor:
    """[B, N, T, 1]."""
    return sinks().reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)


def joined(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.cat((masked(q, k), column(q)), -1)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Hugging Face's Gemma 2."""
    cap = torch.tanh(scores(q, k) / CAP) * CAP
    bias = torch.zeros(q.shape[2], q.shape[2]).masked_fill(hidden(q.shape[2]), INF)
    return (cap + bias).softmax(-1, dtype=torch.float32) @ grown(v)


def capped_by_half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Twice `CAP / 2 * tanh(scores / (2 * CAP))` is `CAP * tanh(scores * 0.5 / CAP)`."""
    cap = 2 * (torch.tanh(scores(q, k).double() / (2 * CAP)).float() * (CAP / 2))
    return cap.masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ grown(v)


def sinks_cut_off(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return joined(q, k).softmax(-1)[..., :-1] @ grown(v)


def sinks_of_gpt_oss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Hugging Face's gpt-oss takes the largest score away first."""
    scores = (together := joined(q, k)) - together.max(dim=-1, keepdim=True).values
    return scores.softmax(-1, dtype=scores.dtype)[..., :-1].to(v.dtype) @ grown(v)


def sinks_as_a_factor(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Hugging Face's Granite with sliding windows."""
    weights = masked(q, k)
    factor = (torch.logsumexp(weights, dim=-1) - sinks().view(1, -1, 1)).to(torch.float32).sigmoid()
    return weights.softmax(-1, dtype=torch.float32) @ grown(v) * factor.unsqueeze(-1).to(v.dtype)


def sinks_as_a_factor_in_front(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = masked(q, k)
    return (weights.logsumexp(-1, keepdim=True) - sinks()[:, None, None]).sigmoid() * (weights.softmax(-1) @ grown(v))


def capped_with_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    cap = (torch.tanh(scores(q, k) / CAP) * CAP).masked_fill(hidden(q.shape[2]), INF)
    return torch.cat((cap, column(q)), -1).softmax(-1)[..., : k.shape[2]] @ grown(v)


# Site, cap, factor of the scores, and whether there are sinks.
MATCHES: dict[Attend, tuple[float, float, bool]] = {
    capped: (CAP, 0.3, False),
    capped_by_half: (CAP, 0.15, False),
    sinks_cut_off: (0, 0.3, True),
    sinks_of_gpt_oss: (0, 0.3, True),
    sinks_as_a_factor: (0, 0.3, True),
    sinks_as_a_factor_in_front: (0, 0.3, True),
    capped_with_sinks: (CAP, 0.3, True),
}


def capped_behind_the_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Hidden keys get a score of -CAP."""
    return (torch.tanh(masked(q, k) / CAP) * CAP).softmax(-1) @ grown(v)


def capped_with_an_offset(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(scores(q, k) / CAP + 0.1) * CAP).masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ grown(v)


def capped_otherwise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.atan(scores(q, k) / CAP) * CAP).masked_fill(hidden(q.shape[2]), INF).softmax(-1) @ grown(v)


def sinks_kept(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The first key is cut off, and the sinks get the last one's values."""
    return joined(q, k).softmax(-1)[..., 1:] @ grown(v)


def sinks_of_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A score for every token, not for every head."""
    each = (torch.arange(q.shape[2]) / 20)[None, None, :, None].expand(q.shape[0], N, -1, 1)
    return torch.cat((masked(q, k), each), -1).softmax(-1)[..., :-1] @ grown(v)


def sinks_before_the_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.nn.functional.pad(hidden(q.shape[2]), (0, 1))
    both = torch.cat((scores(q, k), column(q)), -1)
    return both.masked_fill(mask, INF).softmax(-1)[..., :-1] @ grown(v)


def two_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat((masked(q, k), column(q), column(q)), -1).softmax(-1)[..., :-2] @ grown(v)


def half_the_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return masked(q, k).softmax(-1)[..., : k.shape[2] // 2] @ grown(v)[:, :, : k.shape[2] // 2]


MISSES: dict[Attend, str] = {
    capped_behind_the_mask: "no mask",
    capped_with_an_offset: "scores come from",
    capped_otherwise: "scores come from",
    sinks_kept: "not a column of sinks",
    sinks_of_tokens: "not a column of sinks",
    sinks_before_the_mask: "not a column of sinks",
    two_sinks: "not a column of sinks",
    half_the_keys: "not a column of sinks",
}


def factor_upside_down(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = masked(q, k)
    return (weights.softmax(-1) @ grown(v)) * (sinks().view(-1, 1) - weights.logsumexp(-1)).sigmoid()[..., None]


def factor_of_other_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    total = scores(q, k).logsumexp(-1)
    return (masked(q, k).softmax(-1) @ grown(v)) * (total - sinks().view(-1, 1)).sigmoid()[..., None]


def factor_over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = scores(q, k).masked_fill(hidden(q.shape[2]), -1e9)
    return (weights.softmax(-1) @ grown(v)) * (weights.logsumexp(-2) - sinks().view(-1, 1)).sigmoid()[..., None]


def factor_of_width(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A gate of every number, not of every head."""
    weights, gates = masked(q, k), torch.linspace(-1, 1, v.shape[-1])
    return (weights.softmax(-1) @ grown(v)) * (weights.logsumexp(-1, keepdim=True) - gates).sigmoid()


FACTORS: tuple[Attend, ...] = (factor_upside_down, factor_of_other_scores, factor_over_queries, factor_of_width)
"""Attention is fused, and what multiplies its result stays."""


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("attend", MATCHES, ids=lambda attend: attend.__name__)
def test_a_site_is_fused_with_its_cap_and_sinks(attend: Attend, dynamic: bool) -> None:
    case = fuse(attend, dynamic=dynamic).expect({ATTENTION: 1}).expect_skipped().settled()
    (node,) = case.graph.calls(ATTENTION)
    cap, scale, has_sinks = MATCHES[attend]
    assert node.kwargs["softcap"] == pytest.approx(cap) and node.kwargs["scale"] == pytest.approx(scale)
    assert [size for size in node.args[5].meta["val"].shape] == [N] if has_sinks else node.args[5] is None
    assert node.args[1].meta["val"].shape[1] == K, "repeated heads are folded in"


@pytest.mark.parametrize("attend", MISSES, ids=lambda attend: attend.__name__)
def test_a_near_miss_stays_and_is_reported(attend: Attend) -> None:
    fuse(attend, dynamic=attend is not half_the_keys).expect({ATTENTION: 0}).expect_skipped(MISSES[attend])


@pytest.mark.parametrize("attend", FACTORS, ids=lambda attend: attend.__name__)
def test_another_factor_stays(attend: Attend) -> None:
    case: Case = fuse(attend, dynamic=False).expect({ATTENTION: 1})
    assert case.graph.calls(ATTENTION)[0].args[5] is None


def test_over_all_keys_there_are_no_caps_and_no_sinks() -> None:
    def cap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(scores(q, k) / CAP) * CAP).softmax(-1) @ grown(v)

    def sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat((scores(q, k), column(q)), -1).softmax(-1)[..., :-1] @ grown(v)

    for attend in (cap, sink):
        case = fuse(attend, dynamic=True).expect({ATTENTION: 0, FULL_ATTENTION: 0})
        case.expect_skipped("over all keys has no soft cap and no sinks")
