"""Caches: written in place by TensorScatter, between an input and an output that share one address."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from transom.export.tensorrt.verify.view import FLOAT8, Rule, View, attribute, given, type_name


def _writes(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("TensorScatter"):
        mode = attribute(node, "mode", b"linear").decode()
        if mode != "linear":
            yield node.name, f"TensorScatter in mode {mode!r} is rejected: write to position % slots in mode 'linear'"
        if attribute(node, "axis", -2) not in (-2, 2):
            yield node.name, "TensorScatter must write along the slots, axis -2 of four"
        if not given(node, 2):
            yield node.name, "TensorScatter without write_indices writes at slot 0 every time: give them"


def _places(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("TensorScatter"):
        cache, result = node.input[0], node.output[0]
        if cache not in view.inputs:
            yield node.name, f"the cache {cache!r} is no input of the model: TensorRT updates inputs only"
        if result not in view.outputs:
            yield node.name, f"the written cache {result!r} is no output of the model: return it as it is, no Identity"
        others = [reader for reader in view.readers(cache) if reader is not node]
        if others:
            yield node.name, f"{others[0].name} reads the cache {cache!r} beside its write, in the same memory"


def _capacity(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("TensorScatter"):
        shape = view.shape(node.input[0])
        if shape is not None and len(shape) != 4:
            yield node.name, f"a cache of {len(shape)} axes: give [B, K, S, H]"
        elif shape is None or None in shape:
            yield node.name, f"the cache {node.input[0]!r} has no fixed size: TensorRT asks for a static capacity"


def _narrow(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("TensorScatter", "ScatterND", "ScatterElements"):
        kind = view.type(node.input[0])
        if kind in FLOAT8:
            yield node.name, f"a cache of {type_name(kind)}: {node.op_type} takes none; keep caches in half precision"


def _scatter(view: View) -> Iterator[tuple[str, str]]:
    def is_state(node: NodeProto) -> bool:
        return node.input[0] in view.inputs and node.output[0] in view.outputs

    for node in view.of("ScatterND", "ScatterElements"):
        if is_state(node):
            yield node.name, f"{node.op_type} copies the whole cache every time: write it with TensorScatter"


RULES = (
    Rule(name="cache-write", text="TensorScatter in mode linear, along axis -2, with write_indices", check=_writes),
    Rule(
        name="cache-place", text="caches are inputs, their results outputs, and nothing stands between", check=_places
    ),
    Rule(name="cache-capacity", text="caches of four axes and a fixed size", check=_capacity),
    Rule(name="cache-type", text="no caches of 8-bit floats", check=_narrow),
    Rule(name="cache-scatter", text="TensorScatter in place of ScatterND", check=_scatter),
)
