"""Writes a graph as functions of TVM's Relax, with kernels of our own: no operation is left to a default schedule.

Values keep no batch axis, as sessions run one text at a time: [B, T] is held as a vector [T], [B, T, ...] as a matrix
of T rows. So changes of view cost nothing, and every kernel sees rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tvm import relax, tirx

from transom.errors import UnsupportedOpsError
from transom.export.tvm.kernels.tile import Tile
from transom.graphs.graph import Graph
from transom.graphs.match import layer_path
from transom.graphs.node import Node
from transom.graphs.state import BATCH
from transom.zoo.checkpoints.safetensors_writer import stored_names

Lowering = Callable[["Emitter", Node], Any]
"""Emits the calls for one node and returns its value, or a list of values if it has several."""

_kernel_cache: dict[tuple[Any, Tile], Any] = {}
"""Every kernel of this process, by key and tile: reading a kernel takes TVM longer than compiling it."""


class Emitter:
    """State of one function while it is written.

    Args:
        graph: What to lower.
        lowerings: Lowering by exact operation.
        builder: Holds the module that functions and kernels go to.
        kernels: Kernels that the module holds already; shared by its functions.
        tile: Sizes of the innermost loops.
        tokens: New tokens in a call: a number, or None if it is symbolic.
    """

    def __init__(
        self,
        graph: Graph,
        lowerings: Mapping[Any, Lowering],
        builder: relax.BlockBuilder,
        kernels: dict[Any, Any],
        tile: Tile,
        tokens: int | None,
    ) -> None:
        self.graph, self.tile, self.builder = graph, tile, builder
        self._lowerings, self._kernels = lowerings, kernels
        self._values: dict[Node, Any] = {}
        axes = graph.symbols()
        # Of an encoder all sizes are fixed, and it takes one image a call.
        self._batch = next((symbol for symbol, axis in axes.items() if axis == BATCH), "1")
        calls = ("tokens", "positions")
        self._sizes: dict[str, Any] = {
            symbol: (tokens if axis in calls and tokens else tirx.Var(axis, "int64"))
            for symbol, axis in axes.items()
            if axis != BATCH
        }
        self._states = {node for name, node in graph.inputs.items() if name in graph.states}

    def emit(self, name: str, chunk: int) -> None:
        """Add the function to the module.

        Its inputs are the new tokens [T], their start [], the wanted positions [P], `until` [T] and soft tokens [T, D]
        if the model sees images, the caches, and every stored weight; it returns logits [P, V], the caches, and the
        taps as they are held. Of an encoder they are what its graph says, without a batch axis.

        Args:
            name: Of the function.
            chunk: Most new tokens in one call; memory is planned for as many.
        """
        weight_names = self.graph.weight_names()
        stored = stored_names(self.graph.weights)
        given, returned = self.graph.inputs, self.graph.outputs
        # The library takes and returns by position; see `backends.tvm.runtime`.
        inputs = [self._input(given[name]) for name in self.graph.input_names]
        weights: dict[str, Any] = {}
        for placeholder, node in self.graph.placeholders().items():
            if placeholder in weight_names:
                key = stored[weight_names[placeholder]]
                if key not in weights:
                    weights[key] = self._input(node)
                self._values[node] = weights[key]
        parameters = [*inputs, *(weights[key] for key in parameter_names(self.graph))]
        bounds = {"tokens": chunk, "positions": chunk}
        with self.builder.function(name, parameters, attrs={"tir_var_upper_bound": bounds}):
            with self.builder.dataflow():
                for node in self.graph.calls_all():
                    self._values[node] = self._lower(node)
                order = self.graph.output_names
                results = self.builder.emit_output(relax.Tuple([self.value(returned[name]) for name in order]))
            self.builder.emit_func_output(results)

    def _lower(self, node: Node) -> Any:
        if node.target is operator.getitem:
            return self._values[node.args[0]][node.args[1]]
        return self._lowerings[node.target](self, node)

    def _input(self, node: Node) -> Any:
        value = node.meta["val"]
        variable = relax.Var(node.name, relax.TensorType(self.shape(node), dtype_name(value.dtype)))
        self._values[node] = variable
        return variable

    def value(self, node: Node) -> Any:
        """A node's value."""
        return self._values[node]

    def size(self, symbol: Any) -> Any:
        """A size: a number, or the symbol of one."""
        if not is_symbol(symbol):
            return int(symbol)
        if str(symbol) == self._batch:
            return 1
        if str(symbol) not in self._sizes:
            raise UnsupportedOpsError(f"no input has the size {symbol}: the target 'tvm' cannot compute it")
        return self._sizes[str(symbol)]

    def is_batched(self, node: Node) -> bool:
        """Whether a value has a batch axis, which is dropped."""
        shape = node.meta["val"].shape
        return len(shape) > 1 and str(shape[0]) == self._batch

    def shape(self, node: Node) -> list[Any]:
        """A value's shape as it is held."""
        sizes = self._whole(node)
        if not self.is_batched(node):
            return sizes
        if node in self._states:
            return sizes
        return [sizes[1], math.prod(sizes[2:])] if len(sizes) > 2 else sizes[1:]

    def _whole(self, node: Node) -> list[Any]:
        return [self.size(size) for size in node.meta["val"].shape]

    def width(self, node: Node) -> int:
        """Numbers in a row of a value that is held as a matrix."""
        return int(self.shape(node)[1])

    def is_single(self, node: Node) -> bool:
        """Whether a value is known to have one row."""
        return isinstance(self.shape(node)[0], int) and self.shape(node)[0] == 1

    def refuse(self, node: Node, reason: str) -> UnsupportedOpsError:
        """An error about a use of an operation that the kernels do not cover."""
        return UnsupportedOpsError(
            f"the target 'tvm' cannot lower {node.target} at {layer_path(node) or node.name}: {reason}"
        )

    def call(
        self,
        key: Any,
        make: Callable[[], Any],
        inputs: Sequence[Any],
        *outputs: Sequence[Any],
        in_place: Sequence[int] = (),
        dtypes: Sequence[str] = (),
    ) -> list[Any]:
        """Call a kernel of our own.

        Args:
            key: Equal keys share a kernel, in every module; it holds all that `make` depends on but the tile.
            make: Makes the kernel; its parameters are the inputs, then the outputs.
            inputs: Values.
            outputs: Shapes of new outputs.
            in_place: Indices of inputs that it writes; they follow the outputs in what is returned.
            dtypes: Of the outputs, if not all are float32.
        """
        if key not in self._kernels:
            if (key, self.tile) not in _kernel_cache:
                _kernel_cache[key, self.tile] = make()
            self._kernels[key] = self.builder.add_func(_kernel_cache[key, self.tile], str(key[0]))
        names = dtypes or ["float32"] * len(outputs)
        types = [relax.TensorType(list(shape), dtype) for shape, dtype in zip(outputs, names, strict=True)]
        types += [relax.TensorType(inputs[index].ty.shape, inputs[index].ty.dtype) for index in in_place]
        kernel, given = self._kernels[key], list(inputs)
        if in_place:
            places = [*(-1 for _ in outputs), *in_place]
            result = self.builder.emit(relax.op.call_tir_inplace(kernel, relax.Tuple(given), places, types))
        else:
            result = self.builder.emit(relax.op.call_tir(kernel, given, types if len(types) > 1 else types[0]))
        if len(types) == 1:
            return [result]
        return [self.builder.emit(relax.TupleGetItem(result, index)) for index in range(len(types))]


def parameter_names(graph: Graph) -> list[str]:
    """Names of the stored weights, in the order in which functions take them."""
    stored, weight_names = stored_names(graph.weights), graph.weight_names()
    return list(dict.fromkeys(stored[weight_names[name]] for name in graph.placeholders() if name in weight_names))


def tap_shapes(graph: Graph) -> dict[str, list[int]]:
    """Shape of every tap as the graph has it, tokens as -1, by name."""
    returned, axes = graph.outputs, graph.symbols()
    return {
        tap.name: [
            (1 if axes.get(str(size)) == BATCH else -1) if is_symbol(size) else size
            for size in returned[tap.name].meta["val"].shape
        ]
        for tap in graph.taps
    }


def is_symbol(size: Any) -> bool:
    """Whether a size is known only when the graph runs."""
    return not isinstance(size, int)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in TVM's words; its kernels take 8-bit floats as bytes."""
    return "uint8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")
