"""Lists of nodes of an ONNX graph, changed as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import onnx


def without_unused(nodes: Sequence[onnx.NodeProto], results: set[str]) -> list[onnx.NodeProto]:
    """Leave out nodes that no result needs: runtimes keep what nothing reads until a run has ended."""
    used, kept = set(results), list[onnx.NodeProto]()
    for node in reversed(nodes):
        if used.intersection(node.output):
            kept.append(node)
            used |= values_read(node)
    return kept[::-1]


def rename(nodes: Sequence[onnx.NodeProto], old: str, new: str) -> None:
    """Let the node that makes `old` make `new`."""
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def values_read(node: onnx.NodeProto) -> set[str]:
    """Values that a node reads, in its branches too."""
    names = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names |= values_read(inner)
    return names
