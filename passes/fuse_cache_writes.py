"""FuseCacheWrites: writing new keys or values into their slots becomes one `transom.write_cache`.

Precondition: `Canonicalize` has run; the graph has caches, and one attention reads each. Were there two, as where a
layer attends over what another one wrote, the passes that bound caches and that fuse writes with an attention would
lose keys of the other: such graphs are refused for every target.
Rewrite: `index_copy(cache, 2, slots, new)` where the slots are found by evaluation to be `(start + i) % S`.
Skips: any other placement of tokens in slots, with the reason.
"""

from __future__ import annotations

import torch

from transom.errors import InvariantError
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.masks import depends_on_values, evaluate
from transom.graphs.match import aten, layer_path
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.canonicalize import Canonicalize
from transom.passes.shared_caches import cache_readers


class FuseCacheWrites(Pass):
    """Name the write of position p into slot p % S."""

    after = (Canonicalize,)

    def requires(self, graph: Graph) -> None:
        """No two attentions read one cache."""
        shared: dict[tuple[str, ...], list[str]] = {}
        for name, readers in cache_readers(graph).items():
            if len(readers) > 1:
                shared.setdefault(tuple(layer_path(node) or node.name for node in readers), []).append(name)
        if shared:
            lines = (f"{' and '.join(readers)} read {', '.join(names)}" for readers, names in shared.items())
            raise InvariantError(
                f"{'; '.join(lines)}: a cache may have one reader, as bounding it for one loses keys that another "
                "still sees: give each layer a cache of its own"
            )

    def rewrite(self, graph: Graph) -> Rewrite:
        """Replace every recognised write into a cache input."""
        inputs = graph.inputs
        changes, skipped = 0, list[str]()
        caches = {inputs[name] for name, state in graph.states.items() if state.is_ring}
        rings: dict[tuple[Node, str], bool] = {}
        for node in graph.calls(aten.index_copy.default):
            cache, axis, index, new = node.args
            if cache not in caches:
                continue
            if axis != 2:
                skipped.append(f"{node.name}: writes along axis {axis}, not along the slots")
                continue
            key = (index, str(cache.meta["val"].shape[2]))
            if key not in rings:
                rings[key] = _is_ring(graph, cache, index, new)
            if not rings[key]:
                skipped.append(f"{node.name}: does not write position p into slot p % S")
                continue
            with graph.fx.inserting_before(node):
                fused = graph.call(ops.WRITE_CACHE, (cache, new, inputs["start"]), node)
            node.replace_all_uses_with(fused)
            changes += 1
        return Rewrite(changes=changes, skipped=tuple(skipped))


def _is_ring(graph: Graph, cache: Node, index: Node, new: Node) -> bool:
    if "start" not in graph.input_names or depends_on_values(graph, index):
        return False
    slots, tokens = cache.meta["val"].shape[2], new.meta["val"].shape[2]
    for width in (64,) if not isinstance(slots, int) else (slots,):
        for start in (0, 1, width - 2, width, 5 * width + 3):
            for count in (1, 7) if not isinstance(tokens, int) else (tokens,):
                indices = evaluate(graph, index, {str(slots): width, str(tokens): count}, start)
                if not torch.equal(indices, (start + torch.arange(count)) % width):
                    return False
    return True
