"""FuseCachedAttention: cache writes and attention become one `transom.cached_attention`, heads after time.

Precondition: `FuseAttention`, `FuseCacheWrites` and `FuseRotary` have run. Where `BoundLocalCaches` ran before, local
caches have `window + chunk - 1` slots; where it follows, `window`, as the fused operation attends before it writes.
Rewrite: attention over two freshly written caches. The transposes that bring heads before time, and back, go away, as
the fused operation takes [B, T, N, H], the layout in which projections come and go.
Skips: attention whose keys or values are no cache writes, with the reason.
"""

from __future__ import annotations

import operator

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call, is_transpose, layer_path
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.passes.fuse_rotary import FuseRotary


class FuseCachedAttention(Pass):
    """One operation for writing the caches and attending over them."""

    after = (FuseAttention, FuseCacheWrites, FuseRotary)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Fuse every attention that reads caches."""
        changes, skipped = 0, list[str]()
        for node in graph.calls(ops.ATTENTION):
            q, k_write, v_write, start, scale, window = node.args
            if not (is_call(k_write, ops.WRITE_CACHE) and is_call(v_write, ops.WRITE_CACHE) and start is not None):
                skipped.append(f"{layer_path(node)}: keys or values do not come from a cache")
                continue
            with graph.fx.inserting_before(node):
                heads_last = [_heads_last(graph, value) for value in (q, k_write.args[1], v_write.args[1])]
                caches = k_write.args[0], v_write.args[0]
                fused = graph.call(ops.CACHED_ATTENTION, (*heads_last, *caches, start, scale, window), node)
                out, k_cache, v_cache = (graph.call(operator.getitem, (fused, index), node) for index in range(3))
                heads_first = graph.call(aten.transpose.int, (out, 1, 2), node)
            for old in [user for user in node.users if is_transpose(user, 1, 2)]:
                old.replace_all_uses_with(out)
            node.replace_all_uses_with(heads_first)
            k_write.replace_all_uses_with(k_cache)
            v_write.replace_all_uses_with(v_cache)
            changes += 1
        return Rewrite(changes=changes, skipped=tuple(skipped))


def _heads_last(graph: Graph, value: Node) -> Node:
    """The value as [B, T, N, H]; a rotation is done in that layout too."""
    if is_transpose(value, 1, 2):
        return value.args[0]
    if is_call(value, ops.ROTARY) and value.args[3] and is_transpose(value.args[0], 1, 2):
        turned = graph.call(ops.ROTARY, (value.args[0].args[0], value.args[1], value.args[2], False), value)
        value.replace_all_uses_with(
            graph.call(aten.transpose.int, (turned, 1, 2), value), delete_user_cb=lambda user: user.op == "output"
        )
        return turned
    return graph.call(aten.transpose.int, (value, 1, 2), value)
