"""The `onnxruntime` dialect: the fastest operators of ONNX Runtime's CPU provider (1.29 and newer).

Local layers use GroupQueryAttention's windowed cache, which keeps its own order of slots in a buffer of the size that
`BoundLocalCaches` gave it. Weights keep their [out, in] layout, so that a tied embedding and head share one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from transom.errors import TargetError
from transom.export.lowering import Table
from transom.export.onnx import experts
from transom.export.onnx.dialect import Dialect
from transom.export.onnx.emitter import Emitter
from transom.export.onnx.encoders import attend_in_blocks
from transom.export.onnx.floats import FLOATS, looked_up
from transom.export.onnx.images import any_ahead, attend_until
from transom.export.onnx.lowerings import INT32, add_bias, cast, start
from transom.export.onnx.offsets import add_to_product, add_to_rows, is_offsets
from transom.export.onnx.rings import RINGS, write_cache
from transom.formats.quantized import block_of, unpack
from transom.formats.schemes import BITS
from transom.graphs import ops
from transom.graphs.masks import mask_of
from transom.graphs.match import arguments, aten, is_call, is_transpose, skip_casts
from transom.graphs.node import Node
from transom.graphs.weight import Weight

MICROSOFT = "com.microsoft"
HEAD_STEP = 8
"""GroupQueryAttention takes heads whose width is a multiple of it, and says so only when it runs."""

# Computes with int8 activations. Without it MatMulNBits falls back to paths that are 200 times slower.
ACCURACY_LEVEL = 4

WIDENED = {"float4_e2m1fn": "int8"}
"""Formats whose codes are written in a wider one, as the provider multiplies by them in no other: the numbers stay."""

TABLE = Table(RINGS)
TABLE.lowers(ops.EXPERTS)(experts.lower)


@TABLE.lowers(aten.linear.default)
def _linear(emitter: Emitter, node: Node) -> str:
    x, weight = node.args[:2]
    product = emitter.op("FusedMatMul", emitter.value(x), emitter.value(weight), domain=MICROSOFT, transB=1)
    return add_bias(emitter, node, product)


@TABLE.lowers(ops.LINEAR_QUANTIZED)
def _linear_quantized(emitter: Emitter, node: Node) -> str:
    x, codes, scales, zeros, format = node.args
    rows, blocks, _ = (int(size) for size in codes.meta["val"].shape)
    block = block_of(codes.meta["val"], format)
    if format in FLOATS and format not in WIDENED:
        weight = looked_up(emitter, codes, scales, format)
        return str(emitter.op("FusedMatMul", emitter.value(x), weight, domain=MICROSOFT, transB=1))
    if format in WIDENED:
        integers, halves, _ = _parts(emitter, codes)
        weights = [
            emitter.initializer(f"{codes.name}.integers", integers),
            emitter.initializer(f"{scales.name}.halves", halves),
        ]
    else:
        parts = [codes, scales, *([] if zeros is None or is_offsets(zeros) else [zeros])]
        weights = [emitter.value(part) for part in parts]
    product = emitter.op(
        "MatMulNBits",
        emitter.value(x),
        *weights,
        domain=MICROSOFT,
        K=blocks * block,
        N=rows,
        bits=BITS[WIDENED.get(format, format)],
        block_size=block,
        accuracy_level=ACCURACY_LEVEL,
    )
    return add_to_product(emitter, product, x, codes, zeros)


@TABLE.lowers(ops.EMBEDDING_QUANTIZED)
def _embedding_quantized(emitter: Emitter, node: Node) -> str:
    tokens, codes, scales, zeros, format = node.args
    if format in FLOATS:
        return looked_up(emitter, codes, scales, format, rows=tokens)
    _, blocks, _ = (int(size) for size in codes.meta["val"].shape)
    block = block_of(codes.meta["val"], format)
    # With a third axis, one buffer serves this operator and MatMulNBits.
    unsqueezed = emitter.op("Unsqueeze", emitter.value(scales), emitter.constant(np.array([2])))
    gathered = emitter.op(
        "GatherBlockQuantized",
        emitter.value(codes),
        emitter.value(tokens),
        unsqueezed,
        _lookup_zero_points(emitter, codes, None if is_offsets(zeros) else zeros, format),
        domain=MICROSOFT,
        bits=BITS[format],
        block_size=block,
        gather_axis=0,
        quantize_axis=2,
    )
    rows = add_to_rows(emitter, gathered, tokens, zeros)
    return str(emitter.op("Reshape", rows, emitter.constant(np.array([0, 0, blocks * block]))))


def _lookup_zero_points(emitter: Emitter, codes: Node, zero_points: Node | None, format: str) -> str:
    """Zero points of GatherBlockQuantized, uint8 [R, G, 1]: a byte for each, of which 4 bits fill the low half.

    Also where they are the middle code: left out, they are that on the CPU and 0 on some versions' GPUs.
    """
    rows, blocks, _ = (int(size) for size in codes.meta["val"].shape)
    table = emitter.graph.weight_of(codes)
    assert table is not None, f"{codes} is no weight"
    if zero_points is None:
        middle = torch.full((blocks, 1), 2 ** (BITS[format] - 1), dtype=torch.uint8)
        weight = Weight(
            shape=(rows, blocks, 1),
            dtype=torch.uint8,
            read_rows=lambda start, stop: middle.expand(stop - start, -1, -1),
            origin=table[1].origin,
        )
    else:
        stored = emitter.graph.weight_of(zero_points)
        assert stored is not None, f"{zero_points} is no weight"
        weight = stored[1].map_rows(lambda part: unpack(part, format, blocks)[..., None], row_shape=(blocks, 1))
    return emitter.initializer(f"{table[0]}.lookup_zero_points", weight)


@TABLE.lowers(ops.EXPERTS_QUANTIZED)
def _experts_quantized(emitter: Emitter, node: Node) -> str:
    """QMoE (1.32 and newer), where it does what is asked for; a loop elsewhere.

    It multiplies by the codes as they are, takes gates and ups by turns, and passes over weights that are not positive.
    """
    x, choices, weights, *parts = node.args
    (gate_up, down), biases, activation = (parts[:4], parts[4:8]), parts[8:10], parts[10]
    swiglu = {ops.CLAMPED_SWIGLU: (ops.SWIGLU_SLOPE, 1.0), "silu": (1.0, 0.0)}.get(activation)
    blocks = {block_of(codes.meta["val"], format) for codes, _, _, format in (gate_up, down)}
    formats = [WIDENED.get(format, format) for _, _, _, format in (gate_up, down)]
    integers = all(format in ("int4", "int8") for format in formats) and not (
        is_offsets(gate_up[2]) or is_offsets(down[2])
    )
    if not (swiglu and integers and len(blocks) == 1 and is_call(skip_casts(weights), aten.softmax.int)):
        return experts.lower_quantized(emitter, node)
    rows, chosen, shares = experts.rows_of(emitter, (x, choices, weights))
    count = int(down[0].meta["val"].shape[0]) // int(x.meta["val"].shape[-1])
    hidden = int(gate_up[0].meta["val"].shape[0]) // (2 * count)
    by_turns = tuple(half + index for index in range(hidden) for half in (0, hidden))
    token_count = emitter.op("Shape", rows, start=0, end=1)
    none = emitter.op("ConstantOfShape", emitter.op("Concat", token_count, emitter.constant(np.array([count])), axis=0))
    ones = emitter.op("Add", emitter.op("Sub", shares, shares), emitter.constant(np.array(1, np.float32)))
    tables = [emitter.op("ScatterElements", none, chosen, value, axis=1) for value in (ones, shares)]
    first, second = (
        _stacked(emitter, matrix, bias, count, order)
        for matrix, bias, order in zip((gate_up, down), biases, (by_turns, None), strict=True)
    )
    limit: dict[str, Any] = {"swiglu_limit": ops.SWIGLU_LIMIT} if activation == ops.CLAMPED_SWIGLU else {}
    total = emitter.op(
        "QMoE",
        *(rows, tables[0], *first[:3], *second[:3], "", "", "", first[3], second[3], "", tables[1]),
        domain=MICROSOFT,
        k=int(choices.meta["val"].shape[-1]),
        activation_type="swiglu",
        activation_alpha=swiglu[0],
        activation_beta=swiglu[1],
        swiglu_fusion=1,
        expert_weight_bits=BITS[formats[0]],
        fc2_expert_weight_bits=BITS[formats[1]],
        block_size=blocks.pop(),
        weights_prepacked=0,
        accuracy_level=ACCURACY_LEVEL,
        **limit,
    )
    return str(emitter.op("Reshape", total, emitter.op("Shape", emitter.value(x))))


def _stacked(
    emitter: Emitter,
    matrix: Sequence[Node],
    bias: Node | None,
    count: int,
    order: tuple[int, ...] | None,
) -> list[str]:
    """Codes [E, R, bytes], scales, biases and zero points of all experts, each one's rows in an order."""
    nodes = [*matrix[:2], bias, matrix[2]]
    codes, scales, zeros = _parts(emitter, nodes[0], order)
    codes = codes.map_rows(lambda rows: rows.flatten(1), row_shape=(codes.shape[1] * codes.shape[2],))
    weights, names = [codes, scales, None, zeros], list[str]()
    for node, weight in zip(nodes, weights, strict=True):
        named = emitter.graph.weight_of(node)
        if named is None:
            names.append("")
            continue
        if node is bias:
            weight = named[1].reorder_rows(order) if order else named[1]
        assert weight is not None
        names.append(emitter.initializer(f"{named[0]}.stacked", weight, stacked=count))
    return names


