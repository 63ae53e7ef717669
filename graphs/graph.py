"""`Graph`: an exported program, with its weights as recipes and its inputs, outputs and states named.

This is no IR of its own: the program stays a `torch.export.ExportedProgram`, and anything that takes one can take
`graph.program`. What tracing throws away stands beside it: where the numbers of each weight come from, what inputs and
outputs are called, and which of them are states.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx.node import map_arg

from transom.errors import InvariantError
from transom.graphs.node import Node, is_node
from transom.graphs.state import Port, State
from transom.graphs.weight import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """An intermediate value that the graph returns beside its results, so that runs can be compared step by step.

    Attributes:
        name: "tap.SITE", such as "tap.layers.3.self_attn.q_norm".
        layer: Index of the layer; None before the first and after the last.
        op: What computed the value: "embedding", "norm", "projection", "rope", "attention" and so on.
    """

    name: str
    layer: int | None
    op: str


@dataclasses.dataclass(kw_only=True)
class Graph:
    """A traced program.

    Attributes:
        program: The exported program. Its state dict holds fake tensors only.
        weights: Every parameter and buffer by the program's name for it.
        task: "decode" or "score"; "foreign" for a program traced elsewhere.
        input_names: What the inputs that a caller passes are called, in the program's order; states by their own names.
        output_names: The same of outputs; states and taps by their own names.
        axes: Names of the axes of every input and output that is neither a state nor a tap, where they are known.
        states: What is kept from call to call, by name.
        taps: Intermediate values that are returned too.
    """

    program: ExportedProgram
    weights: dict[str, Weight]
    task: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    axes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    states: Mapping[str, State] = dataclasses.field(default_factory=dict)
    taps: tuple[Tap, ...] = ()

    @staticmethod
    def from_program(program: ExportedProgram, *, task: str = "foreign") -> Graph:
        """Wrap a program that was exported elsewhere; its tensors become weights.

        Inputs are called as they are in the program, outputs "output.0" and so on.
        """
        tensors = {**program.state_dict, **program.constants}
        first: dict[tuple[Any, ...], Weight] = {}
        weights = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor):
                same = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
                weights[name] = first.setdefault(same, Weight.of(tensor.detach(), name))
        specs = program.graph_signature.input_specs
        return Graph(
            program=program,
            weights=weights,
            task=task,
            input_names=tuple(spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT),
            output_names=tuple(f"output.{index}" for index, _ in enumerate(program.graph_signature.output_specs)),
        )

    @property
    def module(self) -> torch.fx.GraphModule:
        """The program's graph module."""
        module: torch.fx.GraphModule = self.program.graph_module
        return module

    @property
    def fx(self) -> torch.fx.Graph:
        """The program's graph of nodes."""
        return self.module.graph

    @property
    def output(self) -> Node:
        """The node that returns."""
        return self.fx.output_node()

    def placeholders(self) -> dict[str, Node]:
        """Input nodes by name."""
        leading = itertools.takewhile(lambda node: node.op == "placeholder", self.fx.nodes)
        return {node.name: node for node in leading}

    def calls(self, *targets: Any) -> list[Node]:
        """Nodes that call one of the targets, in order of execution."""
        return [node for node in self.fx.nodes if node.op == "call_function" and node.target in targets]

    def calls_all(self) -> list[Node]:
        """Every node that calls something."""
        return [node for node in self.fx.nodes if node.op == "call_function"]

    def weight_bytes(self) -> int:
        """Bytes of all weights, each buffer counted once."""
        return sum({id(weight): weight.bytes for weight in self.weights.values()}.values())

    @property
    def inputs(self) -> dict[str, Node]:
        """Inputs that a caller passes by name, in order; states are among them."""
        nodes = self.placeholders()
        specs = self.program.graph_signature.input_specs
        passed = [nodes[spec.arg.name] for spec in specs if spec.kind is InputKind.USER_INPUT]
        return dict(zip(self.input_names, passed, strict=True))

    @property
    def outputs(self) -> dict[str, Node]:
        """What is returned by name, in order; states and taps are among it."""
        return dict(zip(self.output_names, self.output.args[0], strict=True))

    def symbols(self) -> dict[str, str]:
        """Name of the axis by the symbol that inputs have for its size; the first one if several share it."""
        names: dict[str, str] = {}
        for name, node in self.inputs.items():
            axes = self.states[name].axes if name in self.states else self.axes.get(name, ())
            for axis, size in zip(axes, node.meta["val"].shape, strict=True) if axes else ():
                if not isinstance(size, int):
                    names.setdefault(str(size), axis)
        return names

    def port(self, name: str) -> Port:
        """What an input or output looks like to a caller."""
        value = {**self.inputs, **self.outputs}[name].meta["val"]
        sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
        return Port(axes=self.axes[name], dtype=dtype_name(value.dtype), sizes=sizes)

    def weight_names(self) -> dict[str, str]:
        """Weight name by the placeholder that holds it."""
        return {
            spec.arg.name: spec.target
            for spec in self.program.graph_signature.input_specs
            if spec.kind is not InputKind.USER_INPUT and spec.target is not None
        }

    def weight_of(self, node: Any) -> tuple[str, Weight] | None:
        """Name and recipe of the weight that a placeholder holds; None for any other node."""
        if not is_node(node) or node.op != "placeholder":
            return None
        name = self.weight_names().get(node.name)
        return None if name is None else (name, self.weights[name])

    def call(self, target: Any, args: tuple[Any, ...], origin: Node, kwargs: Mapping[str, Any] | None = None) -> Node:
        """Insert a call before the current insertion point, with its shape known.

        Args:
            target: What to call.
            args: Its arguments.
            origin: The node that the new one stands for; gives it its source lines and module path.
            kwargs: Its keyword arguments.
        """
        node = self.fx.call_function(target, args, dict(kwargs or {}))
        for key in ("stack_trace", "nn_module_stack"):
            if key in origin.meta:
                node.meta[key] = origin.meta[key]
        with fake_mode(self), torch.no_grad():
            values, named = map_arg((args, dict(kwargs or {})), lambda used: used.meta["val"])
            node.meta["val"] = target(*values, **named)
        return node

    def add_weight(self, name: str, weight: Weight) -> Node:
        """Add a weight, or return the node of the one that has that name already."""
        known = {target: placeholder for placeholder, target in self.weight_names().items()}
        nodes = self.placeholders()
        if name in known:
            return nodes[known[name]]
        mode = fake_mode(self)
        with self.fx.inserting_before(next(iter(nodes.values()))):
            node = self.fx.placeholder("w_" + name.replace(".", "_"))
        with mode:
            node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), name, persistent=True)
        self.program.graph_signature.input_specs.insert(0, spec)
        self.program.state_dict[name] = node.meta["val"]
        self.weights[name] = weight
        return node

    def add_tap(self, tap: Tap, node: Node) -> None:
        """Return one more value. Passes that replace the node replace it here too, so a tap outlives them."""
        returned = list(self.output.args[0])
        self.output.args = ([*returned, node],)
        self.program.graph_signature.output_specs.append(
            OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=node.name), None)
        )
        self.output_names, self.taps = (*self.output_names, tap.name), (*self.taps, tap)

    def drop_dead_code(self) -> None:
        """Remove calls nobody uses, then weights nobody reads."""
        self.fx.eliminate_dead_code()
        names, nodes = self.weight_names(), self.placeholders()
        dead = {node for node in names if not nodes[node].users}
        for node in dead:
            self.fx.erase_node(nodes[node])
            self.weights.pop(names[node], None)
            self.program.state_dict.pop(names[node], None)
            self.program.constants.pop(names[node], None)
        specs = self.program.graph_signature.input_specs
        specs[:] = [spec for spec in specs if spec.arg.name not in dead]

    def clone(self) -> Graph:
        """Copy the nodes and share the weights: a pass must not double a 27B model."""
        old = self.program
        fx = torch.fx.Graph()
        env: dict[Node, Node] = {}
        for node in old.graph.nodes:
            env[node] = fx.node_copy(node, lambda used: env[used])
        program = ExportedProgram(
            root=old.graph_module,
            graph=fx,
            graph_signature=copy.deepcopy(old.graph_signature),
            state_dict=dict(old.state_dict),
            range_constraints=dict(old.range_constraints),
            module_call_graph=old.module_call_graph,
            example_inputs=old.example_inputs,
            constants=dict(old.constants),
            verifiers=old.verifiers,
        )
        return dataclasses.replace(self, program=program, weights=dict(self.weights))

    def settle_outputs(self) -> None:
        """Make the signature's output names those of the nodes that are returned."""
        for spec, node in zip(self.program.graph_signature.output_specs, self.output.args[0], strict=True):
            spec.arg.name = node.name

    def digest(self) -> tuple[str, ...]:
        """A line a node; equal digests mean that nothing changed."""
        return tuple(
            f"{node.name}={node.target}{node.args}{node.kwargs}:{_shape(node.meta.get('val'))}"
            for node in self.fx.nodes
        )


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as states and ports name it: "float32" and so on."""
    return str(dtype).removeprefix("torch.")


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dtype, *(size if isinstance(size, int) else _text(size.node.expr) for size in value.shape))
    return tuple(map(_shape, value)) if isinstance(value, (tuple, list)) else value


# Sympy takes long to write a size.
_text = functools.lru_cache(str)


def fake_mode(graph: Graph) -> Any:
    """The mode that the program's fake values belong to."""
    from torch._guards import detect_fake_mode

    first = next(iter(graph.fx.nodes))
    mode = detect_fake_mode([first.meta["val"]])
    if mode is None:
        raise InvariantError("the program's inputs carry no fake values: export it again with torch.export.export")
    return mode


