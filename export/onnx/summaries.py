"""What keeps a summary in place of positions, in standard operators.

A runtime may give a summary's input and output one memory. So an input is read once, by the `Where` that takes it for
zeros at position 0, and all else follows from that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from transom.export.lowering import Table
from transom.export.onnx.emitter import Emitter
from transom.export.onnx.lowerings import SHARED, cast, start
from transom.graphs import ops
from transom.graphs.node import Node

SUMMARIES = Table(SHARED)

_END = np.array([2**31 - 1])


@SUMMARIES.lowers(ops.CAUSAL_CONVOLUTION)
def _causal_convolution(emitter: Emitter, node: Node) -> list[str]:
    x, before, _, weight, bias = node.args
    channels, _, taps = (int(size) for size in weight.meta["val"].shape)
    dtype, tokens = x.meta["val"].dtype, emitter.size(x.meta["val"].shape[1])
    rows = emitter.op("Concat", _kept(emitter, before), emitter.value(x), axis=1)
    after = emitter.op("Slice", rows, *map(emitter.constant, (np.array([1 - taps]), _END, np.array([1]))))
    wide = cast(emitter, rows, dtype, torch.float32)
    factors = emitter.op("Reshape", _wide(emitter, weight), emitter.constant(np.array([channels, taps])))
    factors = emitter.op("Split", factors, emitter.constant(np.ones(taps, np.int64)), outputs=taps, axis=1)
    total = ""
    for tap, factor in enumerate(factors):
        first = emitter.constant(np.array([tap]))
        seen = emitter.op("Slice", wide, first, emitter.op("Add", first, tokens), emitter.constant(np.array([1])))
        product = emitter.op("Mul", seen, emitter.op("Reshape", factor, emitter.constant(np.array([channels]))))
        total = emitter.op("Add", total, product) if total else product
    if bias is not None:
        total = emitter.op("Add", total, _wide(emitter, bias))
    return [cast(emitter, total, torch.float32, dtype), after]


@SUMMARIES.lowers(ops.STATE_SPACE)
def _state_space(emitter: Emitter, node: Node) -> list[str]:
    """All tokens of a call as one piece: its work grows with their square."""
    x, steps, rates, keys, queries, skip, state, _ = node.args
    heads, groups = int(x.meta["val"].shape[2]), int(keys.meta["val"].shape[2])
    later, causal = _order(emitter, x.meta["val"].shape[1])
    zero, axis, last = (emitter.constant(np.array(value)) for value in (np.float32(0), 2, [-1]))

    def column(value: str) -> str:
        """[..., T] as [..., T, 1]."""
        return str(emitter.op("Unsqueeze", value, last))

    def last_token(value: str) -> str:
        """[B, N, T, ...] as [B, N, 1, ...]."""
        return str(emitter.op("Slice", value, *map(emitter.constant, (np.array([-1]), _END, np.array([2])))))

    x_BNTH = emitter.op("Transpose", _wide(emitter, x), perm=[0, 2, 1, 3])
    steps_BNT = emitter.op("Transpose", _wide(emitter, steps), perm=[0, 2, 1])
    keys_BNTZ = _by_head(emitter, _wide(emitter, keys), heads, groups)
    queries_BNTZ = _by_head(emitter, _wide(emitter, queries), heads, groups)
    rates_N1 = column(emitter.op("Neg", emitter.op("Exp", _wide(emitter, rates))))
    logs_BNT = emitter.op("Mul", steps_BNT, rates_N1)
    between = emitter.op("CumSum", emitter.op("Where", later, column(logs_BNT), zero), axis)
    decays = emitter.op("Where", causal, emitter.op("Exp", between), zero)
    reached = column(emitter.op("Exp", emitter.op("CumSum", logs_BNT, axis)))
    before = _kept(emitter, state)
    inputs = emitter.op("Mul", x_BNTH, column(steps_BNT))
    scores = emitter.op("MatMul", queries_BNTZ, emitter.op("Transpose", keys_BNTZ, perm=[0, 1, 3, 2]))
    y = emitter.op("MatMul", emitter.op("Mul", scores, decays), inputs)
    read = emitter.op("MatMul", queries_BNTZ, emitter.op("Transpose", before, perm=[0, 1, 3, 2]))
    y = emitter.op("Add", y, emitter.op("Mul", reached, read))
    y = emitter.op("Add", y, emitter.op("Mul", column(column(_wide(emitter, skip))), x_BNTH))
    left = emitter.op("Transpose", last_token(decays), perm=[0, 1, 3, 2])
    added = emitter.op("Transpose", emitter.op("Mul", inputs, left), perm=[0, 1, 3, 2])
    after = emitter.op("Mul", last_token(reached), before)
    after = emitter.op("Add", after, emitter.op("MatMul", added, keys_BNTZ))
    y = emitter.op("Transpose", y, perm=[0, 2, 1, 3])
    return [cast(emitter, y, torch.float32, node.meta["val"][0].dtype), after]


@SUMMARIES.lowers(ops.TOKEN_SHIFT)
def _token_shift(emitter: Emitter, node: Node) -> list[str]:
    x, before, _ = node.args
    rows = emitter.op("Concat", _kept(emitter, before), emitter.value(x), axis=1)
    first, last, axis = (emitter.constant(np.array([value])) for value in (0, -1, 1))
    return [emitter.op("Slice", rows, first, last, axis), emitter.op("Slice", rows, last, emitter.constant(_END), axis)]


@SUMMARIES.lowers(ops.DELTA_RULE)
def _delta_rule(emitter: Emitter, node: Node) -> list[str]:
    """Token by token."""
    queries, logs, keys, values, removals, rates, state, _ = node.args
    column, row = (emitter.constant(np.array([axis])) for axis in (-1, -2))

    def spread(value: str, axis: str) -> str:
        return str(emitter.op("Unsqueeze", value, axis))

    removal = _wide(emitter, removals)
    length = emitter.op("ReduceL2", removal, column, keepdims=1)
    removal = emitter.op("Div", removal, emitter.op("Max", length, emitter.number(ops.LEAST_NORM, torch.float32)))
    negative = emitter.op("Neg", emitter.op("Mul", removal, _wide(emitter, rates)))
    rows = (
        spread(_wide(emitter, queries), column),
        spread(emitter.op("Exp", _wide(emitter, logs)), row),
        spread(removal, column),
        spread(_wide(emitter, values), column),
        emitter.op("Concat", spread(_wide(emitter, keys), row), spread(negative, row), axis=-2),
    )

    def step(before: str, query: str, decay: str, removal: str, value: str, places: str) -> tuple[str, str]:
        put = emitter.op("Concat", value, emitter.op("MatMul", before, removal), axis=-1)
        after = emitter.op("Add", emitter.op("Mul", before, decay), emitter.op("MatMul", put, places))
        return after, emitter.op("MatMul", after, query)

    after, y = emitter.scan(_kept(emitter, state), rows, step, axis=1, rank=4)
    y = emitter.op("Squeeze", y, column)
    return [cast(emitter, y, torch.float32, node.meta["val"][0].dtype), after]


@SUMMARIES.lowers(torch.ops.aten.softplus.default)
def _softplus(emitter: Emitter, node: Node) -> str:
    return str(emitter.op("Softplus", emitter.value(node.args[0])))


def _wide(emitter: Emitter, node: Node) -> str:
    return cast(emitter, emitter.value(node), node.meta["val"].dtype, torch.float32)


def _kept(emitter: Emitter, state: Node) -> str:
    """A summary as a call finds it: zeros at position 0, whatever stands there."""
    dtype = state.meta["val"].dtype
    is_first = emitter.once("is_first", lambda: emitter.op("Equal", start(emitter), emitter.constant(np.array(0))))
    return str(emitter.op("Where", is_first, emitter.number(0, dtype), emitter.value(state)))


def _order(emitter: Emitter, tokens: Any) -> tuple[str, str]:
    """Which of two tokens comes after the other, and which not before it, bool [T, T] each."""

    def make() -> tuple[str, str]:
        count = emitter.op("Squeeze", emitter.size(tokens))
        places = emitter.op("Range", emitter.constant(np.array(0)), count, emitter.constant(np.array(1)))
        rows = emitter.op("Unsqueeze", places, emitter.constant(np.array([1])))
        return emitter.op("Greater", rows, places), emitter.op("GreaterOrEqual", rows, places)

    pair: tuple[str, str] = emitter.once(("order", str(tokens)), make)
    return pair


def _by_head(emitter: Emitter, value: str, heads: int, groups: int) -> str:
    """[B, T, G, Z] as [B, N, T, Z]; of one group as [B, 1, T, Z], which stands for all heads."""
    turned = emitter.op("Transpose", value, perm=[0, 2, 1, 3])
    if groups in (1, heads):
        return str(turned)
    return str(emitter.op("Gather", turned, emitter.constant(np.arange(heads) // (heads // groups)), axis=1))
