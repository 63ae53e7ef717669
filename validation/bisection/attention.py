"""What may be wrong with attention's keys: the mask, the cache, the heads.

A mask is what a softmax's input becomes where the scores are zeros, however the model writes it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import methodcaller
from typing import NamedTuple

import torch

from transom.graphs.masks import MASKED, candidates
from transom.graphs.match import LAYOUT, aten, is_call, skip_casts
from transom.graphs.node import Node, is_node
from transom.graphs.ops import Mask
from transom.passes.sinks import without_maximum
from transom.validation.bisection.context import Context, Site
from transom.validation.bisection.operands import of_operands
from transom.validation.bisection.replay import RIGHT, Change, Changes, Hypothesis, Replay, from_node

SCANNED = 256
"""Up to this many positions, every number of slots and every window is tried; beyond, the likely ones."""


class Masking(NamedTuple):
    """Where attention hides scores: its softmax, the scores that go into it, less sinks, and those before the mask."""

    softmax: Node
    masked: Node
    scores: Node


def masking(site: Site) -> Masking | None:
    """Where a site hides scores; None if it has no softmax over scores and a mask."""
    for softmax in site.calls(aten.softmax.int, aten._softmax.default):
        masked = skip_casts(without_maximum(skip_casts(softmax.args[0])))
        if is_call(masked, aten.cat.default):  # sinks stand behind
            masked = skip_casts(masked.args[0][0])
        scores = [side for side in masked.args if is_node(side) and side in site.moving]
        if len(scores) == 1 and len(masked.all_input_nodes) > 1:
            return Masking(softmax, masked, scores[0])
    return None


def seen_keys(replay: Replay, place: Masking) -> torch.Tensor:
    """Which keys each token sees, bool [T, S], as the graph says."""
    total = len(replay.positions)
    slots = total if replay.slots is None else replay.slots
    masked = replay.value(place.masked, {place.scores: lambda _: torch.zeros(1, 1, total, slots)})
    return masked.flatten(0, -3)[0].expand(total, slots) > MASKED  # type: ignore[no-any-return]


def masks(context: Context) -> dict[int | None, Mask]:
    """Mask of every layer that attends, by what its last tokens see."""
    layers, total = {}, len(context.prompt)
    last = range(max(0, total - SCANNED), total)
    for site in context.sites("attention"):
        if (place := masking(site)) is not None:
            output = torch.empty(len(last))
            replay = Replay(site=site, context=context, inputs={}, output=output, calls=(last,), slots=total)
            seen, positions, keys = seen_keys(replay, place), replay.positions, torch.arange(total)
            if context.spans:  # tokens of images see further; the last token is text
                seen, positions = seen[-1:], positions[-1:]
            fitting = candidates(seen, positions, keys, range(1, len(seen)))
            layers[site.tap.layer] = next(fitting, Mask(window=int(seen[-1].sum())))
    return layers


class _Keys(NamedTuple):
    """Which keys each token may see, [T, T] each, positions of queries first.

    Attributes:
        positions: Of queries, and of keys, [T].
        distance: How far back a key is; negative for later ones.
        same_call: Whether it is written by the token's own call.
        lost: How many newer keys have been written when the token attends: its call's last position less the key's.
        before: The same, counted before the call writes; negative in the call.
    """

    positions: torch.Tensor
    distance: torch.Tensor
    same_call: torch.Tensor
    lost: torch.Tensor
    before: torch.Tensor

    def under(self, mask: Mask) -> torch.Tensor:
        """Those that meet a mask's conditions, later ones among them."""
        every = torch.ones_like(self.same_call)
        return functools.reduce(torch.logical_and, mask.conditions(self.positions[:, None], self.positions), every)


