"""Runs a graph's nodes on jax arrays, so that jax can trace it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from torch.fx.node import map_arg

from transom.export.xla.lowerings import COUNTED, TABLE
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import layer_path
from transom.graphs.node import Node

Step = Callable[..., tuple[jax.Array, list[jax.Array], list[jax.Array]]]
"""`(parameters, caches, tokens [1, T], start, count, logit_positions [P]) -> (logits [1, P, V], caches, taps)`."""


def step(graph: Graph, stored_names: Mapping[str, str]) -> Step:
    """A `decode` graph as a function that jax can trace, for any T and P.

    Of the T tokens only the first `count` are valid; what follows is padding, and reaches no cache.

    Args:
        graph: The graph; `lowerings.TABLE` has every operation of it.
        stored_names: Name of the parameter by the graph's name of a weight.
    """
    names, inputs = graph.weight_names(), graph.inputs
    rings = {inputs[name] for name, state in graph.states.items() if state.window is not None}

    def run(
        parameters: Mapping[str, jax.Array],
        caches: Sequence[jax.Array],
        tokens: jax.Array,
        start: jax.Array,
        count: jax.Array,
        logit_positions: jax.Array,
    ) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        given = {"tokens": tokens, "start": start, "logit_positions": logit_positions}
        given |= dict(zip(graph.states, caches, strict=True))
        values: dict[Node, Any] = {node: given[name] for name, node in inputs.items()}
        values |= {
            node: parameters[stored_names[names[name]]] for name, node in graph.placeholders().items() if name in names
        }
        # What computes in float32 must do so on a TPU too, whose products are of bfloat16 unless asked.
        precise = any(cache.dtype == jnp.float32 for cache in caches)
        with jax.default_matmul_precision("highest" if precise else "default"):
            for node in graph.calls_all():
                lower = TABLE[node.target]
                if node.target in COUNTED:
                    lower = functools.partial(lower, count=count)
                if node.target is ops.WRITE_CACHE:
                    lower = functools.partial(lower, wraps=node.args[0] in rings)
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                with jax.named_scope(layer_path(node) or "model"):
                    values[node] = lower(*args, **kwargs)
        returned = {name: values[node] for name, node in graph.outputs.items()}
        return (
            returned["logits"],
            [returned[name] for name in graph.states],
            [value for name, value in returned.items() if name != "logits" and name not in graph.states],
        )

    return run
