"""FuseCacheWrites: writing new keys or values into their slots becomes one `transom.write_cache`.

Precondition: `Canonicalize` has run.
Rewrite: `index_copy(cache, 2, slots, new)` where the slots are found by evaluation to be `(start + i) % S`.
Skips: any other placement of tokens in slots, with the reason.
Afterwards: a cache that comes in is read by what writes into it, and by nothing else. Attention reads what was written,
so any number of layers may attend over one cache.
"""

from __future__ import annotations

import torch

from transom.errors import InvariantError
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.masks import depends_on_values, evaluate
from transom.graphs.match import aten, is_call, layer_path
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.canonicalize import Canonicalize


class FuseCacheWrites(Pass):
    """Name the write of position p into slot p % S."""

    after = (Canonicalize,)

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
                fused = graph.call(ops.WRITE_CACHE, (cache, new, inputs["start"]), node, {"heads_first": True})
            node.replace_all_uses_with(fused)
            changes += 1
        return Rewrite(changes=changes, skipped=tuple(skipped))

    def ensures(self, graph: Graph) -> None:
        """No cache is read as it was before the call: runtimes write in place, so that nothing of it may be left."""
        inputs, early = graph.inputs, list[str]()
        for name, state in graph.states.items():
            users = [user for user in inputs[name].users if not is_call(user, aten.sym_size.int)]
            if state.is_ring and len(users) > 1:
                readers = sorted({layer_path(user) or user.name for user in users})
                early.append(f"{name} (in {', '.join(readers)})")
        if early:
            raise InvariantError(
                f"{'; '.join(early)}: a cache is used besides by what writes into it, but runtimes write in place: let "
                "attention read what was written"
            )


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
