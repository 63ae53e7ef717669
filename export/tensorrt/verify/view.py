"""A model as rules look at it: who makes a value, who reads it, its type and its shape."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

FLOAT8 = (
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
    TensorProto.FLOAT8E8M0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule objects to.

    Attributes:
        rule: Name of the rule.
        where: Node or value.
        what: What is wrong, what TensorRT makes of it, and what to do.
    """

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} [{self.rule}]"


Check = Callable[["View"], Iterator[tuple[str, str]]]
"""Yields (where, what) of everything that is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that TensorRT asks of a model.

    Attributes:
        name: What to call it.
        text: What it asks.
        check: Finds what breaks it.
    """

    name: str
    text: str
    check: Check

    def findings(self, view: View) -> list[Finding]:
        """All that breaks the rule."""
        return [Finding(rule=self.name, where=where, what=what) for where, what in self.check(view)]


class View:
    """Looks at a model, whose weights may lie outside of it.

    Args:
        model: The model.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model, graph = model, model.graph
        self.nodes = list(graph.node)
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
        self._makers = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers[name].append(node)
        self._recipes: dict[str, str] = {}
        self._types: dict[str, int] = {}
        self._shapes: dict[str, tuple[int | None, ...]] = {}
        inferred = shape_inference.infer_shapes(model).graph
        for value in (*inferred.value_info, *graph.output, *graph.input):
            kind = value.type.tensor_type
            self._types[value.name] = kind.elem_type
            if kind.HasField("shape"):
                sizes = (axis.dim_value if axis.HasField("dim_value") else None for axis in kind.shape.dim)
                self._shapes[value.name] = tuple(sizes)
        for tensor in graph.initializer:
            self._types[tensor.name], self._shapes[tensor.name] = tensor.data_type, tuple(tensor.dims)

    def of(self, *kinds: str) -> Iterator[NodeProto]:
        """Nodes of some kinds."""
        return (node for node in self.nodes if node.op_type in kinds)

    def type(self, name: str) -> int:
        """Element type of a value; 0 if it is not known."""
        return self._types.get(name, 0)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape of a value, None for a size that is not fixed; None if it is not known."""
        return self._shapes.get(name)

    def maker(self, name: str) -> NodeProto | None:
        """The node that makes a value."""
        return self._makers.get(name)

    def readers(self, name: str) -> list[NodeProto]:
        """The nodes that read a value."""
        return self._readers.get(name, [])

    def recipe(self, name: str) -> str:
        """How a value is computed: two values of one recipe are equal."""
        if not self._recipes:
            self._write_recipes()
        return self._recipes.get(name, name)

    def _write_recipes(self) -> None:
        for name, tensor in self.initializers.items():
            if tensor.data_location != TensorProto.EXTERNAL:
                array = numpy_helper.to_array(tensor)
                self._recipes[name] = _digest(f"{array.dtype} {array.shape} {array.tobytes().hex()}")
        for node in self.nodes:  # a node stands after those that it reads
            attributes = sorted(entry.SerializeToString().hex() for entry in node.attribute)
            parts = [self._recipes.get(name, name) for name in node.input]
            for index, name in enumerate(node.output):
                self._recipes[name] = _digest(f"{node.op_type} {index} {parts} {attributes}")

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """The numbers of a small constant in the model; None for what is computed or lies outside."""
        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute of a node."""
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def given(node: NodeProto, index: int) -> str:
    """Name of an input; "" if it is left out."""
    return node.input[index] if index < len(node.input) else ""


def type_name(kind: int) -> str:
    """An element type as ONNX calls it."""
    return str(TensorProto.DataType.Name(kind)).lower() if kind else "an unknown type"
