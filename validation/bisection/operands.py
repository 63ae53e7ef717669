"""What may be wrong with what attention is given: another layer's keys and values, a step less, a rotation too many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.validation.bisection.context import Site
from transom.validation.bisection.replay import Changes, Replay


def of_operands(replay: Replay) -> Iterator[tuple[str, Changes]]:
    """Causes, and what would take the place of queries, keys and values."""
    yield from _of_other_layers(replay)
    steps = {node: replay.context.site(name) for node, name in replay.site.inputs.items()}
    keys = [step for step in steps.values() if step.tap.op == "rope"][-1:]
    for node, step in steps.items():
        # A step whose input has the size of its output may have been passed over.
        sources = [replay.recorded.get(source) for source in step.inputs]
        if len(sources) == 1 and sources[0] is not None and sources[0].numel() == replay.recorded[node].numel():
            yield f"{step.tap.name.removeprefix('tap.')} is passed over", _given(replay, {node: sources[0]})
        for rotation in keys if step.tap.op != "rope" else ():
            (source,) = rotation.inputs
            values = replay.recorded[node]
            if source in replay.recorded and replay.recorded[source].numel() == values.numel():
                rotated = _elsewhere(replay, rotation, {source: values}).run()
                yield "the values are rotated, as the keys are", _given(replay, {node: rotated})


def _of_other_layers(replay: Replay) -> Iterator[tuple[str, Changes]]:
    """What another layer writes takes the place of what this one reads."""
    own = replay.site.calls(aten.index_copy.default)
    tried = [own]
    for other in replay.context.sites("attention"):
        written = other.calls(aten.index_copy.default)
        alike = [_heads(node) for node in written] == [_heads(node) for node in own]
        if alike and written not in tried and other.inputs.keys() <= replay.recorded.keys():
            tried.append(written)
            there = _elsewhere(replay, other, {node: replay.recorded[node] for node in other.inputs})
            values = {mine: there.value(theirs) for mine, theirs in zip(own, written, strict=True)}
            cause = f"it reads the keys and values of layer {other.tap.layer}"
            yield cause, {mine: lambda _, value=value: value for mine, value in values.items()}  # type: ignore[misc]


def _heads(written: Node) -> tuple[int, ...]:
    """Heads and width of a cache."""
    shape = written.meta["val"].shape
    return shape[1], shape[3]


def _elsewhere(replay: Replay, site: Site, inputs: Mapping[Node, torch.Tensor]) -> Replay:
    """Another site, on numbers of the same run."""
    output = replay.recorded.get(site.node, replay.output)
    return Replay(site=site, context=replay.context, inputs=inputs, output=output, calls=replay.calls)


def _given(replay: Replay, values: Mapping[Node, torch.Tensor]) -> Changes:
    """Other numbers in the place of inputs."""
    changed = {node: replay.in_graph(node, value) for node, value in values.items()}
    return {node: lambda _, value=value: value for node, value in changed.items()}  # type: ignore[misc]