def _parts(emitter: Emitter, codes: Node, order: tuple[int, ...] | None = None) -> tuple[Weight, Weight, Weight | None]:
    """Codes as the provider's products take them, scales and zero points, rows in an order."""
    named_codes = emitter.graph.weight_of(codes)
    assert named_codes is not None and named_codes[1].part_of is not None, f"{codes} are no codes"
    encoded = named_codes[1].part_of
    if encoded.format in WIDENED:
        encoded = encoded.as_integers()
    return Weight.parts_of(encoded.reorder_rows(order) if order else encoded, named_codes[1].origin)


@TABLE.lowers(ops.RMS_NORM)
def _rms_norm(emitter: Emitter, node: Node) -> str:
    x, weight, eps = node.args
    return str(
        emitter.op(
            "SimplifiedLayerNormalization", emitter.value(x), emitter.value(weight), axis=-1, epsilon=eps, stash_type=1
        )
    )


@TABLE.lowers(ops.ADD_RMS_NORM)
def _add_rms_norm(emitter: Emitter, node: Node) -> list[str]:
    x, residual, weight, eps = node.args
    inputs = [emitter.value(value) for value in (x, residual, weight)]
    names = emitter.op("SkipSimplifiedLayerNormalization", *inputs, domain=MICROSOFT, outputs=4, epsilon=eps)
    return [names[0], names[3]]


