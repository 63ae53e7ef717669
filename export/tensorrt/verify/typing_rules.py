"""Opset, operations and dtypes."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from transom.export.tensorrt.verify.view import FLOAT8, Rule, View, attribute, given, type_name

OPSETS = range(23, 27)
OPSET = 24

KNOWN = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Cast
    Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace
    DequantizeLinear Div Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND
    Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid
    HardSwish Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax Loop MatMul Max MaxPool Mean Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
    Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RotaryEmbedding Round Scan ScatterElements ScatterND
    Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Swish
    Tan Tanh TensorScatter Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()
)
"""Operations that TensorRT's parser has."""

NARROW_BLOCKS = {"TRT_FP4": 16, "TRT_MXFP8": 32}
"""The only block of operations of TensorRT's own whose names begin so."""

_SAME_TYPE = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "MatMul", "Gemm", "Concat", "Pow"), slice(None)),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), slice(None)),
    "Where": slice(1, 3),
    "Attention": slice(0, 3),
}
"""Operations with the inputs that must be of one dtype."""

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
                    f"{node.op_type} is no operation of TensorRT's parser: lower it to others",
                )
        elif not node.op_type.startswith("TRT_"):
            yield (
                node.name,
                f"{node.domain}.{node.op_type} is of a domain unknown to TensorRT: use standard ONNX",
            )


def _mixed(view: View) -> Iterator[tuple[str, str]]:
    for node in view.nodes:
        if node.op_type not in _SAME_TYPE:
            continue
        kinds = {view.type(name) for name in node.input[_SAME_TYPE[node.op_type]] if name} - {0}
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
    for name in (*view.initializers, *(name for node in view.nodes for name in node.output)):
        kind = view.type(name)
        if kind in _UNKNOWN_TYPES:
            yield name, f"{type_name(kind)}: TensorRT's only 4-bit integer is int4; shift the codes to be signed"


def _narrow_floats(view: View) -> Iterator[tuple[str, str]]:
    for name in (*view.initializers, *(name for node in view.nodes for name in node.output)):
        kind = view.type(name)
        if kind in FLOAT8 and kind not in (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E8M0):
            yield name, f"{type_name(kind)}: TensorRT's only 8-bit float is E4M3 (float8e4m3fn)"


def _narrow_blocks(view: View) -> Iterator[tuple[str, str]]:
    for node in view.nodes:
        wanted = next((block for prefix, block in NARROW_BLOCKS.items() if node.op_type.startswith(prefix)), None)
        block_size = attribute(node, "block_size", wanted)
        if wanted is not None and block_size != wanted:
            yield node.name, f"{node.op_type} with blocks of {block_size}: it takes blocks of {wanted} only"
    for node in view.of("DequantizeLinear"):
        block = attribute(node, "block_size", 0)
        if view.type(node.input[0]) == TensorProto.FLOAT4E2M1 and block != NARROW_BLOCKS["TRT_FP4"]:
            yield node.name, f"4-bit floats in blocks of {block}: TensorRT takes blocks of 16 only"


RULES = (
    Rule(name="opset", text="opset 24, or another one that parses", check=_opset),
    Rule(name="operation", text="operations that TensorRT's parser has", check=_operations),
    Rule(name="mixed-types", text="operands of one dtype", check=_mixed),
    Rule(name="double", text="no float64", check=_double),
    Rule(name="norm", text="RMSNormalization of one dtype", check=_norm),
    Rule(name="rotary", text="RotaryEmbedding of one dtype", check=_rotary),
    Rule(name="int4", text="4-bit integers are int4", check=_four_bits),
    Rule(name="float8", text="8-bit floats are E4M3", check=_narrow_floats),
    Rule(name="narrow-blocks", text="NVFP4 in blocks of 16, MXFP8 in blocks of 32", check=_narrow_blocks),
)
