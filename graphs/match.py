"""Small helpers for recognising patterns in a graph."""

from __future__ import annotations

from typing import Any

import torch

from transom.graphs.node import Node, is_node

aten = torch.ops.aten

LAYOUT = (
    aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default, aten.unsqueeze.default,
    aten.expand.default, aten.slice.Tensor, aten.repeat_interleave.self_int, aten.clone.default,
    aten.contiguous.default, aten.alias.default,
)  # fmt: skip
"""What rearranges numbers, or repeats them for another head, and computes nothing."""

CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)
"""Changes of dtype."""


def is_call(value: Any, *targets: Any) -> bool:
    """Whether `value` is a node that calls one of the targets."""
    return is_node(value) and value.op == "call_function" and value.target in targets


def arguments(node: Node) -> dict[str, Any]:
    """All that a call passes to its operation, by the names of its schema; defaults for what it leaves out."""
    schema: Any = node.target._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def skip_casts(value: Any) -> Any:
    """Walk up through changes of dtype."""
    while is_call(value, *CASTS):
        value = value.args[0]
    return value


def cast_back(node: Node, x: Node) -> Node:
    """The node that stands for a result of x's dtype: a cast of `node` back to it, where there is one."""
    users = list(node.users)
    if len(users) == 1 and is_call(users[0], *CASTS):
        if users[0].meta["val"].dtype == x.meta["val"].dtype:
            return users[0]
    return node


def split_scalar(node: Any, *targets: Any) -> tuple[Node, float] | None:
    """The node and the number of a call such as `mul(x, 2.0)`, in either order; None if it is something else."""
    if not is_call(node, *targets) or node.kwargs:  # such as alpha, or a rounding mode
        return None
    left, right = node.args[:2]
    if is_node(left) and isinstance(right, (int, float)):
        return left, float(right)
    if is_node(right) and isinstance(left, (int, float)):
        return right, float(left)
    return None


def is_transpose(value: Any, first: int, second: int) -> bool:
    """Whether `value` swaps exactly these two axes (counted from the front)."""
    if is_call(value, aten.transpose.int):
        rank = len(value.meta["val"].shape)
        return {axis % rank for axis in value.args[1:3]} == {first, second}
    if is_call(value, aten.permute.default):
        order = list(range(len(value.args[1])))
        order[first], order[second] = order[second], order[first]
        return [axis % len(order) for axis in value.args[1]] == order
    return False


def source_line(node: Node) -> str:
    """The line of Python that made a node, as "file.py:12: code"; empty if unknown."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    frames = [index for index, line in enumerate(lines) if line.startswith("File ")]
    if not frames:
        return ""
    _, path, rest = lines[frames[-1]].split('"', 2)
    number = rest.split(",")[1].removeprefix(" line ")
    code = lines[frames[-1] + 1] if frames[-1] + 1 < len(lines) else ""
    return f"{path.rsplit('/', 1)[-1]}:{number}: {code}"


def layer_path(node: Node) -> str:
    """Module path of a node in the traced model, such as "layers.3.self_attn"; empty if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix("L['self'].").removeprefix("model.").removeprefix("model")


def upstream(node: Node) -> list[Node]:
    """A node and all that it is computed from."""
    nodes: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in nodes:
            nodes[current] = None
            stack.extend(current.all_input_nodes)
    return list(nodes)
