"""Runs a graph's nodes on jax arrays, so that jax can trace it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from torch.fx.node import map_arg

from transom.export.xla.lowerings import COUNTED, DTYPES, TABLE
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, layer_path
from transom.graphs.node import Node

Step = Callable[..., tuple[jax.Array, list[jax.Array], list[jax.Array]]]
"""`(parameters, caches, *inputs) -> (result, caches, taps)`, for the inputs of `input_names`.

Of a decoder these are tokens [1, T], start, count, logit_positions [P], and of one that sees images until [T] and soft
[1, T, D]; the result is logits [1, P, V]. Of an encoder: pixels [1, 3, S, S] to soft tokens [1, Q, D].
"""

COUNT = "count"


def input_names(graph: Graph) -> list[str]:
    """What a program takes beside parameters and caches, in order."""
    names = [name for name in graph.input_names if name not in graph.states]
    # Programs have static shapes, so they are told how many of the tokens are no padding.
    return [name for one in names for name in ((one, COUNT) if one == "start" else (one,))]


def step(graph: Graph, stored_names: Mapping[str, str]) -> Step:
    """A graph as a function that jax can trace, for any T and P.

    Of a decoder's T tokens only the first `count` are valid; what follows is padding, and reaches no cache.

    Args:
        graph: The graph; `lowerings.TABLE` has every operation of it.
        stored_names: Name of the parameter by the graph's name of a weight.
    """
    names, inputs, wanted = graph.weight_names(), graph.inputs, input_names(graph)
    # A decoder computes in the dtype of its caches, though some summaries are float32 in any; an encoder in that of
    # its products.
    products = graph.calls(aten.linear.default, ops.LINEAR_QUANTIZED)
    kept = {DTYPES[inputs[name].meta["val"].dtype] for name in graph.states}
    computed = kept - {jnp.float32} or kept or {DTYPES[node.meta["val"].dtype] for node in products}
    rings = {inputs[name] for name, state in graph.states.items() if state.window is not None}
    streams = _residual_streams(graph)

    def run(
        parameters: Mapping[str, jax.Array],
        caches: Sequence[jax.Array],
        *given_inputs: jax.Array,
    ) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        given = dict(zip((*wanted, *graph.states), (*given_inputs, *caches), strict=True))
        values: dict[Node, Any] = {node: given[name] for name, node in inputs.items()}
        values |= {
            node: parameters[stored_names[names[name]]] for name, node in graph.placeholders().items() if name in names
        }
        # What computes in float32 must do so on a TPU too, whose products are of bfloat16 unless asked.
        precise = jnp.float32 in computed
        with jax.default_matmul_precision("highest" if precise else "default"):
            for node in graph.calls_all():
                lower = TABLE[node.target]
                if node.target in COUNTED:
                    lower = functools.partial(lower, count=given.get(COUNT))
                if node.target is ops.WRITE_CACHE:
                    lower = functools.partial(lower, wraps=node.args[0] in rings)
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                with jax.named_scope(layer_path(node) or "model"):
                    values[node] = lower(*args, **kwargs)
                    if node in streams:
                        values[node] = jax.lax.optimization_barrier(values[node])
        returned = {name: values[node] for name, node in graph.outputs.items()}
        return (
            returned[graph.output_names[0]],
            [returned[name] for name in graph.states],
            [returned[tap.name] for tap in graph.taps],
        )

    return run


def _residual_streams(graph: Graph) -> set[Node]:
    """Sums of activations that several operations read, such as what a layer adds to its input.

    They are to be computed once. XLA would add them up anew wherever they are read, and so keep the results of all
    layers until the last one: of an encoder of 27 layers, 4,096 patches and a width of 1,152, 802 MiB on a TPU in
    bfloat16, where 36 MiB are enough.
    """
    sums = graph.calls(aten.add.Tensor)
    return {node for node in sums if len(node.users) > 1 and node.meta["val"].is_floating_point()}
