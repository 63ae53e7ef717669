"""Quantised weights and activations: which DequantizeLinear TensorRT takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from transom.backends.tensorrt.widening import HALF
from transom.export.tensorrt.verify.view import FLOAT8, Rule, View, attribute, given, type_name

BLOCKS = (16, 256)
"""Least and most numbers of an int4 block."""

_QDQ = ("QuantizeLinear", "DequantizeLinear")


def _zero_points(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of(*_QDQ):
        name = given(node, 2)
        if not name:
            continue
        numbers = view.constant(name)
        if numbers is None:
            yield node.name, f"the zero point {name!r} cannot be seen to be zero: leave it out"
        elif (numbers != 0).any():
            yield node.name, f"a zero point other than zero is rejected: make the codes symmetric ({name!r})"


def _scales(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of(*_QDQ):
        kind = view.type(node.input[1])
        if node.op_type == "DequantizeLinear":
            wanted = attribute(node, "output_dtype") or kind
            if kind and wanted != kind:
                names = f"{type_name(kind)} for numbers of {type_name(wanted)}"
                yield node.name, f"a scale of {names} is rejected: give the scale that dtype"
        elif kind and (x := view.type(node.input[0])) and x != kind:
            yield node.name, f"a scale of {type_name(kind)} for numbers of {type_name(x)}: give the scale that dtype"
        if kind and kind not in HALF and view.type(node.input[0]) in (TensorProto.INT4, *FLOAT8):
            yield node.name, f"a scale of {type_name(kind)}: scales have the dtype that is computed in, half precision"


def _positive(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of(*_QDQ):
        numbers = view.constant(node.input[1])
        if numbers is not None and (numbers.astype("float32") <= 0).any():
            yield node.name, f"the scale {node.input[1]!r} is not positive: TensorRT takes positive scales only"


def _shared(view: View) -> Iterator[tuple[str, str]]:
    counts = Counter(node.input[1] for node in view.of("DequantizeLinear"))
    for name, count in counts.items():
        if count > 1:
            yield name, f"a scale that {count} nodes share makes builders crash: give every node a copy"


def _blocks(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("DequantizeLinear"):
        block, kind = attribute(node, "block_size", 0), view.type(node.input[0])
        if block and kind == TensorProto.INT4 and not BLOCKS[0] <= block <= BLOCKS[1]:
            yield node.name, f"int4 in blocks of {block}: TensorRT takes {BLOCKS[0]} to {BLOCKS[1]}"
        elif block and kind not in (0, TensorProto.INT4, TensorProto.FLOAT4E2M1):
            yield node.name, f"{type_name(kind)} in blocks of {block}: one scale a tensor or a channel is taken"


def _activations(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("QuantizeLinear"):
        shape = view.shape(node.input[1])
        if node.input[0] not in view.initializers and shape not in (None, (), (1,)):
            yield node.name, f"activations with {shape} scales: one scale a tensor is taken"


def _looked_up(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("DequantizeLinear"):
        maker = view.maker(node.input[0])
        if maker is not None and maker.op_type == "Gather":
            yield node.name, "DequantizeLinear of gathered codes is rejected: dequantise the table, then Gather"


def _mixed_widths(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("MatMul", "Gemm"):
        kinds = [_codes(view, name) for name in node.input[:2]]
        if TensorProto.INT4 in kinds and any(kind in FLOAT8 for kind in kinds):
            yield (
                node.name,
                "int4 weights with 8-bit float activations failed to build: keep one of them in half precision",
            )


def _codes(view: View, name: str) -> int:
    """Type of the codes that a value is made from; 0 if it is not."""
    maker: NodeProto | None = view.maker(name)
    while maker is not None and maker.op_type in ("Transpose", "Reshape"):
        maker = view.maker(maker.input[0])
    return view.type(maker.input[0]) if maker is not None and maker.op_type == "DequantizeLinear" else 0


RULES = (
    Rule(name="zero-point", text="no zero points", check=_zero_points),
    Rule(name="scale-type", text="scales of the dtype that is computed in", check=_scales),
    Rule(name="scale-sign", text="positive scales", check=_positive),
    Rule(name="shared-scale", text="a scale for every node", check=_shared),
    Rule(name="block", text="int4 in blocks of 16 to 256; 8 bits by tensor or channel", check=_blocks),
    Rule(name="activation-scale", text="one scale a tensor for activations", check=_activations),
    Rule(name="looked-up-codes", text="a table is dequantised before rows are looked up", check=_looked_up),
    Rule(name="mixed-widths", text="no int4 weights with 8-bit float activations", check=_mixed_widths),
)