@TABLE.lowers(ops.ATTEND)
def _attend(emitter: Emitter, node: Node) -> None:
    """GroupQueryAttention, which writes both caches too.

    It sees no later key. Where an image's tokens see each other, a branch attends in its place, and takes its turn
    first, as its result is what the operator gets for queries: by then the caches are as they were.
    """
    q, k, v, k_cache, v_cache = node.args[:5]
    given = arguments(node)
    scale, window, softcap, until, sinks = (given[name] for name in ("scale", "window", "softcap", "until", "sinks_N"))
    batch, tokens, heads, width = q.meta["val"].shape
    if int(width) % HEAD_STEP:
        raise TargetError(
            f"the target 'onnxruntime' takes heads whose width is a multiple of {HEAD_STEP}, not {width}: choose 'onnx'"
        )
    if (value_width := int(v.meta["val"].shape[3])) != int(width):
        raise TargetError(
            f"the target 'onnxruntime' takes values as wide as keys, not {value_width} where keys have {width}: choose "
            "'onnx'"
        )
    if not mask_of(node).is_window:
        raise TargetError("GroupQueryAttention knows windows only: a cache with another mask is to be written first")
    options: dict[str, Any] = {"local_window_size": window, "sliding_window_cache": 1} if window else {}
    options |= {"softcap": softcap} if softcap else {}
    queries, *new = (emitter.flattened(value) for value in (q, k, v))
    if until is not None:
        queries = attend_until(emitter, node)
    out, k_out, v_out = emitter.op(
        "GroupQueryAttention",
        queries,
        *new,
        emitter.value(k_cache),
        emitter.value(v_cache),
        _last_positions(emitter, batch, tokens),
        _total_length(emitter, tokens),
        *_sinks(emitter, sinks, q.meta["val"].dtype),
        domain=MICROSOFT,
        outputs=3,
        num_heads=int(heads),
        kv_num_heads=int(k.meta["val"].shape[2]),
        scale=scale,
        **options,
    )
    emitter.flat[node] = out if until is None else emitter.op("Where", any_ahead(emitter, until), queries, out)
    emitter.written |= {(k_cache, k): k_out, (v_cache, v): v_out}


