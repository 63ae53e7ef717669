"""Attention over keys and a mask: the standard operator, or plain ones where scores are capped or sinks take part.

Standard Attention has no sinks. Its soft cap once stood behind the mask, so that runtimes differ; TensorRT takes none;
and ONNX Runtime 1.32 needs 1.8 times the plain operators' time for it (128 tokens over 4,096 slots).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from transom.export.onnx.emitter import Emitter
from transom.export.onnx.lowerings import cast
from transom.graphs.match import arguments
from transom.graphs.node import Node


def attend_masked(
    emitter: Emitter, node: Node, tensors: Sequence[str], mask: str, *, heads: int, key_heads: int, tokens: Any
) -> str:
    """What a call of `ops.ATTENTION` or `ops.ATTEND` attends to, [B, N, T, H].

    Args:
        emitter: Of the export.
        node: The call: its scale, its cap, its sinks.
        tensors: Queries [B, N, T, H], keys [B, K, S, H] and values [B, K, S, H].
        mask: Which keys each query sees, bool [T, S] or [1, 1, T, S].
        heads: N.
        key_heads: K.
        tokens: T as the graph knows it.
    """
    given = arguments(node)
    scale, cap, sinks = (given[name] for name in ("scale", "softcap", "sinks_N"))
    if not cap and sinks is None:
        return str(emitter.op("Attention", *tensors, mask, scale=scale, is_causal=0))
    q, k, v = tensors
    batch, narrow, wide = node.meta["val"].shape[0], node.meta["val"].dtype, torch.float32
    # Before the product, which float16 may not hold unscaled. Heads that share keys are rows of one product.
    scaled = emitter.op("Mul", q, emitter.number(scale, narrow))
    grouped = emitter.op("Reshape", scaled, emitter.constant(np.array([0, key_heads, -1, 0])))
    product = emitter.op("MatMul", grouped, emitter.op("Transpose", k, perm=[0, 1, 3, 2]))
    ungrouped = emitter.constant(np.array([0, heads, -1, 0]))
    scores = cast(emitter, emitter.op("Reshape", product, ungrouped), narrow, wide)
    if cap:
        bounded = emitter.op("Tanh", emitter.op("Mul", scores, emitter.number(1 / cap, wide)))
        scores = emitter.op("Mul", bounded, emitter.number(cap, wide))
    # Finite, so that a row without keys gives no NaN.
    scores = emitter.op("Where", mask, scores, emitter.number(torch.finfo(wide).min, wide))
    if sinks is not None:
        column = emitter.op("Reshape", emitter.value(sinks), emitter.constant(np.array([1, heads, 1, 1])))
        sizes = [emitter.size(size) for size in (batch, heads, tokens, 1)]
        column = cast(emitter, column, sinks.meta["val"].dtype, wide)
        scores = emitter.op(
            "Concat", scores, emitter.op("Expand", column, emitter.op("Concat", *sizes, axis=0)), axis=3
        )
    weights = emitter.op("Softmax", scores, axis=-1)
    if sinks is not None:
        cut = [emitter.constant(np.array([index])) for index in (0, -1, 3)]
        weights = emitter.op("Slice", weights, *cut)
    grouped = emitter.op("Reshape", weights, emitter.constant(np.array([0, key_heads, -1, 0])))
    values = emitter.op("MatMul", cast(emitter, grouped, wide, narrow), v)
    return str(emitter.op("Reshape", values, ungrouped))
