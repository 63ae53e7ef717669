"""AttendBeforeWrites: attention over freshly written caches becomes one `transom.attend` over what stood there before.

Precondition: `FuseAttention`, `FuseCacheWrites` and `FuseRotary` have run. Where `BoundLocalCaches` ran before, local
caches have `window + chunk - 1` slots; where it follows, `window`, as nothing is overwritten that is still to be read.
Rewrite: attention over two written caches reads the caches as they came in, and the new keys and values. The writes
move behind the last reader of their cache. The transposes that bring heads before time, and back, go away, as both
operations take [B, T, N, H], the layout in which projections come and go.
Skips: attention whose keys or values are no cache writes; where the runtime attends and writes at once, also that over
a cache with other readers, and that whose mask is more than a window; each with the reason.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.masks import mask_of
from transom.graphs.match import aten, is_call, is_transpose, layer_path
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.passes.fuse_rotary import FuseRotary


class AttendBeforeWrites(Pass):
    """Attention that reads caches before the new tokens are written into them.

    Args:
        at_once: Whether the runtime's attention writes the caches itself, so that nothing else can read them, and knows
            windows only.
    """

    after = (FuseAttention, FuseCacheWrites, FuseRotary)

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once

    def rewrite(self, graph: Graph) -> Rewrite:
        """Rewrite every attention that reads caches."""
        sites = {node: _writes(node) for node in graph.calls(ops.ATTENTION)}
        reasons = {node: "keys or values do not come from a cache" for node, writes in sites.items() if not writes}
        # What one attention still reads as written, no other may read before.
        while late := {node: why for node in sites.keys() - reasons if (why := self._reason(node, sites, reasons))}:
            reasons |= late
        heads_last = dict[Node, Node]()
        last_readers = dict[Node, Node]()
        for node in [node for node in sites if node not in reasons]:
            q, k_write, v_write, *positions = node.args
            with graph.fx.inserting_before(node):
                new = [_heads_last(graph, value, heads_last) for value in (q, k_write.args[1], v_write.args[1])]
                caches = k_write.args[0], v_write.args[0]
                attended = graph.call(ops.ATTEND, (*new, *caches, *positions), node, node.kwargs)
                heads_first = graph.call(aten.transpose.int, (attended, 1, 2), node)
            for old in [user for user in node.users if is_transpose(user, 1, 2)]:
                old.replace_all_uses_with(attended)
            node.replace_all_uses_with(heads_first)
            graph.fx.erase_node(node)
            last_readers |= {k_write: attended, v_write: attended}
        for write, reader in last_readers.items():
            cache, value, start = write.args
            with graph.fx.inserting_after(reader):
                args = cache, heads_last[value], start
                write.replace_all_uses_with(graph.call(ops.WRITE_CACHE, args, write, {"heads_first": False}))
        skipped = tuple(f"{layer_path(node)}: {reasons[node]}" for node in sites if node in reasons)
        return Rewrite(changes=len(sites) - len(skipped), skipped=skipped)

    def _reason(self, node: Node, sites: Mapping[Node, set[Node]], reasons: Container[Node]) -> str | None:
        """Why an attention cannot read its caches before they are written, or None."""
        readers = {user for write in sites[node] for user in write.users if user.op != "output"}
        if any(reader not in sites or reader in reasons for reader in readers):
            return "what was written into its cache is read by something else too"
        if self.at_once and (len(readers) > 1 or len(sites[node]) < 2):
            return "its cache is read more than once, so it is written first"
        if self.at_once and not mask_of(node).is_window:
            return "its mask is more than a window, so its cache is written first"
        return None


def _writes(node: Node) -> set[Node]:
    """The writes of the keys and of the values that an attention reads; empty if it reads something else."""
    _, k, v, start, *_ = node.args
    return {k, v} if start is not None and is_call(k, ops.WRITE_CACHE) and is_call(v, ops.WRITE_CACHE) else set()


def _heads_last(graph: Graph, value: Node, known: dict[Node, Node]) -> Node:
    """The value as [B, T, N, H]; rotations and norms of heads are done in that layout too."""
    if value not in known:
        if is_transpose(value, 1, 2):
            known[value] = value.args[0]
        elif _is_turned(value):
            args = [_heads_last(graph, value.args[0], known), *value.args[1:]]
            if is_call(value, ops.ROTARY):
                args[3] = False
            turned = graph.call(value.target, tuple(args), value)
            value.replace_all_uses_with(
                graph.call(aten.transpose.int, (turned, 1, 2), value), delete_user_cb=lambda user: user.op == "output"
            )
            known[value] = turned
        else:
            known[value] = graph.call(aten.transpose.int, (value, 1, 2), value)
    return known[value]


def _is_turned(value: Node) -> bool:
    """Whether a value is a transpose of [B, T, N, H], or what norms and rotations make of one, head by head."""
    while (is_call(value, ops.ROTARY) and value.args[3]) or is_call(value, ops.RMS_NORM):
        value = value.args[0]
    return is_transpose(value, 1, 2)
