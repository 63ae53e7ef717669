"""Masks are read as what they are: hand-made masks in many spellings, each with the only answer that is right.

All masks of a kind are outputs of one module, so that one export serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.case import export
from transom.graphs.graph import Graph
from transom.graphs.masks import MaskReading, read_mask, structure
from transom.graphs.ops import Mask

INF = float("inf")
W = 16

Expected = int | Mask | str
"""A mask (a number is a window), or words of the reason why there is none."""

Plain = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query positions [T, 1], key positions [1, T], token ids [B, T]) -> mask."""


def additive(seen: torch.Tensor, least: float = -INF) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, least)


NEITHER = "neither causal nor a causal window"

# Keys stand in their own order, S is T.
PLAIN: dict[str, tuple[Plain, Expected]] = {
    "causal": (lambda i, j, x: j <= i, 0),
    "causal by tril": (lambda i, j, x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), 0),
    "causal by triu of -inf": (lambda i, j, x: torch.full((x.shape[1], x.shape[1]), -INF).triu(1), 0),
    "causal, additive": (lambda i, j, x: additive(j <= i), 0),
    "causal, least float32": (lambda i, j, x: additive(j <= i, torch.finfo(torch.float32).min), 0),
    "causal, same for all heads": (lambda i, j, x: (j <= i)[None, None].expand(x.shape[0], 4, -1, -1), 0),
    "window": (lambda i, j, x: (j <= i) & (i - j < W), W),
    "window, additive": (lambda i, j, x: additive((j <= i) & (i - j < W)), W),
    "window by tril and triu": (
        lambda i, j, x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(1 - W),
        W,
    ),
    "window, other side": (lambda i, j, x: (j <= i) & (j > i - W), W),
    "window - 1 at most": (lambda i, j, x: (j <= i) & (i - j <= W - 1), W),
    "distance <= W is a window of W + 1": (lambda i, j, x: (j <= i) & (i - j <= W), W + 1),
    "key >= query - W is a window of W + 1": (lambda i, j, x: (j <= i) & (j >= i - W), W + 1),
    "distance < W - 1 is a window of W - 1": (lambda i, j, x: (j <= i) & (i - j < W - 1), W - 1),
    "window of one": (lambda i, j, x: i == j, 1),
    "window of two": (lambda i, j, x: (j == i) | (j == i - 1), 2),
    "prime window": (lambda i, j, x: (j <= i) & (i - j < 23), 23),
    "window from a quotient": (lambda i, j, x: (j <= i) & ((i - j) / 10.0 < 6), 60),
    "dilated": (lambda i, j, x: (j <= i) & ((i - j) % 2 == 0), Mask(dilation=2)),
    "dilated window": (lambda i, j, x: (j <= i) & (i - j < 13) & (i % 4 == j % 4), Mask(window=13, dilation=4)),
    "dilated window, whose last keys are none": (
        lambda i, j, x: (j <= i) & (i - j < W) & ((i - j) % 4 == 0),
        Mask(window=13, dilation=4),
    ),
    "segments": (lambda i, j, x: (j <= i) & (i // W == j // W), Mask(segment=W)),
    "segments by their beginnings": (lambda i, j, x: (j <= i) & (j >= i - i % W), Mask(segment=W)),
    "dilated segments": (
        lambda i, j, x: additive((j <= i) & (i // W == j // W) & ((i - j) % 4 == 0)),
        Mask(segment=W, dilation=4),
    ),
    "segments that the dilation does not divide": (
        lambda i, j, x: (j <= i) & (i // 17 == j // 17) & ((i - j) % 5 == 0),
        Mask(segment=17, dilation=5),
    ),
    "long segments": (
        lambda i, j, x: (j <= i) & (i // 1024 == j // 1024) & ((i - j) % 16 == 0),
        Mask(segment=1024, dilation=16),
    ),
    # None of these is a mask of a known family.
    "nothing hidden": (lambda i, j, x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), NEITHER),
    "strictly earlier keys": (lambda i, j, x: j < i, NEITHER),
    "window without the token itself": (lambda i, j, x: (j < i) & (i - j < W), NEITHER),
    "later keys": (lambda i, j, x: j >= i, NEITHER),
    "symmetric window": (lambda i, j, x: (i - j).abs() < W, NEITHER),
    "segments that see each other's keys": (lambda i, j, x: i // W == j // W, NEITHER),
    "segments that begin one earlier": (lambda i, j, x: (j <= i) & ((i + 1) // W == (j + 1) // W), NEITHER),
    "segments and the one before": (lambda i, j, x: (j <= i) & (i // W - j // W < 2), NEITHER),
    "dilated, another residue": (lambda i, j, x: (j <= i) & ((i - j) % 4 == 1), NEITHER),
    "dilated and the token itself": (lambda i, j, x: (j == i) | ((j <= i) & (j % 4 == 0)), NEITHER),
    "dilated on both sides": (lambda i, j, x: (i - j) % 4 == 0, NEITHER),
    "dilated by segment": (lambda i, j, x: (j <= i) & (i // W == j // W) & ((i % W) % 5 == (j % W) % 3), NEITHER),
    "dilated past a window": (lambda i, j, x: (j <= i) & ((i - j < W) | ((i - j) % 4 == 0)), NEITHER),
    "image block": (lambda i, j, x: (j <= i) | ((i >= 4) & (i < 9) & (j >= 4) & (j < 9)), NEITHER),
    "window and image block": (
        lambda i, j, x: (i - j < W) & ((j <= i) | ((i >= 4) & (i < 9) & (j >= 4) & (j < 9))),
        NEITHER,
    ),
    "sink": (lambda i, j, x: (j <= i) & ((i - j < W) | (j < 1)), NEITHER),
    "prefix": (lambda i, j, x: (j <= i) | (j < 10), NEITHER),
    "local from position 100 on": (lambda i, j, x: (j <= i) & ((i - j < W) | (i < 100)), NEITHER),
    "global from position 100 on": (lambda i, j, x: (j <= i) & ((i - j < W) | (i >= 100)), NEITHER),
    "window of a third": (lambda i, j, x: (j <= i) & ((i - j) * 3 < x.shape[1]), NEITHER),
    "heads differ": (
        lambda i, j, x: ((j <= i) & (i - j < torch.arange(1, 5)[:, None, None] * W))[None],
        "differs between batch rows or heads",
    ),
    "bias by distance": (lambda i, j, x: additive(j <= i) - 0.125 * (i - j).clamp(min=0), "adds a bias"),
    "hidden by too little": (lambda i, j, x: additive(j <= i, -100.0), "adds a bias"),
    "window by token": (
        lambda i, j, x: (j <= i) & (i - j < W + x[0].sum() * 0),
        "depends on the values of x",
    ),
    "padding": (lambda i, j, x: ((j <= i) & (x[:, None, :] != 0))[:, None], "depends on the values of x"),
}


class PlainMasks(nn.Module):
    def __init__(self, masks: Mapping[str, tuple[Plain, Expected]]) -> None:
        super().__init__()
        self.masks = [make for make, _ in masks.values()]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        positions = torch.arange(x.shape[1])
        return [mask(positions[:, None], positions[None], x) for mask in self.masks]


@pytest.fixture(scope="module")
def plain() -> Graph:
    sizes = ({0: Dim("B", max=8), 1: Dim("T", max=4096)},)
    return export(PlainMasks(PLAIN), torch.ones(2, 29, dtype=torch.int64), dynamic_shapes=sizes)


def read_plain(graph: Graph, index: int) -> MaskReading:
    (x,) = graph.inputs.values()
    tokens = x.meta["val"].shape[1]
    return read_mask(graph, graph.outputs[f"output.{index}"], tokens, tokens, cached=False)


def expect(reading: MaskReading, expected: Expected) -> None:
    if isinstance(expected, str):
        assert reading.mask is None and expected in reading.reason, reading
    else:
        assert reading == MaskReading(mask=expected if isinstance(expected, Mask) else Mask(window=expected)), reading


@pytest.mark.parametrize("name", PLAIN)
def test_plain(plain: Graph, name: str) -> None:
    expect(read_plain(plain, list(PLAIN).index(name)), PLAIN[name][1])


# Keys stand in a ring's slots: (query positions [T, 1], positions that the slots hold [S], start, slots) -> mask.
Ring = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]

RING: dict[str, tuple[Ring, Expected]] = {
    "causal": (lambda i, k, p, s: (k >= 0) & (k <= i), 0),
    "causal, additive": (lambda i, k, p, s: additive((k >= 0) & (k <= i)), 0),
    "window": (lambda i, k, p, s: (k >= 0) & (k <= i) & (i - k < W), W),
    "window, additive, four axes": (lambda i, k, p, s: additive((k >= 0) & (k <= i) & (i - k < W))[None, None], W),
    "key > query - W": (lambda i, k, p, s: (k >= 0) & (k <= i) & (k > i - W), W),
    "distance <= W is a window of W + 1": (lambda i, k, p, s: (k >= 0) & (k <= i) & (i - k <= W), W + 1),
    "empty slots seen": (lambda i, k, p, s: (k <= i) & (i - k < W), NEITHER),
    "the token itself forgotten": (lambda i, k, p, s: (k >= 0) & (k < i) & (i - k < W), NEITHER),
    "no ring": (lambda i, k, p, s: torch.arange(s) <= i, NEITHER),
    "segments": (lambda i, k, p, s: (k >= 0) & (k <= i) & (i // W == k // W), Mask(segment=W)),
    "dilated": (lambda i, k, p, s: (k >= 0) & (k <= i) & ((i - k) % 3 == 0), Mask(dilation=3)),
    "dilated segments": (
        lambda i, k, p, s: (k >= 0) & (k <= i) & (i // W == k // W) & ((i - k) % 3 == 0),
        Mask(segment=W, dilation=3),
    ),
    "segments from the call's first token": (
        lambda i, k, p, s: (k >= 0) & (k <= i) & ((i - p) // W == (k - p) // W),
        NEITHER,
    ),
    "dilated by slot": (lambda i, k, p, s: (k >= 0) & (k <= i) & ((i - torch.arange(s)) % 4 == 0), NEITHER),
    "chunk of new tokens sees itself": (lambda i, k, p, s: (k >= 0) & ((k <= i) | (k >= p)), NEITHER),
    "segments by shifts": (lambda i, k, p, s: (k >= 0) & (k <= i) & (i >> 6 == k >> 6), Mask(segment=64)),
    "a window that grows by shifts": (lambda i, k, p, s: (k >= 0) & (k <= i) & (i - k < W + (i >> 6)), NEITHER),
    "a window within segments": (lambda i, k, p, s: (k >= 0) & (k <= i) & (i - k < 5) & (i // 64 == k // 64), NEITHER),
    "local after the first wrap": (lambda i, k, p, s: (k >= 0) & (k <= i) & ((i - k < W) | (p < s)), NEITHER),
}


class RingMasks(nn.Module):
    def __init__(self, masks: Mapping[str, tuple[Ring, Expected]]) -> None:
        super().__init__()
        self.masks = [make for make, _ in masks.values()]

    def forward(self, x: torch.Tensor, start: torch.Tensor, cache: torch.Tensor) -> list[torch.Tensor]:
        slots = cache.shape[2]
        positions = start + torch.arange(x.shape[1])
        last = start + x.shape[1] - 1
        keys = last - (last - torch.arange(slots)) % slots
        return [mask(positions[:, None], keys, start, slots) for mask in self.masks]


def ring_graph(sizes: Any, masks: Mapping[str, tuple[Ring, Expected]] = RING) -> Graph:
    graph = export(
        RingMasks(masks),
        torch.ones(2, 7, dtype=torch.int64),
        torch.tensor(0),
        torch.zeros(2, 2, 90, 8),
        dynamic_shapes=sizes,
    )
    return graph


@pytest.fixture(scope="module")
def rings() -> dict[str, Graph]:
    tokens, slots = {1: Dim("T", max=4096)}, {2: Dim("S", max=4096)}
    return {
        "dynamic": ring_graph((tokens, None, slots)),
        "static slots": ring_graph((tokens, None, None)),
        "static": ring_graph(None),
    }


@pytest.mark.parametrize("name", RING)
@pytest.mark.parametrize("sizes", ["dynamic", "static slots", "static"])
def test_ring(rings: dict[str, Graph], sizes: str, name: str) -> None:
    graph = rings[sizes]
    x, _, cache = graph.inputs.values()
    mask = graph.outputs[f"output.{list(RING).index(name)}"]
    reading = read_mask(graph, mask, x.meta["val"].shape[1], cache.meta["val"].shape[2], cached=True)
    expect(reading, RING[name][1])


# Where 90 slots would never hold what tells them from a known family.
FAR: dict[str, tuple[Ring, Expected]] = {
    "a window that a root hides": (lambda i, k, p, s: (k >= 0) & (k <= i) & ((i - k).float().sqrt() < 12), NEITHER),
    "a window that a square hides": (lambda i, k, p, s: (k >= 0) & (k <= i) & ((i - k) * (i - k) < 400_000), NEITHER),
    "two dilations": (lambda i, k, p, s: (k >= 0) & (k <= i) & (i % 7 == k % 7) & (i % 11 == k % 11), NEITHER),
    "positions of 8 bits": (lambda i, k, p, s: (k >= 0) & (k.bfloat16() <= i.bfloat16()), NEITHER),
}


def test_what_no_number_of_the_graph_gives_away_is_seen_from_afar() -> None:
    sizes = {1: Dim("T", max=4096)}, None, {2: Dim("S", max=4096)}
    graph = ring_graph(sizes, FAR)
    x, _, cache = graph.inputs.values()
    for mask, (_, expected) in zip(graph.outputs.values(), FAR.values(), strict=True):
        expect(read_mask(graph, mask, x.meta["val"].shape[1], cache.meta["val"].shape[2], cached=True), expected)


def test_long_windows_and_segments_over_caches() -> None:
    """A mask of a window's tokens and two windows' slots would be too large to be evaluated."""
    masks: dict[str, tuple[Ring, Expected]] = {
        "window": (lambda i, k, p, s: (k >= 0) & (k <= i) & (i - k < 8192), 8192),
        "segments": (lambda i, k, p, s: (k >= 0) & (k <= i) & (i // 8192 == k // 8192), Mask(segment=8192)),
    }
    graph = ring_graph(({1: Dim("T", max=4096)}, None, {2: Dim("S", max=2**17)}), masks)
    x, _, cache = graph.inputs.values()
    for mask, (_, expected) in zip(graph.outputs.values(), masks.values(), strict=True):
        expect(read_mask(graph, mask, x.meta["val"].shape[1], cache.meta["val"].shape[2], cached=True), expected)


def test_where_keys_are_in_their_own_order_a_root_hides_a_window() -> None:
    masks: dict[str, tuple[Plain, Expected]] = {
        "shifts": (lambda i, j, x: (j <= i) & (i >> 6 == j >> 6), Mask(segment=64)),
        "root": (lambda i, j, x: (j <= i) & ((i - j).abs().sqrt() < 40), "may change beyond"),
        "square": (lambda i, j, x: (j <= i) & ((i - j) * (i - j) < 10**6), "may change beyond"),
    }
    sizes = ({1: Dim("T", max=4096)},)
    graph = export(PlainMasks(masks), torch.ones(1, 29, dtype=torch.int64), dynamic_shapes=sizes)
    for index, (_, expected) in enumerate(masks.values()):
        expect(read_plain(graph, index), expected)


# With sizes that the graph fixes, only those sizes count.
STATIC: dict[str, tuple[Plain, Expected]] = {
    "causal": (lambda i, j, x: j <= i, 0),
    "window": (lambda i, j, x: (j <= i) & (i - j < W), W),
    "window that the size never fills": (lambda i, j, x: (j <= i) & (i - j < 40), 0),
    "window of W + 1": (lambda i, j, x: (j <= i) & (i - j <= W), W + 1),
    "segments": (lambda i, j, x: (j <= i) & (i // W == j // W), Mask(segment=W)),
    "segments longer than the size": (lambda i, j, x: (j <= i) & (i // 40 == j // 40), 0),
    "a stored mask": (
        lambda i, j, x: torch.tensor([[True] * 29] * 29).tril(),
        "depends on the values of",
    ),
}


@pytest.mark.parametrize("name", STATIC)
def test_static(name: str) -> None:
    graph = export(PlainMasks({name: STATIC[name]}), torch.ones(2, 29, dtype=torch.int64))
    expect(read_plain(graph, 0), STATIC[name][1])


def test_a_window_that_no_number_of_the_graph_names_is_not_overlooked() -> None:
    """50 blocks of 100 keys: a window of 5,000 that looks causal up to there."""
    masks: dict[str, tuple[Plain, Expected]] = {"": (lambda i, j, x: (j <= i) & ((i - j) / 100.0 < 50), 5000)}
    sizes = ({1: Dim("T", max=8192)},)
    graph = export(PlainMasks(masks), torch.ones(1, 29, dtype=torch.int64), dynamic_shapes=sizes)
    expect(read_plain(graph, 0), 5000)


def test_keys_of_unknown_length_are_left_alone() -> None:
    """A cache that grows by concatenation: S is P + T, which no input's size is."""

    class Concatenated(nn.Module):
        def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
            keys = torch.cat((past, x), dim=1).shape[1]
            queries = torch.arange(x.shape[1]) + past.shape[1]
            return torch.arange(keys)[None] <= queries[:, None]

    inputs = torch.ones(1, 5), torch.ones(1, 9)
    graph = export(Concatenated(), *inputs, dynamic_shapes=({1: Dim("T", max=64)}, {1: Dim("P", max=64)}))
    mask = graph.outputs["output.0"]
    tokens, keys = mask.meta["val"].shape
    for cached in (False, True):
        assert read_mask(graph, mask, tokens, keys, cached=cached).mask is None


@pytest.mark.parametrize("window", [1024, 4096])
def test_large_windows_need_little_memory(window: int) -> None:
    """Reading Gemma's largest windows must not allocate a mask of gigabytes."""
    masks: dict[str, tuple[Plain, Expected]] = {"": (lambda i, j, x: (j <= i) & (i - j < window), window)}
    sizes = ({1: Dim("T", max=131072)},)
    graph = export(PlainMasks(masks), torch.ones(1, 29, dtype=torch.int64), dynamic_shapes=sizes)
    with torch.profiler.profile(profile_memory=True) as profile:
        expect(read_plain(graph, 0), window)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 2**29


# With the last position that each token sees: (query positions [T, 1], keys [S], until [T, 1]) -> mask.
Ahead = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

AHEAD: dict[str, tuple[Ahead, Expected]] = {
    "causal or image": (lambda i, k, u: (k >= 0) & (k <= u), 0),
    "window, or ahead in the image": (lambda i, k, u: (k >= 0) & (k <= u) & (i - k < W), W),
    "additive": (lambda i, k, u: additive((k >= 0) & (k <= u) & (k > i - W)), W),
    "window on both sides": (lambda i, k, u: (k >= 0) & (k <= u) & ((i - k).abs() < W), NEITHER),
    "images see past the window": (lambda i, k, u: (k >= 0) & (k <= u) & ((i - k < W) | (u > i)), NEITHER),
    "not the end of the image": (lambda i, k, u: (k >= 0) & ((k <= i) | (k < u)) & (i - k < W), NEITHER),
    "one further": (lambda i, k, u: (k >= 0) & (k <= u + 1), NEITHER),
    "behind the image nothing": (lambda i, k, u: (k >= 0) & (k <= i) & (k <= u), NEITHER),
}


class AheadMasks(nn.Module):
    def forward(
        self, x: torch.Tensor, start: torch.Tensor, until: torch.Tensor, cache: torch.Tensor
    ) -> list[torch.Tensor]:
        slots, last = cache.shape[2], start + x.shape[1] - 1
        positions, keys = start + torch.arange(x.shape[1]), last - (last - torch.arange(slots)) % slots
        return [mask(positions[:, None], keys, until[:, None]) for mask, _ in AHEAD.values()]


@pytest.fixture(scope="module")
def ahead() -> Graph:
    tokens = Dim("T", max=4096)
    inputs = torch.ones(2, 7, dtype=torch.int64), torch.tensor(0), torch.arange(7), torch.zeros(2, 2, 90, 8)
    return export(AheadMasks(), *inputs, dynamic_shapes=({1: tokens}, None, {0: tokens}, {2: Dim("S", max=4096)}))


@pytest.mark.parametrize("name", AHEAD)
def test_tokens_of_an_image_see_each_other(ahead: Graph, name: str) -> None:
    mask, expected = ahead.outputs[f"output.{list(AHEAD).index(name)}"], AHEAD[name][1]
    tokens, slots = ahead.inputs["x"].meta["val"].shape[1], ahead.inputs["cache"].meta["val"].shape[2]
    reading = read_mask(ahead, mask, tokens, slots, cached=True)
    if isinstance(expected, int):
        assert reading == MaskReading(mask=Mask(window=expected), until=ahead.inputs["until"]), reading
    else:
        expect(reading, expected)


def test_masks_of_one_structure_are_one_kind() -> None:
    """A mask that is made twice is the same kind, and no two spellings are."""
    twice = {f"{name}, {copy}": PLAIN[name] for copy in ("first", "second") for name in PLAIN}
    sizes = ({0: Dim("B", max=8), 1: Dim("T", max=4096)},)
    graph = export(PlainMasks(twice), torch.ones(2, 29, dtype=torch.int64), dynamic_shapes=sizes)
    kinds = [structure(graph, mask) for mask in graph.outputs.values()]
    assert kinds[: len(PLAIN)] == kinds[len(PLAIN) :] and len(set(kinds)) == len(PLAIN)


def test_inputs_count_by_name_where_their_values_do() -> None:
    class Masks(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, short: torch.Tensor) -> list[torch.Tensor]:
            sizes = [torch.ones(z.shape[1], z.shape[1]).tril() for z in (x, y, short)]
            return [*sizes, x > 0, y > 0]

    inputs = torch.ones(1, 5), torch.ones(1, 5), torch.ones(1, 4)
    tokens, others = {1: Dim("T", max=64)}, {1: Dim("S", max=64)}
    graph = export(Masks(), *inputs, dynamic_shapes=(tokens, tokens, others))
    by_size, by_same_size, by_other_size, by_x, by_y = (structure(graph, mask) for mask in graph.outputs.values())
    assert by_size == by_same_size and len({by_size, by_other_size, by_x, by_y}) == 4
