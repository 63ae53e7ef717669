"""Writes a graph as ONNX: a small model file, and its weights streamed into one data file beside it.

Every operation that the dialect's table of lowerings lacks is reported at once, before anything is written.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from transom.backends.artifact import MODEL_FILE
from transom.errors import UnsupportedOpsError
from transom.export.lowering import require_supported
from transom.export.onnx.data import ELEMENT_TYPES, DataFile, data_file, raw_bytes
from transom.export.onnx.dialect import Dialect
from transom.export.onnx.nodes import rename, without_unused
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call, layer_path
from transom.graphs.node import Node
from transom.graphs.weight import Weight


class Emitter:
    """State of one export: the nodes so far, and where weights will stand in the data file.

    Args:
        graph: What to lower.
        dialect: What to write.
        data: Where weights go.
        fixed: Sizes that symbols of the graph have for good, by symbol.
    """

    def __init__(
        self, graph: Graph, dialect: Dialect, data: DataFile, *, fixed: Mapping[str, int] | None = None
    ) -> None:
        self.graph, self.dialect, self._fixed = graph, dialect, fixed or {}
        self.flat: dict[Node, str] = {}
        """Values [B, T, N, H] that exist as [B, T, N * H]."""
        self.written: dict[tuple[Node, Node], str] = {}
        """Caches that an attention wrote, by the cache that came in and the new keys or values."""
        self._data = data
        self._axes = graph.symbols()
        self._names: dict[Node, Any] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._memo: dict[Any, Any] = {}
        self._more_inputs: list[onnx.ValueInfoProto] = []
        self._counts: Counter[str] = Counter()
        self._scope = ""
        self._opset = dialect.opset

    def emit(self) -> onnx.ModelProto:
        """Lower the whole graph."""
        inputs, outputs = [], []
        for name, node in self.graph.inputs.items():
            self._names[node] = name
            inputs.append(self._describe(name, node.meta["val"]))
        for node in self.graph.calls_all():
            self._scope = layer_path(node)
            if node.target is operator.getitem:
                source = self._names[node.args[0]]
                self._names[node] = source[node.args[1]]
            else:
                self._names[node] = self.dialect.lowerings[node.target](self, node)
        self._scope = ""
        taps = {tap.name for tap in self.graph.taps}
        for name, node in self.graph.outputs.items():
            value, wide = self.value(node), node.meta["val"]
            if name in self.graph.states:
                name = f"{name}.out"
            else:
                value, wide = self._result(value, wide)
            # Several taps may show one value, and an output has one name.
            own = self.op("Identity", value) if name in taps and wide is node.meta["val"] else value
            rename(self._nodes, own, name)
            outputs.append(self._describe(name, wide))
        self._nodes = without_unused(self._nodes, {value.name for value in outputs})
        self._data.write()
        inputs += self._more_inputs
        proto = helper.make_graph(self._nodes, self.graph.task, inputs, outputs, list(self._initializers.values()))
        opsets = [helper.make_opsetid("", self._opset)]
        opsets += [helper.make_opsetid(domain, version) for domain, version in self.dialect.domains.items()]
        return helper.make_model(
            proto, opset_imports=opsets, ir_version=self.dialect.ir_version, producer_name="transom"
        )

    def _result(self, value: str, like: torch.Tensor) -> tuple[str, torch.Tensor]:
        """A value as it leaves the model, and what it is then."""
        if not self.dialect.widens or like.dtype == torch.float32:
            return value, like
        return self.op("Cast", value, to=TensorProto.FLOAT), like.to(torch.float32)

    def value(self, node: Any) -> str:
        """Name of a node's value; weights get a place when they are first asked for."""
        if isinstance(node, (int, float)):
            raise TypeError(f"{node} is a number: use constant()")
        if node in self.flat and self._names.get(node) is None:
            shape = [0, 0, *(int(size) for size in node.meta["val"].shape[2:])]
            self._names[node] = self.op("Reshape", self.flat[node], self.constant(np.array(shape)))
        if node not in self._names:
            named_weight = self.graph.weight_of(node)
            assert named_weight is not None, f"{node} is neither computed nor a weight"
            self._names[node] = self.initializer(*named_weight)
        name = self._names[node]
        assert isinstance(name, str)
        return name

    def flattened(self, node: Node) -> str:
        """A value [B, T, N, H] as [B, T, N * H]."""
        if node not in self.flat:
            if is_call(node, aten.view.default, aten.reshape.default) and node.args[0].meta["val"].dim() == 3:
                self.flat[node] = self.value(node.args[0])
            else:
                width = int(node.meta["val"].shape[2] * node.meta["val"].shape[3])
                self.flat[node] = self.op("Reshape", self.value(node), self.constant(np.array([0, 0, width])))
        return self.flat[node]

    def require_opset(self, version: int) -> None:
        """Write the model for at least this version of the standard operators."""
        self._opset = max(self._opset, version)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; returns the name of its output, or the list of names if it has several."""
        self._counts[kind] += 1
        stem = "/".join(part for part in (self._scope.replace(".", "/"), f"{kind}_{self._counts[kind]}") if part)
        names = [stem] if outputs == 1 else [f"{stem}.{index}" for index in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=stem, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def input(self, name: str, like: torch.Tensor) -> str:
        """Name of an input that the dialect asks for beside those of the graph."""

        def make() -> str:
            self._more_inputs.append(self._describe(name, like))
            return name

        return str(self.once(("input", name), make))

    def branch(self, make: Callable[[], str], dtype: torch.dtype, *, rank: int) -> onnx.GraphProto:
        """A graph for `If`, which may use all that stands before it, and whose own values nothing else sees.

        Args:
            make: Adds its nodes and returns the name of its result.
            dtype: Of the result.
            rank: Number of its axes.
        """
        self._counts["branch"] += 1
        name = f"branch_{self._counts['branch']}"
        value = helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], [None] * rank)
        return helper.make_graph(self._inner(lambda: [make()], [name]), name, [], [value])

    def loop(self, count: str, before: str, make: Callable[[str, str], str], like: torch.Tensor) -> str:
        """A value after a number of steps, of which each may use all that stands before the loop.

        Args:
            count: How many steps, an int64 scalar.
            before: The value before the first one.
            make: Adds the nodes of a step, given its number and the value before it, and returns the value after it.
            like: Of the value's dtype and number of axes.
        """
        self._counts["step"] += 1
        name = f"step_{self._counts['step']}"
        names = {part: f"{name}.{part}" for part in ("number", "before", "goes_on")}
        nodes = self._inner(lambda: [make(names["number"], names["before"])], [name])
        kinds = {"number": TensorProto.INT64, "goes_on": TensorProto.BOOL, "before": ELEMENT_TYPES[like.dtype]}
        number, goes_on, value = (
            helper.make_tensor_value_info(names[part], kind, [None] * like.dim() if part == "before" else [])
            for part, kind in kinds.items()
        )
        after = helper.make_tensor_value_info(name, ELEMENT_TYPES[like.dtype], [None] * like.dim())
        still = helper.make_tensor_value_info(f"{name}.still", TensorProto.BOOL, [])
        nodes.append(helper.make_node("Identity", [goes_on.name], [still.name], name=still.name))
        body = helper.make_graph(nodes, name, [number, goes_on, value], [still, after])
        return str(self.op("Loop", count, "", before, body=body))

    def scan(
        self, before: str, rows: Sequence[str], make: Callable[..., tuple[str, str]], *, axis: int, rank: int
    ) -> tuple[str, str]:
        """A float32 value after steps along an axis, and what every step gave, on the same axis.

        Args:
            before: The value before the first step.
            rows: Float32 values that are stepped along.
            make: Adds the nodes of a step, given the value before it and each of `rows` without the axis, and returns
                the value after it and what it gives.
            axis: Of `rows`, and of the result.
            rank: Number of axes of the value, and of what a step takes and gives.
        """
        self._counts["scan"] += 1
        name = f"scan_{self._counts['scan']}"
        given = [f"{name}.{part}" for part in ("before", *range(len(rows)))]
        results = [f"{name}.after", f"{name}.row"]
        nodes = self._inner(lambda: make(*given), results)
        inputs, outputs = (
            [helper.make_tensor_value_info(value, TensorProto.FLOAT, [None] * rank) for value in values]
            for values in (given, results)
        )
        body = helper.make_graph(nodes, name, inputs, outputs)
        count = len(rows)
        axes: dict[str, Any] = {"scan_input_axes": [axis] * count, "scan_output_axes": [axis]}
        after, stacked = self.op("Scan", before, *rows, outputs=2, body=body, num_scan_inputs=count, **axes)
        return after, stacked

    def _inner(self, make: Callable[[], Sequence[str]], names: Sequence[str]) -> list[onnx.NodeProto]:
        """Nodes of an inner graph, whose results have these names."""
        outer = self._nodes, dict(self._names), dict(self.flat), dict(self._memo)
        self._nodes = []
        results = make()
        nodes = self._nodes + [
            helper.make_node("Identity", [result], [name], name=name)
            for result, name in zip(results, names, strict=True)
        ]
        self._nodes, self._names, self.flat, self._memo = outer
        return nodes

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, made the first time that `key` is asked for and shared from then on."""
        if key not in self._memo:
            scope, self._scope = self._scope, "shared"
            self._memo[key] = make()
            self._scope = scope
        return self._memo[key]

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        """Name of a small constant; equal constants share one."""
        tensor = torch.from_numpy(np.asarray(array))
        return self.number(tensor, tensor.dtype)

    def number(self, value: float | torch.Tensor, dtype: torch.dtype, *, shared: bool = True) -> str:
        """Name of a small constant of any dtype.

        Args:
            value: What it is.
            dtype: What it is held in.
            shared: Whether equal constants may be one.
        """
        tensor = torch.as_tensor(value).to(dtype)
        raw = bytes(raw_bytes(tensor))

        def make() -> str:
            name = f"constant_{len(self._initializers)}"
            self._initializers[name] = helper.make_tensor(name, ELEMENT_TYPES[dtype], tensor.shape, raw, raw=True)
            return name

        return str(self.once((dtype, tuple(tensor.shape), raw), make)) if shared else make()

    def float8_zero(self) -> str:
        """Name of the zero that makes QuantizeLinear give 8-bit floats (E4M3)."""
        name = "zero_float8"
        self._initializers[name] = helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
        return name

    def initializer(
        self,
        name: str,
        weight: Weight,
        element_type: int | None = None,
        *,
        transposed: bool = False,
        stacked: int | None = None,
    ) -> str:
        """Name of a weight, which is written when everything has been lowered.

        Args:
            name: Its name in the model.
            weight: What to write.
            element_type: ONNX type, if it is not that of the weight's dtype. Of a 4-bit one, `weight` holds bytes of
                two codes; if it is transposed, a code a byte.
            transposed: Whether to write a matrix [N, K] as [K, N].
            stacked: Number of matrices that stand one below the other in the weight; they get an axis of their own.
        """
        if name not in self._initializers:
            proto = self._data.place(name, weight, element_type, transposed=transposed, stacked=stacked)
            self._initializers[name] = proto
        return name

    def size(self, symbol: Any) -> str:
        """An int64 vector [1] with one size: a number, or a symbol that some input's shape holds."""
        symbol = self.fixed(symbol)
        if isinstance(symbol, int):
            return self.constant(np.array([symbol]))

        def make() -> str:
            for node in self.graph.inputs.values():
                for axis, size in enumerate(node.meta["val"].shape):
                    if str(size) == str(symbol):
                        return str(self.op("Shape", self.value(node), start=axis, end=axis + 1))
            raise UnsupportedOpsError(f"no input has the size {symbol}: the target cannot compute it")

        return str(self.once(("size", str(symbol)), make))

    def fixed(self, size: Any) -> Any:
        """A size as a number, if it is one for good."""
        return size if isinstance(size, int) else self._fixed.get(str(size), size)

    def _describe(self, name: str, value: torch.Tensor) -> onnx.ValueInfoProto:
        sizes = [self.fixed(size) for size in value.shape]
        shape = [size if isinstance(size, int) else self._axis_name(str(size)) for size in sizes]
        return helper.make_tensor_value_info(name, ELEMENT_TYPES[value.dtype], shape)

    def _axis_name(self, symbol: str) -> str:
        """What users read in place of torch's symbol."""
        return self._axes.get(symbol, symbol)


def write(
    graph: Graph,
    dialect: Dialect,
    folder: Path,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
    fixed: Mapping[str, int] | None = None,
    file: str = MODEL_FILE,
) -> onnx.ModelProto:
    """Write a model and its data, `model.onnx` and `model.onnx.data`.

    Peak memory is a few row blocks, however large the model is.

    Args:
        graph: A graph that the target's passes have rewritten.
        dialect: What to write.
        folder: Where; it exists.
        on_bytes: Called with the number of weight bytes written each time.
        fixed: Sizes that symbols of the graph have for good, by symbol.
        file: Name of the model.

    Returns:
        The model, without its data.

    Raises:
        UnsupportedOpsError: Naming every operation that the dialect cannot express.
    """
    require_supported(graph, dialect.lowerings, dialect.name)
    with open(folder / data_file(file), "wb") as opened:
        data = DataFile(opened, data_file(file), on_bytes)
        model = Emitter(graph, dialect, data, fixed=fixed).emit()
    (folder / file).write_bytes(model.SerializeToString())
    return model
