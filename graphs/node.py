"""torch.fx's `Node`, to static checkers a value of any type.

torch declares a node's arguments as a union of twenty types, so that every pattern (`node.args[0].meta["val"]`) would
need a cast at each step. Patterns are checked by tests in place of types.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch.fx

Node: TypeAlias = Any


def is_node(value: Any) -> bool:
    """Whether a value is a node, and not a number, a list or None."""
    return isinstance(value, torch.fx.Node)
