"""What a kind of ONNX runtime understands: a table of lowerings, one small function for an operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transom.graphs.node import Node

if TYPE_CHECKING:
    from transom.export.onnx.emitter import Emitter

Lowering = Callable[["Emitter", Node], Any]
"""Emits the nodes for one call and returns the name of its value, or a list of names if it has several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """What a kind of ONNX runtime understands.

    Attributes:
        name: Its target name.
        opset: Version of the standard operators, if no lowering requires a later one.
        ir_version: Version of the file format.
        domains: Further operator domains, with their versions.
        lowerings: Lowering by exact operation.
        widens: Whether logits and taps leave as float32, whatever is computed in.
    """

    name: str
    opset: int
    ir_version: int
    domains: Mapping[str, int]
    lowerings: Mapping[Any, Lowering]
    widens: bool = False
