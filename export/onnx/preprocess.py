"""`images.resize.pixels` as an ONNX graph: the same passes in the same blocks, with weights made from the box's sides.

Blocks are runs of two Scans, rows outside and columns inside, so that no more than a block is float64 at a time. Names
and axes are those of `images.resize`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from transom.images.resize import POWERS, WEIGHT_LIMIT, PixelSpec, block_size

OPSET = 21
IR_VERSION = 10

Value = str | float | NDArray[Any]
"""A name, or a constant: a float is a float64 scalar."""


class _Nodes:
    """Nodes of a graph, or of a Scan's body, which reads the values around it by name.

    Args:
        around: The nodes that this body stands among.
    """

    def __init__(self, around: _Nodes | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[Any, ...], onnx.TensorProto] = around.constants if around else {}
        self._names: list[str] = around._names if around else []

    def op(self, kind: str, *inputs: Value, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; returns the name of its value, or a list of names if it has several."""
        names = [f"{kind}_{len(self._names) + index}" for index in range(outputs)]
        self._names += names
        self.nodes.append(helper.make_node(kind, [self._name(value) for value in inputs], names, **attributes))
        return names[0] if outputs == 1 else names

    def _name(self, value: Value) -> str:
        if isinstance(value, str):
            return value
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        tensor = self.constants.setdefault(key, numpy_helper.from_array(array, f"constant_{len(self.constants)}"))
        return tensor.name


def preprocessing_model(spec: PixelSpec) -> onnx.ModelProto:
    """The graph from an image to what a vision model reads of it, in standard operators.

    Its inputs are `image`, uint8 [height, width, 3], and `box`, int64 [4], an `images.resize.Box`: top, left, bottom,
    right. Its output `pixels`, float32 [1, 3, S, S], is equal to that of `images.resize.pixels` in every bit. A graph
    raises no errors: check before that the box lies inside the image.

    Args:
        spec: Size, mean and std.

    Returns:
        A model of some ten kilobytes, without external data.
    """
    size, main = spec.size, _Nodes()
    top, left, bottom, right = main.op("Split", "box", outputs=4, num_outputs=4)
    row_first_B, row_read, row_weights_BNK = _taps(main, main.op("Sub", bottom, top), size)
    first_B, read, weights_BNK = _taps(main, main.op("Sub", right, left), size)
    rows = _Nodes(main)
    strip_KWC = rows.op("Slice", "image", "row_first", rows.op("Add", "row_first", row_read), _integers(0))
    columns = _Nodes(rows)
    square_KKC = columns.op("Slice", strip_KWC, "first", columns.op("Add", "first", read), _integers(1))
    turned_KCK = columns.op("Cast", columns.op("Transpose", square_KKC, perm=[0, 2, 1]), to=TensorProto.DOUBLE)
    narrowed_KCN = _rounded(columns, columns.op("MatMul", turned_KCK, "weights_KN"))
    narrowed_BKCN = rows.op(
        "Scan",
        main.op("Add", first_B, left),
        main.op("Transpose", weights_BNK, perm=[0, 2, 1]),
        num_scan_inputs=2,
        body=_body(columns, narrowed_KCN, first=TensorProto.INT64, weights_KN=TensorProto.DOUBLE),
    )
    narrowed_KCS = rows.op("Transpose", narrowed_BKCN, perm=[1, 2, 0, 3])
    values = rows.op("Cast", rows.op("Reshape", narrowed_KCS, _integers(0, -1)), to=TensorProto.DOUBLE)
    shortened_N = _rounded(rows, rows.op("MatMul", "row_weights_NK", values))
    shortened_SD = main.op(
        "Scan",
        main.op("Add", row_first_B, top),
        row_weights_BNK,
        num_scan_inputs=2,
        body=_body(rows, shortened_N, row_first=TensorProto.INT64, row_weights_NK=TensorProto.DOUBLE),
    )
    resized_SCS = main.op("Reshape", shortened_SD, _integers(1, size, 3, size))
    resized_CSS = main.op("Cast", main.op("Transpose", resized_SCS, perm=[0, 2, 1, 3]), to=TensorProto.FLOAT)
    mean_C, std_C = (values[:, None, None] for values in spec.scaled())
    main.nodes.append(helper.make_node("Div", [main.op("Sub", resized_CSS, mean_C), main._name(std_C)], ["pixels"]))
    graph = helper.make_graph(
        main.nodes,
        "preprocess",
        [
            helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3]),
            helper.make_tensor_value_info("box", TensorProto.INT64, [4]),
        ],
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, size, size])],
        list(main.constants.values()),
    )
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="transom")


def _taps(main: _Nodes, count: str, size: int) -> tuple[str, str, str]:
    """`images.resize.taps` line by line, of int64 [1]: `first` [B, 1], K [1] and `weights` [B, N, K]."""
    op, outputs = main.op, block_size(size)
    scale = op("Div", op("Cast", count, to=TensorProto.DOUBLE), float(size))
    reach = op("Max", scale, 1.0)
    centres_BN = op("Mul", scale, (np.arange(size) + 0.5).reshape(-1, outputs))
    span = op("Add", op("Mul", scale, float(outputs - 1)), op("Mul", 2.0, reach))
    read = op("Min", count, op("Add", op("Cast", span, to=TensorProto.INT64), _integers(2)))
    from_B = op("Sub", op("Slice", centres_BN, _integers(0), _integers(1), _integers(1)), reach)
    floor_B = op("Cast", op("Floor", op("Add", from_B, 0.5)), to=TensorProto.INT64)
    first_B = op("Min", op("Max", floor_B, _integers(0)), op("Sub", count, read))
    offsets_K = op("Range", np.array(0), op("Squeeze", read), np.array(1))
    inputs_BK = op("Cast", op("Add", first_B, offsets_K), to=TensorProto.DOUBLE)
    apart_BNK = op("Sub", op("Unsqueeze", inputs_BK, _integers(1)), op("Unsqueeze", centres_BN, _integers(2)))
    distances_BNK = op("Mul", op("Add", apart_BNK, 0.5), op("Div", 1.0, reach))
    weights_BNK = op("Max", op("Sub", 1.0, op("Abs", distances_BNK)), 0.0)
    weights_BNK = op("Div", weights_BNK, op("ReduceSum", weights_BNK, _integers(2)))
    largest = op("ReduceMax", weights_BNK, keepdims=0)
    fits = op("Less", op("Floor", op("Add", op("Mul", largest, POWERS), 0.5)), WEIGHT_LIMIT)
    power = op("ReduceMax", op("Where", fits, POWERS, 1.0), keepdims=0)
    return first_B, read, op("Div", op("Floor", op("Add", op("Mul", weights_BNK, power), 0.5)), power)


def _rounded(nodes: _Nodes, sums: str) -> str:
    floors = nodes.op("Floor", nodes.op("Add", sums, 0.5))
    return str(nodes.op("Cast", nodes.op("Clip", floors, 0.0, 255.0), to=TensorProto.UINT8))


def _body(nodes: _Nodes, result: str, **inputs: int) -> onnx.GraphProto:
    """The body of a Scan, whose inputs have these types and whose result is uint8."""
    described = [helper.make_tensor_value_info(name, element, None) for name, element in inputs.items()]
    return helper.make_graph(
        nodes.nodes, "block", described, [helper.make_tensor_value_info(result, TensorProto.UINT8, None)]
    )


def _integers(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)