def of_attention(replay: Replay) -> Iterator[Hypothesis]:
    """First that it is right; then masks, overwritten keys, displaced keys, what it is given, and heads."""
    place = masking(replay.site)
    if place is None:
        yield Hypothesis(RIGHT)
        for softmax in replay.site.calls(aten.softmax.int, aten._softmax.default):
            cause = "attention is causal: no position sees those after it"
            yield Hypothesis(cause, {softmax.args[0]: from_node(softmax.args[0], _causal)}, op="mask")
        return
    at = replay.positions
    starts = torch.tensor([call.start for call in replay.calls for _ in call])
    lasts = torch.tensor([call[-1] for call in replay.calls for _ in call])
    keys = _Keys(
        positions=at,
        distance=at[:, None] - at,
        same_call=starts[:, None] == starts,
        lost=lasts[:, None] - at,
        before=starts[:, None] - 1 - at,
    )
    chunk, layers = max(map(len, replay.calls)), masks(replay.context)
    mask = layers.pop(replay.site.tap.layer, Mask())
    window = mask.reach or None
    local = window or min((other.reach for other in layers.values() if other.reach), default=chunk)
    causal, blocks = keys.distance >= 0, _blocks(replay)
    seen = seen_keys(replay, place)
    if blocks.any():
        seen = (causal | blocks) & keys.under(mask)

    def guess(op: str, cause: str, seen: torch.Tensor, changes: Changes | None = None) -> Hypothesis:
        hide = from_node(place.scores, lambda scores: scores.masked_fill(~seen, float("-inf")))
        return Hypothesis(cause, {place.masked: hide, **(changes or {})}, op=op)

    yield guess("mask", RIGHT, seen) if blocks.any() else Hypothesis(RIGHT, op="mask")
    for cause, changed in _masks(keys, mask, local, blocks):
        yield guess("mask", cause, changed)
        for cached in _cached_keys(keys, window, chunk):
            if not torch.equal(changed & cached, changed):
                yield guess("mask", f"{cause}, as far as its cache holds them", changed & cached)
    if blocks.any():
        yield from _cut(replay, seen, guess)
    yield from (guess("cache write", cause, kept) for cause, kept in _losses(keys, seen, window, local, chunk))
    written = replay.site.calls(aten.index_copy.default)
    for shift, words in ((1, "before"), (-1, "after")) if written else ():
        moved = {node: from_node(node, partial(torch.roll, shifts=shift, dims=2)) for node in written}
        cause = f"keys and values stand one slot off: every token reads those of the position {words}"
        yield guess("cache write", cause, seen, moved)
    empty = partial(_with_empty_slots, seen, window or int(lasts.max()) + 1)
    cause = "slots that were never written are seen as keys of zeros"
    yield guess("mask", cause, seen, {place.softmax: from_node(place.softmax.args[0], empty)})
    if place.softmax.meta["val"].shape[-1] != place.masked.meta["val"].shape[-1]:
        cause = "the sinks are left out: the weights of keys add up to 1"
        yield Hypothesis(cause, {place.softmax: from_node(place.masked, _without_sinks)})
    for cause, changes in of_operands(replay):
        yield guess("softmax", cause, seen, changes)
    if tiled := dict(_tiled(replay.site)):
        cause = "query heads read the wrong key/value heads: they are tiled, not repeated"
        yield guess("mask", cause, seen, tiled)


def _blocks(replay: Replay) -> torch.Tensor:
    """Pairs of positions of one block that sees itself, bool [T, T]."""
    at = replay.positions
    same_block = torch.zeros(len(at), len(at), dtype=torch.bool)
    for first, stop in replay.context.spans:
        inside = (at >= first) & (at < stop)
        same_block |= inside[:, None] & inside
    return same_block


def _cut(
    replay: Replay, seen: torch.Tensor, guess: Callable[[str, str, torch.Tensor], Hypothesis]
) -> Iterator[Hypothesis]:
    """Images whose first tokens do not see the rest, each cut where that comes closest to what was seen."""
    places = []
    for first, stop in replay.context.spans:
        step, least, best = max(1, (stop - first) // 32), float("inf"), (stop - first, seen)
        for count in range(stop - first, 0, -step):
            tried = seen.clone()
            tried[first : first + count, first + count : stop] = False
            rows = (guess("mask", "", tried).predict(replay) - replay.output)[first:stop]
            if (error := float(rows.abs().amax())) < least:
                least, best = error, (count, tried)
        seen = best[1]
        places += [str(best[0])] if best[0] < stop - first else []
    if places:
        words = f"images are cut in two, behind {' and '.join(places)} tokens: what comes first does not see the rest"
        yield guess("mask", words, seen)


def _causal(scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))


