"""The rules that every graph keeps, before the first pass and after each one."""

from __future__ import annotations

import torch
from torch.export.graph_signature import InputKind

from transom.errors import InvariantError
from transom.graphs.graph import Graph


def check(graph: Graph) -> None:
    """Check the IR's rules.

    1. The node list is well formed: every use comes after its definition.
    2. Every call knows the shape and dtype of its result.
    3. Every weight input has a recipe of the shape and dtype that the graph was traced with.
    4. Every cache is an input and an output of one shape and dtype, and has the slots that it declares.
    5. The signature names the graph's inputs and outputs in order, and torch's own verifier is content.

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
    written_caches = returned[len(returned) - len(graph.caches) - len(graph.taps) : len(returned) - len(graph.taps)]
    for cache, written in zip(graph.caches, written_caches, strict=True):
        read = nodes[cache.input].meta["val"]
        if _symbols(read) != _symbols(written.meta["val"]) or read.dtype != written.meta["val"].dtype:
            raise InvariantError(
                f"{cache.name} goes in as {tuple(read.shape)} and comes out as {tuple(written.meta['val'].shape)}"
            )
        # As text: comparing a symbol with a number would guess, and keep the guess as a fact.
        if cache.slots is not None and _symbols(read)[2] != str(cache.slots):
            raise InvariantError(f"{cache.name} declares {cache.slots} slots but was traced with {read.shape[2]}")
    try:
        graph.program.validate()  # type: ignore[no-untyped-call]
    except Exception as error:  # torch's verifiers raise whatever they like
        raise InvariantError(f"torch's verifier rejects the program: {error}") from error


def _symbols(value: torch.Tensor) -> tuple[str, ...]:
    return tuple(str(size) for size in value.shape)
