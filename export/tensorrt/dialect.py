"""The `tensorrt` dialect: what TensorRT 10.15 and newer and TensorRT for RTX take of opset 24, strongly typed.

Everything has one dtype, float16 or bfloat16, but for what the model itself computes in float32: norms, rotations and
positions. Caches are static and written in place. A local cache is a ring whose writes never cross its end: TensorRT
has no circular TensorScatter, so a session cuts chunks there. No image may be cut, so a model that takes images is
told where to write, and which position each slot holds: see `backends.tensorrt.rings`. The masks are built once and
shared by all layers of a kind, as Attention has no window there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from transom.backends.tensorrt.rings import SLOT_POSITIONS, WRITE_SLOT
from transom.errors import QuantizationError, UnsupportedOpsError
from transom.export.lowering import Table
from transom.export.onnx.attention import attend_masked
from transom.export.onnx.blocked import Blocked
from transom.export.onnx.dialect import Dialect
from transom.export.onnx.emitter import Emitter
from transom.export.onnx.encoders import ENCODERS
from transom.export.onnx.lowerings import add_bias, cast, gated, new_positions, start
from transom.export.onnx.rings import narrowed, seen
from transom.formats.quantized import block_of
from transom.graphs import ops
from transom.graphs.masks import mask_of
from transom.graphs.match import arguments, aten, layer_path
from transom.graphs.node import Node
from transom.graphs.weight import Weight

TABLE = Table(ENCODERS)


@TABLE.lowers(ops.RMS_NORM)
def _rms_norm(emitter: Emitter, node: Node) -> str:
    x, weight, eps = node.args
    wide = cast(emitter, emitter.value(x), x.meta["val"].dtype, torch.float32)
    scale = cast(emitter, emitter.value(weight), weight.meta["val"].dtype, torch.float32)
    normed = emitter.op("RMSNormalization", wide, scale, axis=-1, epsilon=eps)
    return cast(emitter, normed, torch.float32, node.meta["val"].dtype)


@TABLE.lowers(aten.linear.default)
def _linear(emitter: Emitter, node: Node) -> str:
    x, table = node.args[:2]
    named_weight = emitter.graph.weight_of(table)
    if named_weight is None or len(table.users) > 1:
        # A table that an embedding reads too keeps its layout.
        matrix = emitter.op("Transpose", emitter.value(table), perm=[1, 0])
    else:
        name, weight = named_weight
        matrix = emitter.initializer(f"{name}.transposed", weight, transposed=True)
    return add_bias(emitter, node, emitter.op("MatMul", emitter.value(x), matrix))


@TABLE.lowers(ops.LINEAR_QUANTIZED)
def _linear_quantized(emitter: Emitter, node: Node) -> str:
    x, codes = node.args[:2]
    if len(codes.users) > 1:
        matrix = emitter.op("Transpose", _table(emitter, *node.args[1:]), perm=[1, 0])
        return _product(emitter, x, matrix, _table_dtype(emitter, codes))
    dtype = _scale_dtype(emitter, x.meta["val"].dtype)
    return _product(emitter, x, _dequantized(emitter, node.args[1:], dtype), dtype)


def _dequantized(emitter: Emitter, parts: Sequence[Any], dtype: torch.dtype) -> str:
    """A matrix [N, K] of codes as numbers [K, N], in the dtype of its scales."""
    codes, scales, _, format = parts
    if format != "float8_e4m3fn":
        blocked = Blocked(emitter, parts, lambda part: _scales(part, dtype))
        return str(emitter.op("DequantizeLinear", *blocked.inputs(), axis=0, block_size=blocked.block))
    name, weight = _named_weight(emitter, codes)
    inputs = [
        emitter.initializer(f"{name}.transposed", _bytes(weight), TensorProto.FLOAT8E4M3FN, transposed=True),
        _row_scales(emitter, scales, dtype),
    ]
    return str(emitter.op("DequantizeLinear", *inputs, axis=1))


@TABLE.lowers(ops.EXPERTS)
def _experts(emitter: Emitter, node: Node) -> str:
    matrices = []
    for matrix in node.args[3:5]:
        name, weight = _named_weight(emitter, matrix)
        matrices.append(emitter.initializer(f"{name}.transposed", weight, transposed=True))
    return _all_experts(emitter, node, *matrices, *node.args[5:])


@TABLE.lowers(ops.EXPERTS_QUANTIZED)
def _experts_quantized(emitter: Emitter, node: Node) -> str:
    computed = node.meta["val"].dtype
    dtype = _scale_dtype(emitter, computed)
    matrices = [
        cast(emitter, _dequantized(emitter, parts, dtype), dtype, computed)
        for parts in (node.args[3:7], node.args[7:11])
    ]
    return _all_experts(emitter, node, *matrices, *node.args[11:])


def _all_experts(
    emitter: Emitter,
    node: Node,
    gate_up: str,
    down: str,
    gate_up_bias: Node | None,
    down_bias: Node | None,
    activation: str,
) -> str:
    """All experts of every token, as engines have no products with matrices that are chosen when they run.

    Args:
        emitter: Of the export.
        node: Of `ops.EXPERTS`, or its quantised form.
        gate_up: [D, E * 2 F].
        down: [F, E * D].
        gate_up_bias: See `ops.experts`.
        down_bias: See `ops.experts`.
        activation: See `ops.experts`.
    """
    x, choices, weights = node.args[:3]
    dtype, width = x.meta["val"].dtype, int(x.meta["val"].shape[-1])
    rows = int((node.args[4] if node.target is ops.EXPERTS else node.args[7]).meta["val"].shape[0])
    count = rows // width
    hidden = int(node.args[3].meta["val"].shape[0]) // (2 * count)

    def shaped(value: str, *sizes: int) -> str:
        return str(emitter.op("Reshape", value, emitter.constant(np.array(sizes))))

    def biased(value: str, bias: Node | None, *sizes: int) -> str:
        return value if bias is None else str(emitter.op("Add", value, shaped(emitter.value(bias), *sizes)))

    last = emitter.constant(np.array([-1]))
    # [B, T, C, E], one expert of each choice, and shares [B, E, T, 1].
    is_chosen = emitter.op(
        "Equal", emitter.op("Unsqueeze", emitter.value(choices), last), emitter.constant(np.arange(count))
    )
    shares = emitter.op(
        "Where", is_chosen, emitter.op("Unsqueeze", emitter.value(weights), last), emitter.number(0.0, dtype)
    )
    shares = emitter.op("ReduceSum", shares, emitter.constant(np.array([2])), keepdims=0)
    shares = emitter.op("Unsqueeze", emitter.op("Transpose", shares, perm=[0, 2, 1]), last)
    packed = shaped(emitter.op("MatMul", emitter.value(x), gate_up), 0, 0, count, 2 * hidden)
    packed = biased(packed, gate_up_bias, count, 2 * hidden)
    gate = emitter.op("Transpose", gated(emitter, packed, hidden, activation, dtype), perm=[0, 2, 1, 3])
    back = emitter.op("Transpose", shaped(down, hidden, count, width), perm=[1, 0, 2])
    out = biased(emitter.op("MatMul", gate, back), down_bias, count, 1, width)
    total = emitter.op("ReduceSum", emitter.op("Mul", out, shares), emitter.constant(np.array([1])), keepdims=0)
    return str(total)


def _product(emitter: Emitter, x: Node, matrix: str, dtype: torch.dtype) -> str:
    return str(emitter.op("MatMul", emitter.value(x), cast(emitter, matrix, dtype, x.meta["val"].dtype)))


def _scale_dtype(emitter: Emitter, computed: torch.dtype) -> torch.dtype:
    """Dtype of scales: that of the computation; in float32 islands, that of the caches."""
    states = [getattr(torch, state.dtype) for state in emitter.graph.states.values()]
    return states[0] if states and computed == torch.float32 else computed


@TABLE.lowers(ops.EMBEDDING_QUANTIZED)
def _embedding_quantized(emitter: Emitter, node: Node) -> str:
    """Rows of the dequantised table: TensorRT takes no DequantizeLinear of looked-up rows."""
    tokens, codes = node.args[:2]
    rows = emitter.op("Gather", _table(emitter, *node.args[1:]), emitter.value(tokens), axis=0)
    return cast(emitter, rows, _table_dtype(emitter, codes), torch.float32)


def _table_dtype(emitter: Emitter, codes: Node) -> torch.dtype:
    """What the head computes in; without one, what looked-up rows, float32 by definition, are turned into."""
    heads = [user.args[0] for user in codes.users if user.target is ops.LINEAR_QUANTIZED]
    embeddings = [user for user in codes.users if user.target is ops.EMBEDDING_QUANTIZED]
    first = [*heads, *(user for node in embeddings for user in node.users)][0]
    return _scale_dtype(emitter, first.meta["val"].dtype)


def _table(emitter: Emitter, codes: Node, scales: Node, zero_points: Node | None, format: str) -> str:
    """The dequantised table [V, D], made once for the embedding and the head."""
    dtype = _table_dtype(emitter, codes)

    def make() -> str:
        name, weight = _named_weight(emitter, codes)
        _, blocks, _ = (int(size) for size in codes.meta["val"].shape)
        block = block_of(codes.meta["val"], format)
        if format == "float8_e4m3fn":
            parts = [emitter.initializer(name, _bytes(weight), TensorProto.FLOAT8E4M3FN)]
            parts.append(_row_scales(emitter, scales, dtype))
            return str(emitter.op("DequantizeLinear", *parts, axis=0))
        # Both nibbles of every byte, from codes around 8 to codes around zero, in two's complement.
        signed = weight.map_rows(lambda part: part.flatten(1) ^ 0x88, row_shape=(blocks * block // 2,))
        scales_name, scales_weight = _named_weight(emitter, scales)
        parts = [
            emitter.initializer(name, signed, TensorProto.INT4),
            emitter.initializer(scales_name, _scales(scales_weight, dtype)),
        ]
        return str(emitter.op("DequantizeLinear", *parts, axis=1, block_size=block))

    return str(emitter.once(("table", codes), make))


def _named_weight(emitter: Emitter, node: Node) -> tuple[str, Weight]:
    named_weight = emitter.graph.weight_of(node)
    assert named_weight is not None, f"{node} is no weight"
    return named_weight


def _bytes(codes: Weight) -> Weight:
    """Codes of 8-bit floats [R, G, C] as bytes [R, G * C]."""
    _, blocks, block = codes.shape
    return codes.map_rows(
        lambda part: part.view(torch.uint8).flatten(1), row_shape=(blocks * block,), dtype=torch.uint8
    )


def _scales(scales: Weight, dtype: torch.dtype) -> Weight:
    """Scales in the dtype of the computation, as TensorRT requires.

    Raises:
        QuantizationError: If one is not positive there, is infinite, or so small that it loses digits.
    """

    def narrowed(part: torch.Tensor) -> torch.Tensor:
        narrow = part.to(dtype)
        keeps_digits = (narrow >= torch.finfo(dtype).smallest_normal) | (narrow.float() == part)
        if not bool((keeps_digits & (narrow > 0) & torch.isfinite(narrow)).all()):
            raise QuantizationError(
                f"a scale of {scales.origin} is not positive, too large or too small for {dtype}, which TensorRT holds "
                "it in: choose int4_block32_bf16 or fp8_channel, in bfloat16"
            )
        return narrow

    return scales.map_rows(narrowed, dtype=dtype)


def _row_scales(emitter: Emitter, scales: Node, dtype: torch.dtype) -> str:
    """Scales [R, G] of which every row has one, as [R]."""
    name, weight = _named_weight(emitter, scales)

    def first(part: torch.Tensor) -> torch.Tensor:
        if not torch.equal(part, part[:, :1].expand_as(part)):
            raise QuantizationError(f"{name}: TensorRT takes 8-bit floats with one scale a row: choose fp8_channel")
        return part[:, 0]

    return emitter.initializer(f"{name}.rows", _scales(weight.map_rows(first, row_shape=()), dtype))


@TABLE.replaces(ops.ROUND_ACTIVATIONS)
def _round_activations(emitter: Emitter, node: Node) -> str:
    x, scale, _ = node.args
    # A scale for each of the two: sharing constants crashes builders of some versions.
    scales = [emitter.number(scale, x.meta["val"].dtype, shared=False) for _ in range(2)]
    codes = emitter.op("QuantizeLinear", emitter.value(x), scales[0], output_dtype=TensorProto.FLOAT8E4M3FN)
    return str(emitter.op("DequantizeLinear", codes, scales[1]))


@TABLE.lowers(ops.WRITE_CACHE)
def _write_cache(emitter: Emitter, node: Node) -> str:
    cache, new, _ = node.args
    slots = emitter.fixed(cache.meta["val"].shape[2])

    def make() -> str:
        if _is_told(emitter, cache):
            return emitter.input(f"{WRITE_SLOT}.{slots}", torch.empty(1, dtype=torch.int64))
        slot = emitter.op("Mod", start(emitter), emitter.constant(np.array(slots)))
        return str(emitter.op("Reshape", slot, emitter.constant(np.array([1]))))

    indices = emitter.once(("write_indices", slots), make)
    value = emitter.value(new)
    if not node.kwargs["heads_first"]:
        value = emitter.op("Transpose", value, perm=[0, 2, 1, 3])
    return str(emitter.op("TensorScatter", emitter.value(cache), value, indices, axis=-2, mode="linear"))


def _is_told(emitter: Emitter, cache: Node) -> bool:
    """Whether a model is told where the tokens of a cache stand; one that grows with the context is no ring."""
    return "until" in emitter.graph.inputs and isinstance(cache.meta["val"].shape[2], int)


@TABLE.lowers(ops.ATTENTION)
def _attention(emitter: Emitter, node: Node) -> str:
    q, k, v, position = node.args[:4]
    known, until = mask_of(node), arguments(node)["until"]
    (_, heads, tokens, _), (_, key_heads, slots, _) = (value.meta["val"].shape for value in (q, k))
    slots = emitter.fixed(slots)
    if position is None:
        raise UnsupportedOpsError(
            f"the target 'tensorrt' attends over caches only, and {layer_path(node) or node.name} reads none"
        )

    def make() -> str:
        if "until" not in emitter.graph.inputs:
            return _mask(emitter, tokens, slots, known)
        keys = _key_positions(emitter, slots, told=_is_told(emitter, k))
        last_seen = None if until is None else emitter.value(until)
        return seen(emitter, keys, new_positions(emitter, tokens, start(emitter)), known, last_seen)

    mask = emitter.once(("mask", str(slots), known, until), make)
    inputs = [emitter.value(value) for value in (q, k, v)]
    return attend_masked(emitter, node, inputs, mask, heads=int(heads), key_heads=int(key_heads), tokens=tokens)


def _slots(emitter: Emitter, slots: int) -> str:
    """Slots, int64 [1, 1, 1, S], stored: a Range here makes the builder of TensorRT for RTX 1.7 fail."""
    return emitter.initializer(f"slots_{slots}", Weight.of(torch.arange(slots).view(1, 1, 1, slots)))


def _key_positions(emitter: Emitter, slots: int, *, told: bool) -> str:
    """Position that each slot holds, int64 [1, 1, 1, S]: as the model is told, or j in slot j of a cache that grows."""
    if not told:
        return _slots(emitter, slots)
    positions = emitter.input(f"{SLOT_POSITIONS}.{slots}", torch.empty(slots, dtype=torch.int64))
    return str(emitter.op("Unsqueeze", positions, emitter.constant(np.array([0, 1, 2]))))


def _mask(emitter: Emitter, tokens: Any, slots: int, mask: ops.Mask) -> str:
    """Which slots each new token of text sees, bool [1, 1, T, S]; see `graphs.ops.visible`."""
    axes = emitter.constant(np.array([0, 1, 3]))
    positions = emitter.once(
        "mask_positions", lambda: emitter.op("Unsqueeze", new_positions(emitter, tokens, start(emitter)), axes)
    )
    slot = _slots(emitter, slots)
    if not mask.reach:
        # Never full before the context ends, so slot j holds position j.
        return narrowed(emitter, str(emitter.op("GreaterOrEqual", positions, slot)), slot, positions, mask)
    zero, one = emitter.constant(np.array(0)), emitter.constant(np.array(1))
    # Slot j of a ring holds position last - (last - j) % S. Were a remainder negative, as in C, the slot would seem to
    # hold a position to come, and be masked all the same.
    last = emitter.op("Sub", emitter.op("Add", start(emitter), emitter.size(tokens)), one)
    age = emitter.op("Mod", emitter.op("Sub", last, slot), emitter.constant(np.array(slots)))
    keys = emitter.op("Sub", last, age)
    causal = emitter.op("And", emitter.op("GreaterOrEqual", keys, zero), emitter.op("GreaterOrEqual", positions, keys))
    return narrowed(emitter, str(causal), keys, positions, mask)


@TABLE.replaces(ops.FULL_ATTENTION)
def _full_attention(emitter: Emitter, node: Node) -> str:
    inputs = [emitter.value(value) for value in node.args]
    return str(emitter.op("Attention", *inputs, scale=node.kwargs["scale"]))


DIALECT = Dialect(name="tensorrt", opset=24, ir_version=11, domains={}, lowerings=TABLE, widens=True)
