"""A cache that two attentions read is refused, by name, on every target: bounding it for one loses the other's keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.tolerances import FP32_LOGITS
from transom.backends.reference.session import ReferenceSession
from transom.errors import InvariantError
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.state import ring
from transom.graphs.trace import trace
from transom.graphs.weight import Weight
from transom.passes.pipelines import PIPELINES, pipeline
from transom.passes.shared_caches import cache_readers
from transom.zoo.layers import LayerCache, visible_keys, write_cache

WINDOW, CHUNK, D, N, H, VOCABULARY = 8, 12, 32, 4, 8, 64


OWNERS = ("own", "keys", "twice")


def attend(
    q_BNTH: torch.Tensor, keys_values: LayerCache, seen_TS: torch.Tensor, hide: Callable[..., torch.Tensor]
) -> torch.Tensor:
    k_BNSH, v_BNSH = keys_values
    weights_BNTS = hide(q_BNTH @ k_BNSH.transpose(2, 3) * H**-0.5, seen_TS).softmax(-1)
    return (weights_BNTS @ v_BNSH).transpose(1, 2).flatten(2)


def hide_scores(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~seen, float("-inf"))


def cap_scores(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Soft-capped scores, which no pass fuses."""
    return hide_scores(torch.tanh(scores), seen)


class Block(nn.Module):
    """Attention over a cache.

    Args:
        window: Keys that it sees; None for all.
        reads: "own": a cache of its own; "keys", "twice": likewise, the keys as values too, or two attentions over it;
            "written": what the last layer with a cache wrote; "held": what stood there before the call.
        hide: Takes hidden scores out.
    """

    def __init__(self, window: int | None, reads: str, hide: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.window, self.reads, self.hide = window, reads, hide
        self.q = nn.Linear(D, N * H, bias=False)
        self.k, self.v = (nn.Linear(D, N * H, bias=False) for _ in range(2))
        self.out = nn.Linear(N * H, D, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, held: LayerCache, written: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        B, T, _ = x_BTD.shape
        q, k, v = (layer(x_BTD).view(B, T, N, H).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if written is None:
            written = write_cache(held[0], k, positions_T), write_cache(held[1], v, positions_T)
        # Before anything is written, the slots hold what came before the first new token.
        read, last = (held, positions_T[:1]) if self.reads == "held" else (written, positions_T)
        if self.reads == "keys":
            read = written[0], written[0]
        seen = visible_keys(last, read[0].shape[2], self.window).expand(T, -1)
        attended = attend(q, read, seen, self.hide)
        if self.reads == "twice":
            attended = attended - attend(q.flip(1), read, seen, self.hide) / 2
        return x_BTD + self.out(attended), written


class Sharing(nn.Module):
    """Layers (window, what is read) of which those that read "own" have a cache."""

    def __init__(self, kinds: tuple[tuple[int | None, str], ...], hide: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(Block(window, reads, hide) for window, reads in kinds)

    def forward(self, tokens: torch.Tensor, start: torch.Tensor, caches: list[LayerCache]) -> tuple[torch.Tensor, Any]:
        positions = start + torch.arange(tokens.shape[1])
        x, written, left = self.embed(tokens), [], list(caches)
        held, last = left[0], None
        for layer in self.layers:
            owns = layer.reads in OWNERS
            if owns:
                held, last = left.pop(0), None
            x, last = layer(x, positions, held, last)
            if owns:
                written.append(last)
        return nn.functional.linear(x, self.embed.weight), written


Kinds = tuple[tuple[int | None, str], ...]


def traced(kinds: Kinds, hide: Callable[..., torch.Tensor] = hide_scores) -> tuple[nn.Module, Graph]:
    """A module with random weights, and its decode graph."""
    torch.manual_seed(0)
    module = Sharing(kinds, hide).eval()
    weights = {name: Weight.of(tensor.detach(), name) for name, tensor in module.state_dict().items()}
    states = [
        ring(f"cache.{layer}.{kind}", layer=layer, heads=N, width=H)
        for layer in range(sum(reads in OWNERS for _, reads in kinds))
        for kind in ("key", "value")
    ]
    return module, trace(lambda: Sharing(kinds, hide), weights, states=states, context=256)


SHARED: dict[str, tuple[Kinds, str]] = {
    "two local layers": (
        ((WINDOW, "own"), (WINDOW, "written")),
        "layers.0 and layers.1 read cache.0.key, cache.0.value",
    ),
    "a global reader": (((WINDOW, "own"), (None, "written")), "layers.0 and layers.1 read cache.0.key, cache.0.value"),
    "a global owner": (((None, "own"), (WINDOW, "written")), "layers.0 and layers.1 read cache.0.key, cache.0.value"),
    "two global layers": (((None, "own"), (None, "written")), "layers.0 and layers.1 read cache.0.key"),
    "before and after the write": (
        ((WINDOW, "own"), (WINDOW, "held"), (WINDOW, "written")),
        "layers.0 and layers.1 and layers.2 read cache.0.key",
    ),
    "before the write": (((WINDOW, "own"), (WINDOW, "held")), "layers.0 and layers.1 read cache.0.key"),
    "two of three caches": (
        ((WINDOW, "own"), (WINDOW, "written"), (WINDOW, "own"), (None, "own"), (None, "written")),
        "layers.3 and layers.4 read cache.2.key, cache.2.value: a cache may have one reader",
    ),
    "twice in one layer": (((WINDOW, "own"), (WINDOW, "twice")), "layers.1 and layers.1 read cache.1.key"),
}


@pytest.mark.parametrize("hide", [hide_scores, cap_scores], ids=["fused", "unfused"])
@pytest.mark.parametrize("case", SHARED)
def test_every_target_refuses_them(case: str, hide: Callable[..., torch.Tensor]) -> None:
    kinds, words = SHARED[case]
    _, graph = traced(kinds, hide)
    for target in PIPELINES:
        with pytest.raises(InvariantError) as caught:
            pipeline(target, chunk=CHUNK, scheme=scheme("none")).run(graph)
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("target", PIPELINES)
@pytest.mark.parametrize("hide", [hide_scores, cap_scores], ids=["fused", "unfused"])
def test_layers_with_caches_of_their_own_are_taken(target: str, hide: Callable[..., torch.Tensor]) -> None:
    """And right, over several windows of chunks and of single steps."""
    module, graph = traced(((WINDOW, "own"), (WINDOW, "own"), (None, "own")), hide)
    caches = [(torch.zeros(1, N, 256, H), torch.zeros(1, N, 256, H)) for _ in range(3)]
    tokens = torch.randint(0, VOCABULARY, (7 * WINDOW + 4,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(tokens[None], torch.tensor(0), caches)[0][0].numpy()
    rewritten, _ = pipeline(target, chunk=CHUNK, scheme=scheme("none")).run(graph)
    session = ReferenceSession(rewritten, context=256, chunk=CHUNK)
    assert np.abs(session.logits(tokens[:33].tolist()) - expected[:33]).max() < FP32_LOGITS
    for position in range(33, len(tokens)):
        assert np.abs(session.decode(int(tokens[position])) - expected[position]).max() < FP32_LOGITS


def test_one_attention_that_reads_a_cache_as_keys_and_as_values() -> None:
    for hide in (hide_scores, cap_scores):
        _, graph = traced(((WINDOW, "keys"), (WINDOW, "own")), hide)
        counts = {name: len(readers) for name, readers in cache_readers(graph).items()}
        assert counts == {"cache.0.key": 1, "cache.0.value": 0, "cache.1.key": 1, "cache.1.value": 1}
