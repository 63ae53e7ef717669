"""Mixtures of experts in standard ONNX: a loop over the experts that some token chose.

A step gathers one expert's matrices, as codes where they are quantised, and the tokens that chose it. So it reads and
computes what is needed and no more, for one token as for many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from transom.export.onnx.emitter import Emitter
from transom.export.onnx.floats import FLOATS
from transom.export.onnx.lowerings import INT32, gated
from transom.export.onnx.offsets import is_offsets
from transom.formats.quantized import block_of, unpack
from transom.formats.schemes import BITS
from transom.graphs.node import Node


def lower(emitter: Emitter, node: Node) -> str:
    """Lower `ops.EXPERTS`."""
    x, choices, weights, gate_up, down, *rest = node.args
    return chosen(emitter, (x, choices, weights), [gate_up], [down], *rest)


def lower_quantized(emitter: Emitter, node: Node) -> str:
    """Lower `ops.EXPERTS_QUANTIZED`."""
    return chosen(emitter, node.args[:3], node.args[3:7], node.args[7:11], *node.args[11:])


def rows_of(emitter: Emitter, values: Sequence[Node]) -> list[str]:
    """Values [B, T, n] as [M, n], M tokens of all rows."""
    return [
        emitter.op("Reshape", emitter.value(value), emitter.constant(np.array([-1, int(value.meta["val"].shape[-1])])))
        for value in values
    ]


def chosen(
    emitter: Emitter,
    tokens: Sequence[Node],
    gate_up: Sequence[Any],
    down: Sequence[Any],
    gate_up_bias: Node | None,
    down_bias: Node | None,
    activation: str,
) -> str:
    """The sum over chosen experts.

    Args:
        emitter: Of the export.
        tokens: Activations, choices and their weights.
        gate_up: A matrix [E * 2 F, D], or its codes, scales, zeros and format.
        down: The same of [E * D, F].
        gate_up_bias: See `ops.experts`.
        down_bias: See `ops.experts`.
        activation: See `ops.experts`.
    """
    x = tokens[0]
    width = int(x.meta["val"].shape[-1])
    count = int(down[0].meta["val"].shape[0]) // width
    hidden = int(gate_up[0].meta["val"].shape[0]) // (2 * count)
    flat, choices, shares = rows_of(emitter, tokens)
    experts = emitter.op("Unique", choices, sorted=1)
    axis = emitter.constant(np.array([1]))

    def step(number: str, total: str) -> str:
        expert = emitter.op("Gather", experts, number)
        # Rows: the tokens, and which of their choices it was.
        places = emitter.op("NonZero", emitter.op("Equal", choices, expert))
        rows = emitter.op("Gather", places, emitter.constant(np.array(0)))
        share = emitter.op("GatherND", shares, emitter.op("Transpose", places, perm=[1, 0]))
        value = emitter.op("Gather", flat, rows)
        for matrix, bias in ((gate_up, gate_up_bias), (down, down_bias)):
            parts = [value, _matrix(emitter, expert, count, *matrix)]
            parts += [] if bias is None else [_gathered(emitter, expert, count, bias)]
            value = emitter.op("Gemm", *parts, transB=1)
            if matrix is gate_up:
                value = gated(emitter, value, hidden, activation, torch.float32)
        value = emitter.op("Mul", value, emitter.op("Unsqueeze", share, axis))
        return str(emitter.op("ScatterND", total, emitter.op("Unsqueeze", rows, axis), value, reduction="add"))

    zeros = emitter.op("ConstantOfShape", emitter.op("Shape", flat))
    steps = emitter.op("Squeeze", emitter.op("Shape", experts))
    total = emitter.loop(steps, zeros, step, torch.empty(0, 0))
    return str(emitter.op("Reshape", total, emitter.op("Shape", emitter.value(x))))


def _gathered(emitter: Emitter, expert: str, count: int, weight: Node) -> str:
    """One expert's rows of a weight."""
    named_weight = emitter.graph.weight_of(weight)
    assert named_weight is not None, f"{weight} is no weight"
    name, recipe = named_weight
    if recipe.dtype == torch.float8_e4m3fn:
        recipe = recipe.map_rows(lambda part: part.view(torch.uint8), dtype=torch.uint8)
    return str(emitter.op("Gather", emitter.initializer(f"{name}.stacked", recipe, stacked=count), expert))


def _matrix(
    emitter: Emitter,
    expert: str,
    count: int,
    weight: Node,
    scales: Node | None = None,
    zeros: Node | None = None,
    format: str = "",
) -> str:
    """One expert's matrix [R, K], float32."""
    gathered = _gathered(emitter, expert, count, weight)
    if scales is None:
        return gathered
    rows, blocks, block = int(weight.meta["val"].shape[0]) // count, int(weight.meta["val"].shape[1]), 0
    block = block_of(weight.meta["val"], format)
    has_points = zeros is not None and not is_offsets(zeros)
    values = _looked_up(emitter, gathered, format, [rows, blocks, block], centred=not has_points)
    last = emitter.constant(np.array([-1]))
    if has_points:
        points = _gathered(emitter, expert, count, zeros)
        padded = _looked_up(emitter, points, format, [rows, -1], centred=False)
        bounds = [emitter.constant(np.array([number])) for number in (0, blocks, 1)]
        values = emitter.op("Sub", values, emitter.op("Unsqueeze", emitter.op("Slice", padded, *bounds), last))
    values = emitter.op("Mul", values, emitter.op("Unsqueeze", _gathered(emitter, expert, count, scales), last))
    if zeros is not None and not has_points:
        values = emitter.op("Add", values, emitter.op("Unsqueeze", _gathered(emitter, expert, count, zeros), last))
    return str(emitter.op("Reshape", values, emitter.constant(np.array([rows, blocks * block]))))


def _looked_up(emitter: Emitter, codes: str, format: str, shape: list[int], *, centred: bool) -> str:
    """What packed codes are, float32 of a shape: numbers, or integers around zero if `centred`."""
    table = FLOATS.get(format)
    if table is None:
        every = torch.arange(256, dtype=torch.int16).to(torch.uint8)[:, None]
        table = unpack(every, format, 8 // BITS[format]).float() - (2 ** (BITS[format] - 1) if centred else 0)
    indices = emitter.op("Cast", codes, to=INT32)
    values = emitter.op("Gather", emitter.constant(table.squeeze(-1).numpy()), indices)
    return str(emitter.op("Reshape", values, emitter.constant(np.array(shape))))