def _masks(keys: _Keys, mask: Mask, local: int, blocks: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Masks that are not the layer's."""
    causal, under = keys.distance >= 0, keys.under(mask)
    for words, wrong in _other_masks(mask, local, len(causal)):
        yield words, (causal | blocks) & keys.under(wrong)
    yield "attention is not causal: tokens see later ones of their call", (causal | keys.same_call) & under
    yield "tokens see one key too late a position", (keys.distance >= -1) & (causal | keys.same_call) & under
    yield "tokens do not see their own key", (keys.distance >= 1) & under
    if blocks.any():
        yield "the image block is missing: its tokens see only earlier ones", causal & under
        if window := mask.window:
            words = f"the window of {window} keys bounds how far ahead tokens of an image see, too"
            yield words, (causal | blocks) & (keys.distance.abs() < window)
            yield "images are seen whole, however far back they begin", (causal & under) | blocks


def _other_masks(mask: Mask, local: int, total: int) -> Iterator[tuple[str, Mask]]:
    """What the mask may have become, the likeliest first."""
    scanned = range(1, total if total <= SCANNED else 0)
    if (length := mask.segment) or mask.dilation > 1:
        yield from _other_segments(mask, scanned)
    elif window := mask.window:
        for wrong in {window - 1, window + 1} - {0}:
            yield f"the window is off by one: {wrong} keys in place of {window}", Mask(window=wrong)
        yield "the window is ignored: the local layer sees every earlier key", Mask()
        for wrong in sorted({window // 2, 2 * window, *scanned} - {0, window - 1, window, window + 1}):
            yield f"the window is {wrong} keys in place of {window}", Mask(window=wrong)
    if not (mask.window or length):
        words = f"the global layer is bounded to the window of {local} keys: its mask is a local layer's"
        yield words, dataclasses.replace(mask, window=local)
        for wrong in scanned:
            yield f"the global layer is bounded to a window of {wrong} keys", dataclasses.replace(mask, window=wrong)


def _other_segments(mask: Mask, scanned: Sequence[int]) -> Iterator[tuple[str, Mask]]:
    """What a mask of segments, or a dilated one, may have become."""
    length, step = mask.segment, mask.dilation
    if step > 1:
        words = f"the dilation is ignored: tokens see every key, not one in {step}"
        yield words, dataclasses.replace(mask, dilation=1)
    if length:
        words = f"segments of {length} are ignored: tokens see keys before their own"
        yield words, dataclasses.replace(mask, segment=0)
        yield f"segments of {length} are taken for a window", dataclasses.replace(mask, segment=0, window=length)
    for wrong in sorted({step - 1, step + 1, *scanned} - {0, 1, step}):
        yield f"one key in {wrong} is seen in place of one in {step}", dataclasses.replace(mask, dilation=wrong)
    for wrong in sorted({length - 1, length + 1, *scanned} - {0, length}) if length else ():
        yield f"segments are {wrong} long in place of {length}", dataclasses.replace(mask, segment=wrong)


def _cached_keys(keys: _Keys, window: int | None, chunk: int) -> Iterator[torch.Tensor]:
    """What rightly bounded caches of a local layer hold: written before attention, and after it."""
    if window is not None:
        yield keys.lost < window + chunk - 1
        yield keys.same_call | (keys.before < window)


def _losses(
    keys: _Keys, seen: torch.Tensor, window: int | None, local: int, chunk: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Keys that attention should see and that no longer stand in the cache."""
    kind = "local" if window is not None else "global"
    needed = f"{local + chunk - 1} are needed for a window of {local} and chunks of {chunk}"
    needed = needed if window is not None else "it must grow with the context"
    likely = [local, local - 1, local + 1, local + chunk - 2, local + chunk - 1, chunk]
    tried = dict.fromkeys((*likely, *(range(1, local + 2 * chunk) if len(seen) <= SCANNED else ())))
    for slots in tried:
        words = f"the {kind} layer's cache has {slots} slots, {needed}: keys were overwritten before they were read"
        yield words, seen & (keys.lost < slots)
    for slots in tried:
        if window is None or slots < window:
            words = f"the {kind} layer's cache keeps {slots} keys between calls: those before them are missing"
            yield words, seen & (keys.same_call | (keys.before < slots))
    yield "keys of earlier calls are missing: the cache is not kept, or not read", seen & keys.same_call
    own = ~keys.same_call | (keys.distance == 0)
    yield "keys of the same call are missing: they are written after attention", seen & own


def _with_empty_slots(seen_TS: torch.Tensor, least: int, masked: torch.Tensor) -> torch.Tensor:
    """Weights of keys where each token sees at least so many: those that are missing are zeros."""
    zeros_T = (least - seen_TS.sum(1)).clamp_min(0).float().log()
    zeros = zeros_T[:, None].expand(*masked.shape[:-1], 1)
    return torch.cat((masked, zeros), -1).softmax(-1)[..., :-1]


def _without_sinks(masked: torch.Tensor) -> torch.Tensor:
    """Weights of keys, and none of sinks."""
    return torch.nn.functional.pad(masked.softmax(-1), (0, 1))


def _tiled(site: Site) -> Iterator[tuple[Node, Change]]:
    """Where kv heads are repeated, [B, K, S, H] to [B, N, S, H]: as a list that starts again, k0 k1 k0 k1."""
    for node in site.nodes:
        source = node
        while is_call(source, *LAYOUT) and source.meta["val"].dim() >= 4:
            source = source.args[0]
            shape, repeated = source.meta["val"].shape, node.meta["val"].shape
            if len(shape) == len(repeated) == 4 and shape[1] != repeated[1] and shape[3] == repeated[3]:
                groups = repeated[1] // shape[1] if isinstance(shape[1], int) and isinstance(repeated[1], int) else 1
                if groups > 1:
                    yield node, from_node(source, methodcaller("repeat", 1, groups, 1, 1))
                break
