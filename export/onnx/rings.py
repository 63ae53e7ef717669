"""Caches as rings of slots in standard ONNX: for attention over slots that the new tokens were written to.

TensorScatter writes position p into slot p % S, and Attention masks by the position that each slot holds. The masks are
built once and shared by all layers of a kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transom.export.lowering import Table
from transom.export.onnx.attention import attend_masked
from transom.export.onnx.emitter import Emitter
from transom.export.onnx.encoders import ENCODERS
from transom.export.onnx.lowerings import new_positions, start
from transom.graphs import ops
from transom.graphs.masks import mask_of
from transom.graphs.match import arguments
from transom.graphs.node import Node

OPSET = 24
"""Of TensorScatter."""

RINGS = Table(ENCODERS)
"""Further lowerings, which have attention over rings; how caches are written is the dialect's own."""


def write_cache(emitter: Emitter, node: Node) -> str:
    """Lower `ops.WRITE_CACHE`. Where heads come after tokens, the new keys or values are turned round first."""
    emitter.require_opset(OPSET)
    cache, new, _ = node.args
    batch, _, slots, _ = cache.meta["val"].shape

    def make() -> str:
        slot = emitter.op("Mod", start(emitter), emitter.size(slots))
        return str(emitter.op("Expand", slot, emitter.size(batch)))

    indices = emitter.once(("write_indices", str(slots)), make)
    value = emitter.value(new)
    if not node.kwargs["heads_first"]:
        value = emitter.op("Transpose", value, perm=[0, 2, 1, 3])
    return str(emitter.op("TensorScatter", emitter.value(cache), value, indices, mode="circular"))


@RINGS.lowers(ops.ATTENTION)
def _attention(emitter: Emitter, node: Node) -> str:
    emitter.require_opset(OPSET)
    q, k, v, position = node.args[:4]
    known, until = mask_of(node), arguments(node)["until"]
    (_, heads, tokens, _), (_, key_heads, slots, _) = (value.meta["val"].shape for value in (q, k))
    # Over themselves, new tokens are as far from each other wherever they stand.
    first = emitter.constant(np.array(0)) if position is None else start(emitter)
    last_seen = None if until is None else emitter.value(until)
    mask = emitter.once(
        ("mask", str(slots), known, first), lambda: _mask(emitter, tokens, slots, known, first, last_seen)
    )
    inputs = [emitter.value(value) for value in (q, k, v)]
    return attend_masked(emitter, node, inputs, mask, heads=int(heads), key_heads=int(key_heads), tokens=tokens)


def _mask(emitter: Emitter, tokens: Any, slots: Any, mask: ops.Mask, first: str, until: str | None) -> str:
    """Which slots each new token sees, bool [T, S]; see `graphs.ops.visible`."""
    zero, one = emitter.constant(np.array(0)), emitter.constant(np.array(1))
    positions = new_positions(emitter, tokens, first)
    last = emitter.op("Sub", emitter.op("Add", first, emitter.size(tokens)), one)
    slot = emitter.op("Range", zero, emitter.op("Squeeze", emitter.size(slots)), one)
    # ONNX's Mod of integers takes the sign of the divisor, as Python's does.
    age = emitter.op("Mod", emitter.op("Sub", last, slot), emitter.size(slots))
    keys = emitter.op("Sub", last, age)
    return seen(emitter, keys, positions, mask, until)


def seen(emitter: Emitter, keys: str, positions: str, mask: ops.Mask, until: str | None) -> str:
    """Which keys each query sees, bool [T, S], given the positions of both; see `graphs.ops.seen`."""
    zero, column = emitter.constant(np.array(0)), emitter.constant(np.array([1]))
    queries = emitter.op("Unsqueeze", positions, column)
    last = queries if until is None else emitter.op("Unsqueeze", until, column)
    result = emitter.op("And", emitter.op("GreaterOrEqual", keys, zero), emitter.op("LessOrEqual", keys, last))
    return str(narrowed(emitter, result, keys, queries, mask))


def narrowed(emitter: Emitter, seen: str, keys: str, queries: str, mask: ops.Mask) -> str:
    """Less what a mask's conditions hide; positions of queries broadcast with those of keys."""
    if mask.window:
        edge = emitter.op("Sub", queries, emitter.constant(np.array(mask.window)))
        seen = emitter.op("And", seen, emitter.op("Greater", keys, edge))
    if mask.segment:
        inside = emitter.op("Mod", queries, emitter.constant(np.array(mask.segment)))
        seen = emitter.op("And", seen, emitter.op("GreaterOrEqual", keys, emitter.op("Sub", queries, inside)))
    if mask.dilation > 1:
        step = emitter.constant(np.array(mask.dilation))
        same = emitter.op("Equal", emitter.op("Mod", keys, step), emitter.op("Mod", queries, step))
        seen = emitter.op("And", seen, same)
    return seen
