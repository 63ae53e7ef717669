"""Calibration: layer by layer, what goes into every linear, so that its weight can be rounded for it.

A layer sees what the layers before it give once they are rounded, and its own linears are rounded in the order in
which they run. One layer's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from transom.errors import QuantizationError
from transom.formats.rounding import Rounded
from transom.formats.schemes import QuantSpec
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.graphs.threads import one_thread
from transom.graphs.weight import Weight
from transom.passes.conversion import Conversion
from transom.training.checkpoint import with_codes
from transom.training.gptq import gptq
from transom.training.stages import Stage, Stages

Quantizer = Callable[[torch.Tensor, torch.Tensor, QuantSpec], Rounded]
"""`(weight [R, K], moments [K, K], spec) -> codes`; see `gptq`."""


def calibrate(
    graph: Graph,
    specs: Mapping[str, QuantSpec],
    sequences_NT: torch.Tensor,
    *,
    quantizer: Quantizer = gptq,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Weight], dict[str, Conversion]]:
    """Round the weights of linears for a text.

    Args:
        graph: A `score` graph after `Canonicalize` and `ShareEmbedding`.
        specs: Spec by name of the weight, of linears only; others stay as they are.
        sequences_NT: The text, int64.
        quantizer: How one weight is rounded.
        on_progress: Called with layers (done, total).

    Returns:
        Weights that carry their codes, and what became of them, by name.

    Raises:
        QuantizationError: If a weight is not finite, or what goes into it is not.
    """
    stages = Stages(graph)
    rounded_weights: dict[str, Weight] = {}
    records: dict[str, Conversion] = {}
    batches = [stages.start(tokens_T[None]) for tokens_T in sequences_NT]
    with torch.no_grad():
        for done, stage in enumerate(stages.stages):
            weights = {name: graph.weights[name].read() for name in stage.weights}
            for group in _groups(stage, graph, specs):
                moments = _moments(stages, stage, weights, batches, group[0])
                for node in group:
                    name, weight = _weight(graph, node)
                    _check_finite(name, weights[name], moments)
                    with one_thread():
                        codes = quantizer(weights[name], moments, specs[name])
                    rounded_weights[name] = with_codes(weight, specs[name], codes)
                    records[name] = _record(name, weight, specs[name])
                    raw, weights[name] = weights[name], rounded_weights[name].read()
                    records[name].measure(raw, weights[name])
            for values in batches:
                outputs = stages.run(stage, weights, [values[node] for node in stage.inputs])
                values |= zip(stage.outputs, outputs, strict=True)
                _forget(values, stages, done)
            on_progress(done + 1, len(stages.stages))
    return rounded_weights, records


def _record(name: str, weight: Weight, spec: QuantSpec) -> Conversion:
    source = weight.encoded.name if weight.encoded else ""
    return Conversion(weight=name, format=spec.format, block=spec.group(weight.shape[1]), source=source, kept=False)


def _weight(graph: Graph, node: Node) -> tuple[str, Weight]:
    named_weight = graph.weight_of(node.args[1])
    assert named_weight is not None, f"{node} multiplies by no weight"
    return named_weight


def _groups(stage: Stage, graph: Graph, specs: Mapping[str, QuantSpec]) -> list[list[Node]]:
    """Linears of a stage that read the same value, in the order in which they run."""
    groups: dict[Node, list[Node]] = {}
    for node in stage.nodes:
        if (
            node.target is aten.linear.default
            and (named_weight := graph.weight_of(node.args[1]))
            and named_weight[0] in specs
        ):
            groups.setdefault(node.args[0], []).append(node)
    return list(groups.values())


def _moments(
    stages: Stages, stage: Stage, weights: Mapping[str, torch.Tensor], batches: list[dict[Node, Any]], linear: Node
) -> torch.Tensor:
    """Sum of x x^T over everything that goes into a linear, float32 [K, K]."""
    columns = int(linear.args[0].meta["val"].shape[-1])
    total = torch.zeros(columns, columns)

    def watch(node: Node, args: Any, _: Any) -> None:
        if node is linear:
            x = args[0].reshape(-1, columns).float()
            total.addmm_(x.T, x)

    for values in batches:
        stages.run(stage, weights, [values[node] for node in stage.inputs], watch)
    return total


def _check_finite(name: str, weight: torch.Tensor, moments: torch.Tensor) -> None:
    for what, values in (("it", weight), ("what goes into it", moments)):
        if not bool(torch.isfinite(values).all()):
            raise QuantizationError(f"{name}: {what} holds NaN or infinity: mend the checkpoint")


def _forget(values: dict[Node, Any], stages: Stages, done: int) -> None:
    """Drop what no later stage reads."""
    wanted = {node for stage in stages.stages[done + 1 :] for node in stage.inputs}
    for node in [node for node in values if node not in wanted and not stages.is_result(node)]:
        del values[node]
