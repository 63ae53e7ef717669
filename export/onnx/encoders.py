"""Lowerings that encoders of images need, and the few that put soft tokens among the tokens of text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from transom.export.lowering import Table
from transom.export.onnx.emitter import Emitter
from transom.export.onnx.summaries import SUMMARIES
from transom.graphs import ops
from transom.graphs.match import aten
from transom.graphs.node import Node

ENCODERS = Table(SUMMARIES)


@ENCODERS.lowers(aten.permute.default)
def _permute(emitter: Emitter, node: Node) -> str:
    return str(emitter.op("Transpose", emitter.value(node.args[0]), perm=[int(axis) for axis in node.args[1]]))


def _reduced(kind: str) -> Any:
    def lower(emitter: Emitter, node: Node) -> str:
        x, axes, *keep = node.args
        return str(emitter.op(kind, emitter.value(x), emitter.constant(np.array(axes)), keepdims=int(any(keep))))

    return lower


ENCODERS.lowers(aten.mean.dim)(_reduced("ReduceMean"))
ENCODERS.lowers(aten.sum.dim_IntList)(_reduced("ReduceSum"))


@ENCODERS.lowers(aten.matmul.default)
def _matmul(emitter: Emitter, node: Node) -> str:
    return str(emitter.op("MatMul", *(emitter.value(value) for value in node.args)))


@ENCODERS.lowers(aten.clamp.default)
def _clamp(emitter: Emitter, node: Node) -> str:
    x, *bounds = node.args
    named = dict(zip(("min", "max"), bounds, strict=False)) | node.kwargs
    dtype = node.meta["val"].dtype
    limits = [emitter.number(named[name], dtype) if named.get(name) is not None else "" for name in ("min", "max")]
    return str(emitter.op("Clip", emitter.value(x), *limits))


@ENCODERS.lowers(aten.lt.Scalar)
def _less(emitter: Emitter, node: Node) -> str:
    x, limit = node.args
    return str(emitter.op("Less", emitter.value(x), emitter.number(limit, x.meta["val"].dtype)))


@ENCODERS.lowers(aten.where.self)
def _where(emitter: Emitter, node: Node) -> str:
    return str(emitter.op("Where", *(emitter.value(value) for value in node.args)))


@ENCODERS.lowers(ops.FULL_ATTENTION)
def _full_attention(emitter: Emitter, node: Node) -> str:
    return attend_in_blocks(emitter, node)


LARGEST_SCORES = 2**24
"""Scores of one block of queries: 64 MB in float32."""


def attend_in_blocks(emitter: Emitter, node: Node) -> str:
    """Standard Attention holds all scores at once, so queries of a fixed number are given to it in blocks."""
    q, k, v = node.args
    keys, values, scale = emitter.value(k), emitter.value(v), node.kwargs["scale"]
    _, heads, tokens, _ = q.meta["val"].shape
    blocks = 1
    if isinstance(tokens, int):
        blocks = min(tokens, math.ceil(int(heads) * tokens * int(k.meta["val"].shape[2]) / LARGEST_SCORES))
    if blocks == 1:
        return str(emitter.op("Attention", emitter.value(q), keys, values, scale=scale, is_causal=0))
    sizes = [len(block) for block in torch.arange(tokens).tensor_split(blocks)]
    queries = emitter.op("Split", emitter.value(q), emitter.constant(np.array(sizes)), axis=2, outputs=blocks)
    parts = [emitter.op("Attention", block, keys, values, scale=scale, is_causal=0) for block in queries]
    return str(emitter.op("Concat", *parts, axis=2))
