"""A model of half precision in float32 operations, each result rounded to half: what runs where no GPU is.

ONNX Runtime's CPU provider has hardly an operation for bfloat16. Here every operation computes in float32 and its
result is rounded at once, as strongly typed TensorRT rounds it; caches stay half, and are written in place. What
differs from a GPU is only the order of sums within an operation, and where a fused kernel rounds later. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, shape_inference

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

_MOVES = frozenset(
    {"Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "Shape", "Split", "Squeeze", "TensorScatter"}
    | {"Transpose", "Unsqueeze"}
)
"""Operations that change no number, which the provider has for every type."""


def widened(model: ModelProto) -> ModelProto:
    """The same model with wide operations.

    Args:
        model: Its weights may lie outside of it.
    """
    types = element_types(model)
    nodes, wide = [], dict[str, str]()

    def widen(name: str) -> Iterator[NodeProto]:
        if types.get(name) in HALF and name not in wide:
            wide[name] = f"{name}.wide"
            yield helper.make_node("Cast", [name], [wide[name]], name=wide[name], to=TensorProto.FLOAT)

    for node in model.graph.node:
        if node.op_type in _MOVES:
            nodes.append(node)
            continue
        for name in node.input:
            nodes.extend(widen(name))
        exact = {name: f"{name}.exact" for name in node.output if types.get(name) in HALF}
        new = NodeProto()
        new.CopyFrom(node)
        new.input[:] = [wide.get(name, name) for name in node.input]
        new.output[:] = [exact.get(name, name) for name in node.output]
        nodes.append(new)
        nodes += [helper.make_node("Cast", [exact[name]], [name], name=exact[name], to=types[name]) for name in exact]
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def element_types(model: ModelProto) -> dict[str, int]:
    """Element type of every value, by name."""
    graph = shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def read(path: str) -> ModelProto:
    """The model in a file, without the data beside it."""
    return onnx.load(path, load_external_data=False)
