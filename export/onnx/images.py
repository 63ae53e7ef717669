"""Attention of an image's tokens to each other, beside ONNX Runtime's GroupQueryAttention, which sees no later key."""

from __future__ import annotations

from typing import Any

import numpy as np

from transom.export.onnx.attention import attend_masked
from transom.export.onnx.emitter import Emitter
from transom.export.onnx.lowerings import INT32, new_positions, start
from transom.export.onnx.rings import seen
from transom.graphs.masks import mask_of
from transom.graphs.node import Node


def any_ahead(emitter: Emitter, until: Node) -> str:
    """Whether some new token sees a later one, bool []."""

    def make() -> str:
        positions = new_positions(emitter, until.meta["val"].shape[0], start(emitter))
        ahead = emitter.op("Cast", emitter.op("Greater", emitter.value(until), positions), to=INT32)
        most = emitter.op("ReduceMax", ahead, keepdims=0)
        return str(emitter.op("Greater", most, emitter.constant(np.array(0, np.int32))))

    return str(emitter.once("any_ahead", make))


def attend_until(emitter: Emitter, node: Node) -> str:
    """What GroupQueryAttention is to take for queries [B, T, N * H]: these, or where images are, the attended values.

    The attended values are those of `transom.attend`, read from the caches before the operator writes them.
    """
    q, k, v, _, _, _, until, *_ = node.args
    queries = emitter.flattened(q)
    ahead = any_ahead(emitter, until)
    # What both branches use is to stand before them.
    shared = [new_positions(emitter, q.meta["val"].shape[1], start(emitter)), emitter.value(until)]
    for value in (k, v):
        emitter.flattened(value)
    dtype = q.meta["val"].dtype
    images = emitter.branch(lambda: _attended(emitter, node, *shared), dtype, rank=3)
    text = emitter.branch(lambda: queries, dtype, rank=3)
    return str(emitter.op("If", ahead, then_branch=images, else_branch=text))


def _attended(emitter: Emitter, node: Node, positions: str, until: str) -> str:
    q, k, v, k_cache, v_cache, *_ = node.args
    mask, (_, tokens, heads, width) = mask_of(node), q.meta["val"].shape
    zero, one = (emitter.constant(np.array([value])) for value in (0, 1))
    first = emitter.op("Unsqueeze", start(emitter), zero)
    rows = _rows_before(emitter, first, mask.window, k_cache.meta["val"].shape[2]) if mask.window else first
    parts = []
    for new, cache in ((k, k_cache), (v, v_cache)):
        before = emitter.op("Slice", emitter.value(cache), zero, rows, emitter.constant(np.array([2])))
        parts.append(emitter.op("Concat", before, _heads_first(emitter, new), axis=2))
    oldest = emitter.op("Squeeze", emitter.op("Sub", first, rows))
    end = emitter.op("Squeeze", emitter.op("Add", first, emitter.size(tokens)))
    keys = emitter.op("Range", oldest, end, emitter.op("Squeeze", one))
    seen_keys = seen(emitter, keys, positions, mask, until)
    sizes: dict[str, Any] = {"heads": int(heads), "key_heads": int(k.meta["val"].shape[2]), "tokens": tokens}
    out = attend_masked(emitter, node, [_heads_first(emitter, q), *parts], seen_keys, **sizes)
    turned = emitter.op("Transpose", out, perm=[0, 2, 1, 3])
    return str(emitter.op("Reshape", turned, emitter.constant(np.array([0, 0, int(heads * width)]))))


def _rows_before(emitter: Emitter, first: str, window: int, slots: Any) -> str:
    """Rows of a windowed cache that hold positions before the new tokens, int64 [1].

    The operator fills its `slots` rows in order. When they are full it drops the oldest `slots - window + 1`, moves the
    others to the front and goes on behind them.
    """
    step = int(slots) - window + 1
    over = emitter.op("Sub", first, emitter.constant(np.array([int(slots) - step + 1])))
    turns = emitter.op(
        "Max", emitter.op("Div", over, emitter.constant(np.array([step]))), emitter.constant(np.array([0]))
    )
    return str(emitter.op("Sub", first, emitter.op("Mul", turns, emitter.constant(np.array([step])))))


def _heads_first(emitter: Emitter, value: Node) -> str:
    """A value [B, T, N, H] as [B, N, T, H]."""
    _, _, heads, width = value.meta["val"].shape
    split = emitter.op("Reshape", emitter.flattened(value), emitter.constant(np.array([0, 0, int(heads), int(width)])))
    return str(emitter.op("Transpose", split, perm=[0, 2, 1, 3]))
