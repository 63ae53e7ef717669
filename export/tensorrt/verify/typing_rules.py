"""Opset, operations and dtypes."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from transom.export.tensorrt.verify.view import FLOAT8, FLOATS, Rule, View, attribute, given, type_name

OPSETS = range(23, 27)
OPSET = 24

KNOWN = frozenset(
    {"Add", "And", "Attention", "Cast", "Concat", "Cos", "DequantizeLinear", "Div", "Equal", "Erf", "Exp", "Expand"}
    | {"Gather", "GatherND", "Gelu", "Gemm", "GreaterOrEqual", "Greater", "Identity", "Less", "LessOrEqual", "MatMul"}
    | {"Mod", "Mul", "Neg", "Not", "Or", "Pow", "QuantizeLinear", "RMSNormalization", "Range", "Reciprocal"}
    | {"ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "RotaryEmbedding", "ScatterElements", "ScatterND", "Shape"}
    | {"Sigmoid", "Sin", "Slice"}
    | {"Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TensorScatter", "Transpose", "Unsqueeze", "Where"}
)
NARROW_BLOCKS = {"TRT_FP4DynamicQuantize": 16, "TRT_MXFP8DynamicQuantize": 32, "TRT_MXFP8QuantizeLinear": 32}
"""Operations of TensorRT's own domain, with the only block that each takes."""

_SAME_TYPE = frozenset({"Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Concat", "Pow", "Equal", "Less", "LessOrEqual"})
_UNKNOWN_TYPES = frozenset({TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2})


def _opset(view: View) -> Iterator[tuple[str, str]]:
    if view.opset not in OPSETS:
        yield "the model", f"opset {view.opset}: TensorRT parses {OPSETS[0]} to {OPSETS[-1]}; export opset {OPSET}"
    elif view.opset < OPSET and (node := next(view.of("TensorScatter"), None)):
        yield node.name, f"TensorScatter came with opset {OPSET}, the model says {view.opset}: export opset {OPSET}"


def _operations(view: View) -> Iterator[tuple[str, str]]:
    for node in view.nodes:
        if node.domain in ("", "ai.onnx"):
            if node.op_type not in KNOWN:
                yield (
                    node.name,
                    f"{node.op_type} is not among the operations seen to parse: lower it to those",
                )
        elif node.op_type not in NARROW_BLOCKS:
            yield (
                node.name,
                f"{node.domain}.{node.op_type} is of a domain unknown to TensorRT: use standard ONNX",
            )


def _mixed(view: View) -> Iterator[tuple[str, str]]:
    for node in view.nodes:
        if node.op_type not in _SAME_TYPE:
            continue
        kinds = {view.type(name) for name in node.input if name} - {0}
        if len(kinds) > 1:
            names = " and ".join(sorted(map(type_name, kinds)))
            yield node.name, f"{node.op_type} of {names}: a strongly typed network does not convert; insert a Cast"


def _double(view: View) -> Iterator[tuple[str, str]]:
    for node in view.nodes:
        if any(view.type(name) == TensorProto.DOUBLE for name in (*node.input, *node.output)):
            yield node.name, f"{node.op_type} of double: TensorRT has no float64; cast to float32 or narrower"


def _norm(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("RMSNormalization"):
        x, scale = view.type(node.input[0]), view.type(node.input[1])
        if x and scale and x != scale:
            yield (
                node.name,
                f"RMSNormalization of {type_name(x)} with a scale of {type_name(scale)}: cast both to one dtype",
            )


def _rotary(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("RotaryEmbedding"):
        kinds = [view.type(given(node, index)) for index in range(3)]
        if all(kinds) and len(set(kinds)) > 1:
            names = ", ".join(map(type_name, kinds))
            yield node.name, f"RotaryEmbedding of input, cosines and sines in {names}: the caches must have its dtype"


def _four_bits(view: View) -> Iterator[tuple[str, str]]:
    named = {**{name: tensor.data_type for name, tensor in view.initializers.items()}}
    named |= {name: view.type(name) for node in view.nodes for name in node.output}
    for name, kind in named.items():
        if kind in _UNKNOWN_TYPES:
            yield name, f"{type_name(kind)}: TensorRT's only 4-bit integer is int4; shift the codes to be signed"


def _narrow_floats(view: View) -> Iterator[tuple[str, str]]:
    for name in (*view.initializers, *(name for node in view.nodes for name in node.output)):
        kind = view.type(name)
        if kind in FLOAT8 and kind not in (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E8M0):
            yield name, f"{type_name(kind)}: TensorRT's only 8-bit float is E4M3 (float8e4m3fn)"


def _narrow_blocks(view: View) -> Iterator[tuple[str, str]]:
    for node in view.nodes:
        wanted = NARROW_BLOCKS.get(node.op_type)
        found = attribute(node, "block_size")
        if wanted is not None and found != wanted:
            yield node.name, f"{node.op_type} with blocks of {found}: it takes blocks of {wanted} only"


def compute_types(view: View) -> set[int]:
    """Float types that matrices are multiplied in."""
    return {view.type(name) for node in view.of("MatMul", "Gemm", "Attention") for name in node.input[:2]} & set(FLOATS)


RULES = (
    Rule(name="opset", text="opset 24, or another one that parses", check=_opset),
    Rule(name="operation", text="operations that were seen to parse", check=_operations),
    Rule(name="mixed-types", text="operands of one dtype", check=_mixed),
    Rule(name="double", text="no float64", check=_double),
    Rule(name="norm", text="RMSNormalization of one dtype", check=_norm),
    Rule(name="rotary", text="RotaryEmbedding of one dtype", check=_rotary),
    Rule(name="int4", text="4-bit integers are int4", check=_four_bits),
    Rule(name="float8", text="8-bit floats are E4M3", check=_narrow_floats),
    Rule(name="narrow-blocks", text="NVFP4 in blocks of 16, MXFP8 in blocks of 32", check=_narrow_blocks),
)
