"""The rules that every graph keeps, before the first pass and after each one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.export.graph_signature import InputKind

from transom.errors import InvariantError
from transom.graphs.graph import Graph, dtype_name
from transom.graphs.node import Node
from transom.graphs.state import State


def check(graph: Graph) -> None:
    """Check the IR's rules.

    1. The node list is well formed: every use comes after its definition.
    2. Every call knows the shape and dtype of its result.
    3. Every weight input has a recipe of the shape and dtype that the graph was traced with.
    4. Every state is an input and an output of one shape and dtype, those that it declares.
    5. The signature names the graph's inputs and outputs in order, each of which has a name of its own for callers, and
       torch's own verifier is content.

    Raises:
        InvariantError: Naming the rule that is broken and the nodes that break it.
    """
    try:
        graph.fx.lint()
    except (RuntimeError, AssertionError) as error:
        raise InvariantError(f"the node list is not well formed: {error}") from error
    if missing := [n.name for n in graph.fx.nodes if n.op == "call_function" and "val" not in n.meta]:
        raise InvariantError(f"no shape is known for {missing}: run refresh")
    signature, nodes = graph.program.graph_signature, graph.placeholders()
    if [spec.arg.name for spec in signature.input_specs] != list(nodes):
        raise InvariantError("the signature does not name the graph's inputs in order")
    returned = graph.output.args[0]
    if [spec.arg.name for spec in signature.output_specs] != [node.name for node in returned]:
        raise InvariantError("the signature does not name the graph's outputs in order")
    for spec in signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        value, weight = nodes[spec.arg.name].meta["val"], graph.weights.get(spec.target or "")
        if weight is None:
            raise InvariantError(f"the input {spec.arg.name} reads weight {spec.target!r}, which has no recipe")
        if tuple(value.shape) != weight.shape:
            raise InvariantError(f"weight {spec.target!r} holds {weight.shape} but was traced as {tuple(value.shape)}")
        if value.dtype != weight.dtype:
            raise InvariantError(f"weight {spec.target!r} holds {weight.dtype} but was traced as {value.dtype}")
    passed = [spec for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    for names, count in ((graph.input_names, len(passed)), (graph.output_names, len(returned))):
        if len(set(names)) != count or len(names) != count:
            raise InvariantError(f"{', '.join(names)} do not name {count} inputs or outputs one by one")
    inputs, outputs = graph.inputs, graph.outputs
    for name, state in graph.states.items():
        _check_state(name, state, inputs, outputs)
    try:
        graph.program.validate()  # type: ignore[no-untyped-call]
    except Exception as error:  # torch's verifiers raise whatever they like
        raise InvariantError(f"torch's verifier rejects the program: {error}") from error


def _check_state(name: str, state: State, inputs: Mapping[str, Node], outputs: Mapping[str, Node]) -> None:
    if name != state.name or name not in inputs or name not in outputs:
        raise InvariantError(f"the state {name} is not an input and an output of that name")
    read, written = inputs[name].meta["val"], outputs[name].meta["val"]
    if _symbols(read) != _symbols(written) or read.dtype != written.dtype:
        raise InvariantError(f"{name} goes in as {tuple(read.shape)} and comes out as {tuple(written.shape)}")
    if dtype_name(read.dtype) != state.dtype:
        raise InvariantError(f"{name} declares {state.dtype} but was traced as {dtype_name(read.dtype)}")
    if len(state.axes) != read.dim():
        raise InvariantError(f"{name} declares the axes {', '.join(state.axes)} but was traced with {read.dim()}")
    for axis, declared, size in zip(state.axes, state.sizes, read.shape, strict=True):
        # As text: comparing a symbol with a number would guess, and keep the guess as a fact.
        if declared is not None and str(declared) != str(size):
            raise InvariantError(f"{name} declares {declared} {axis} but was traced with {size}")


def _symbols(value: torch.Tensor) -> tuple[str, ...]:
    return tuple(str(size) for size in value.shape)