def _sinks(emitter: Emitter, sinks: Node | None, dtype: torch.dtype) -> list[str]:
    """The last of the operator's inputs that are given; those between are rotations, positions and a bias."""
    return [] if sinks is None else [*[""] * 4, cast(emitter, emitter.value(sinks), sinks.meta["val"].dtype, dtype)]


@TABLE.replaces(ops.FULL_ATTENTION)
def _full_attention(emitter: Emitter, node: Node) -> str:
    """MultiHeadAttention, which holds no scores of all queries at once."""
    q, k, v = node.args
    if int(q.meta["val"].shape[1]) != int(k.meta["val"].shape[1]):
        return attend_in_blocks(emitter, node)
    queries, keys, values = (_tokens_first(emitter, value) for value in (q, k, v))
    heads, width = int(q.meta["val"].shape[1]), int(v.meta["val"].shape[3])
    out = emitter.op(
        "MultiHeadAttention",
        queries,
        keys,
        values,
        domain=MICROSOFT,
        num_heads=heads,
        scale=node.kwargs["scale"],
    )
    split = emitter.op("Reshape", out, emitter.constant(np.array([0, 0, heads, width])))
    return str(emitter.op("Transpose", split, perm=[0, 2, 1, 3]))


@TABLE.lowers(ops.WRITE_CACHE)
def _write_cache(emitter: Emitter, node: Node) -> str:
    """What GroupQueryAttention returned; standard operators where several layers read the cache."""
    cache, new, _ = node.args
    return emitter.written.get((cache, new)) or write_cache(emitter, node)


def _tokens_first(emitter: Emitter, value: Node) -> str:
    """A value [B, N, T, H] as [B, T, N * H]."""
    if is_transpose(value, 1, 2):
        return emitter.flattened(value.args[0])
    turned = emitter.op("Transpose", emitter.value(value), perm=[0, 2, 1, 3])
    width = int(value.meta["val"].shape[1] * value.meta["val"].shape[3])
    return str(emitter.op("Reshape", turned, emitter.constant(np.array([0, 0, width]))))


def _total_length(emitter: Emitter, tokens: Any) -> str:
    """Positions so far, the new ones included: int32 [1]."""

    def make() -> str:
        total = emitter.op("Add", start(emitter), emitter.size(tokens))
        return str(emitter.op("Cast", total, to=INT32))

    return str(emitter.once("total_length", make))


def _last_positions(emitter: Emitter, batch: Any, tokens: Any) -> str:
    """Position of the last new token of every row, int32 [B]."""

    def make() -> str:
        last = emitter.op("Sub", _total_length(emitter, tokens), emitter.constant(np.array([1], np.int32)))
        return str(emitter.op("Expand", last, emitter.size(batch)))

    return str(emitter.once("last_positions", make))


DIALECT = Dialect(name="onnxruntime", opset=23, ir_version=11, domains={MICROSOFT: 1}, lowerings=TABLE)
