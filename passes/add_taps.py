"""AddTaps: the graph also returns the values at the borders of its operations, so that runs can be compared there.

Precondition: a graph as it was traced. Passes that replace a node replace it among the outputs too, so taps that are
there from the start outlive every fusion.
Rewrite: taps after the embedding, every norm, projection and rotation, attention (what the output projection reads),
the MLP's product of gate and up or its one activation, every mixture of experts, every average over positions, every
convolution, state space and delta rule, and every residual add, in the order of execution. Names are module paths.
Skips: projections that an activation reads (a fusion may make one call of both), what is inside of a mixture of experts
(of which only the chosen are computed later), and the head: its logits are returned
anyway. A tap keeps `SelectLogits` from moving above it, so with taps the last layer's MLP and the final
norm run at every position; all other passes do what they do without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from transom.errors import InvariantError
from transom.graphs import ops
from transom.graphs.graph import Graph, Tap
from transom.graphs.match import CASTS, LAYOUT, aten, is_call, layer_path, skip_casts, source_line, split_scalar
from transom.graphs.node import Node, is_node
from transom.passes.base import Pass, Rewrite
from transom.passes.fuse_experts import sum_of_shares

FUSED = (ops.RMS_NORM, ops.ATTENTION, ops.WRITE_CACHE, ops.ROTARY, ops.GATED, ops.ATTEND, ops.EXPERTS)
"""Operations that only a fusion makes."""
_SDPA = aten.scaled_dot_product_attention.default
_ACTIVATIONS = (aten.gelu.default, aten.silu.default, aten.relu.default)
_WRAPPERS = re.compile(r"^(?:L\['self']|model|language_model)?\.")

_Site = tuple[Node, str, str]
"""The node, the name of its site and what computes it."""


class AddTaps(Pass):
    """Return intermediate values beside the results."""

    def requires(self, graph: Graph) -> None:
        """Nothing is fused yet."""
        if not graph.taps and (fused := graph.calls(*FUSED)):
            raise InvariantError(f"AddTaps must run first, but the graph holds {fused[0].target} already")

    def rewrite(self, graph: Graph) -> Rewrite:
        """Tap every site that is found; none if the graph has taps.

        Raises:
            InvariantError: If a site has no module path to be named after, or two sites have one name.
        """
        if graph.taps:
            return Rewrite(changes=0)
        sites = [*_embeddings(graph), *_norms(graph), *_projections(graph), *_activations(graph), *_averages(graph)]
        sites += _summaries(graph)
        inside = _inside_of_mixtures(graph)
        sites = [site for site in sites if site[0] not in inside] + [*_mixtures(graph)]
        sites += [*_attentions(graph, {node for node, _, _ in sites}), *_residuals(graph, sites)]
        order = {node: index for index, node in enumerate(graph.fx.nodes)}
        names: dict[str, Node] = {}
        for node, name, op in sorted(sites, key=lambda site: order[site[0]]):
            if name in names:
                both = f"{names[name].name} and {node.name}"
                raise InvariantError(f"both {both} would be the tap {name!r}: give each a module of its own")
            names[name] = node
            layer = re.search(r"layers\.(\d+)", name)
            graph.add_tap(Tap(name=f"tap.{name}", layer=int(layer[1]) if layer else None, op=op), node)
        return Rewrite(changes=len(names))


def _path(node: Node, path: str = "") -> str:
    """Module path of a node, or a given one, less what wraps the decoder."""
    path = path or layer_path(node)
    while (shorter := _WRAPPERS.sub("", path)) != path:
        path = shorter
    if not path:
        where = source_line(node) or node.name
        raise InvariantError(f"there is no module path to name a tap after at {where}: export a module of modules")
    return path


def _only_user(node: Node, *targets: Any) -> Node | None:
    """The one call that reads a node, if it calls one of the targets; sizes and assertions do not count."""
    readers = [user for user in node.users if not is_call(user, aten._assert_tensor_metadata.default)]
    readers = [user for user in readers if not is_call(user, aten.sym_size.int)]
    return readers[0] if len(readers) == 1 and is_call(readers[0], *targets) else None


def _embeddings(graph: Graph) -> Iterator[_Site]:
    for node in graph.calls(aten.embedding.default):
        scaled = _only_user(node, aten.mul.Tensor)
        is_scaled = scaled is not None and all(side is node or _is_number(side) for side in scaled.args[:2])
        vectors = scaled if scaled is not None and is_scaled else node
        # Soft tokens take the place of some.
        mixed = next((user for user in vectors.users if is_call(user, aten.where.self)), vectors)
        yield mixed, _path(node), "embedding"
    for node in graph.calls(aten.add.Tensor):
        table = graph.weight_of(node.args[1])
        if table is not None and len(table[1].shape) == 2:
            yield node, _path(node), "embedding"


def _is_number(side: Any) -> bool:
    return not is_node(side) or (isinstance(side.meta["val"], torch.Tensor) and side.meta["val"].shape in ((), (1,)))


def _norms(graph: Graph) -> Iterator[_Site]:
    """From the reciprocal root on: the product with x, the product with the weight, the cast back."""
    for inverse in graph.calls(aten.rsqrt.default):
        node = _only_user(inverse, aten.mul.Tensor)
        if node is None:
            continue
        path = _path(inverse)
        # A weight is as wide as the model; what else the norm's result is multiplied with has positions too.
        while (user := _only_user(node, aten.mul.Tensor, *CASTS)) is not None:
            others = [side for side in user.args[:2] if is_node(side) and side is not node]
            is_weight = any(side.meta["val"].dim() < 2 for side in others)
            if user.target is aten.mul.Tensor and not (is_weight and _path(user) == path):
                break
            if user.target is not aten.mul.Tensor and _path(user) != path:
                break
            node = user
        yield node, path, "norm"
    for node in graph.calls(aten.layer_norm.default):
        yield node, _path(node), "norm"


def _projections(graph: Graph) -> Iterator[_Site]:
    tables = [node.args[0].meta["val"].shape[0] for node in graph.calls(aten.embedding.default)]
    for node in graph.calls(aten.linear.default):
        weight = node.args[1]
        named_weight = graph.weight_of(weight.args[0] if is_call(weight, aten.flatten.using_ints) else weight)
        if named_weight is None or named_weight[1].shape[0] in tables or _feeds_gate(node):
            continue
        yield node, _path(node, named_weight[0].removesuffix(".weight")), "projection"


def _feeds_gate(linear: Node) -> bool:
    """Whether an activation reads a projection, or it is the up of a gated MLP."""
    return any(
        is_call(user, *_ACTIVATIONS) or (is_call(user, aten.mul.Tensor) and _is_gated(user)) for user in linear.users
    )


def _is_gated(product: Node) -> bool:
    return any(is_call(skip_casts(side), *_ACTIVATIONS) for side in product.args[:2])


def _activations(graph: Graph) -> Iterator[_Site]:
    for node in graph.calls(aten.mul.Tensor):
        if _is_gated(node):
            yield node, f"{_path(node)}.activation", "activation"
    for node in graph.calls(*_ACTIVATIONS):
        if not any(is_call(user, aten.mul.Tensor) and _is_gated(user) for user in _readers(node)):
            yield node, f"{_path(node)}.activation", "activation"


def _averages(graph: Graph) -> Iterator[_Site]:
    """Means over positions, laid out as those that read them take them."""
    for node in graph.calls(aten.mean.dim):
        if all(axis not in (-1, node.args[0].meta["val"].dim() - 1) for axis in node.args[1]):
            yield _only_user(node, *LAYOUT) or node, f"{_path(node)}.average", "average"


def _summaries(graph: Graph) -> Iterator[_Site]:
    """What a call computes with a summary, beside the summary itself."""
    names = {ops.CAUSAL_CONVOLUTION: "convolution", ops.STATE_SPACE: "state_space", ops.DELTA_RULE: "delta_rule"}
    for node in graph.calls(*names):
        result = next(user for user in node.users if user.args[1] == 0)
        yield result, f"{_path(node)}.{names[node.target]}", names[node.target]


def _mixtures(graph: Graph) -> Iterator[_Site]:
    for scattered in graph.calls(aten.scatter.src):
        if (total := sum_of_shares(scattered)) is not None:
            yield total, _path(total), "experts"


def _inside_of_mixtures(graph: Graph) -> set[Node]:
    """What is computed of every expert, from the first projection on."""
    inside: set[Node] = set()
    for total, _, _ in _mixtures(graph):
        above = [total]
        while above:
            for node in above.pop().all_input_nodes:
                if node.op == "call_function" and node not in inside and not is_call(node, aten.scatter.src):
                    inside.add(node)
                    above += [] if is_call(node, aten.linear.default) else [node]
    return inside


def _attentions(graph: Graph, tapped: set[Node]) -> Iterator[_Site]:
    for node in graph.calls(aten.softmax.int, aten._softmax.default, _SDPA):
        if node.target is _SDPA:
            out, (q, k) = node, node.args[:2]
        else:
            product = _upwards(node.args[0], lambda value: is_call(value, aten.matmul.default, aten.bmm.default))
            through = (*CASTS, aten.dropout.default, aten.slice.Tensor)
            out = _downwards(node, *through, until=(aten.matmul.default, aten.bmm.default))
            if product is None or out is None:
                continue
            q, k = product.args
        path = _path(node)
        for name, operand in (("q_rope", q), ("k_rope", k)):
            rotated = _before_layout(operand)
            # Another layer may have made it already.
            if rotated not in tapped and _before_layout(rotated, *CASTS) not in tapped:
                tapped = tapped | {rotated}
                yield rotated, f"{path}.{name}", "rope"
        projection = _downwards(out, *CASTS, *LAYOUT, until=(aten.linear.default,))
        yield (out if projection is None else projection.args[0]), f"{path}.attention", "attention"


def _upwards(value: Any, wanted: Any) -> Node | None:
    """The first operand that is wanted, upwards through masks, caps, scales, casts and what sinks are joined to."""
    while is_node(value) and value.op == "call_function":
        if wanted(value):
            return value
        if value.target in (aten.where.self, aten.where.ScalarOther):
            value = value.args[1]
        elif value.target is aten.cat.default:
            value = value.args[0][0]
        else:
            value = value.args[0]
    return None


def _downwards(node: Node, *through: Any, until: tuple[Any, ...]) -> Node | None:
    while (user := _only_user(node, *through, *until)) is not None:
        if user.target in until:
            return user
        node = user
    return None


def _before_layout(value: Node, *through: Any) -> Node:
    """What a query or key was before it was scaled, cached, repeated and laid out for the scores."""
    while True:
        if is_call(value, *LAYOUT, *through):
            value = value.args[0]
        elif (scaled := split_scalar(value, aten.mul.Tensor, aten.div.Tensor)) is not None:
            value = scaled[0]
        elif is_call(value, aten.index_copy.default):
            value = value.args[3]
        else:
            return value


def _residuals(graph: Graph, sites: list[_Site]) -> Iterator[_Site]:
    """The stream from the embedding on: adds of something of its shape and products with a number continue it."""
    starts = [node for node, _, op in sites if op == "embedding"]
    stream = starts[0] if starts else None
    counts: dict[str, int] = {}
    while stream is not None:
        shape, following = str(stream.meta["val"].shape), None
        for node in _readers(stream):
            if is_call(node, aten.add.Tensor) and all(is_node(side) for side in node.args[:2]):
                if all(str(side.meta["val"].shape) == shape for side in node.args[:2]):
                    following = node
                    path = _path(node)
                    counts[path] = counts.get(path, 0) + 1
                    yield node, f"{path}.residual.{counts[path]}", "residual"
                    break
            if is_call(node, aten.mul.Tensor) and all(side is stream or _is_number(side) for side in node.args[:2]):
                following = node
                break
            # A norm that alone reads the embedding.
            if is_call(node, aten.layer_norm.default) and len([*_readers(stream)]) == 1 and stream is starts[0]:
                following = node
                break
        stream = following


def _readers(node: Node) -> Iterator[Node]:
    """What reads a node's numbers, itself or after a cast."""
    for user in node.users:
        if is_call(user, *CASTS):
            # What is cast to its dtype is another value.
            if user.args[0] is node:
                yield from _readers(user)
        elif not is_call(user, aten._assert_tensor_metadata.default, aten.sym_size.int):
            yield user