def refresh(graph: Graph) -> None:
    """Compute again the values of nodes whose inputs changed shape or dtype."""
    changed: set[Node] = set()
    with fake_mode(graph), torch.no_grad():
        for node in graph.fx.nodes:
            if node.op == "placeholder" and node.meta.pop("changed", False):
                changed.add(node)
            if node.op != "call_function":
                continue
            if "val" in node.meta and not any(used in changed for used in node.all_input_nodes):
                continue
            args, kwargs = map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
            value = node.target(*args, **kwargs)
            if "val" not in node.meta or _shape(value) != _shape(node.meta["val"]):
                changed.add(node)
            node.meta["val"] = value


def run_nodes(wanted: Iterable[Node], known: Mapping[Node, Any]) -> dict[Node, Any]:
    """Evaluate just the nodes that `wanted` needs.

    Args:
        wanted: Nodes to evaluate.
        known: Values of input nodes.

    Raises:
        KeyError: If an input is needed and not known.
    """
    values: dict[Node, Any] = dict(known)
    stack = list(wanted)
    with torch.no_grad():
        while stack:
            node = stack[-1]
            if node in values:
                stack.pop()
            elif node.op != "call_function":
                raise KeyError(node.name)
            elif missing := [used for used in node.all_input_nodes if used not in values]:
                stack.extend(missing)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), lambda used: values[used])
                values[node] = node.target(*args, **kwargs)
                stack.pop()
    return values
