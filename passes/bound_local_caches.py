"""BoundLocalCaches: strip the growth of local layers' caches.

Precondition: `FuseAttention` and `FuseCacheWrites` have run, so that every cache is read by attention whose mask is
known. Its reach is the window: the newest positions among which are all keys that some token still sees.
Rewrite: a cache that only local layers read gets as many slots as the most demanding of its readers needs, for good.
Attention over what was written needs `window + chunk - 1`: a chunk of `chunk` new tokens overwrites that many slots,
and its first token still sees the `window - 1` keys before it. Where a ring is written only up to its end and calls
are not to be cut there (`whole_calls`), it needs `chunk - 1` more: a call that does not fit goes to the front, and
leaves up to that many slots behind. Attention over what stood there before (`transom.attend`) needs `window`. Caches of
one layer are read together, so they get the same number.
Skips: caches that a global layer reads; caches that are read by something other than fused attention, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from transom.errors import InvariantError
from transom.graphs import ops
from transom.graphs.graph import Graph, fake_mode
from transom.graphs.masks import mask_of
from transom.graphs.match import aten, is_call, layer_path
from transom.graphs.node import Node
from transom.graphs.state import SLOTS
from transom.passes.base import Pass, Rewrite
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reader:
    """Attention over a cache.

    Attributes:
        node: The call.
        window: Newest positions among which are all keys that a token sees; 0 if there is no bound.
        slots: Slots that it needs; 0 if it sees all keys.
    """

    node: Node
    window: int
    slots: int


class BoundLocalCaches(Pass):
    """Give local layers' caches a fixed number of slots.

    Args:
        chunk: Largest number of new tokens in one call.
        whole_calls: Whether a graph that takes images, which are not to be cut, is called so that no call crosses a
            ring's end.
    """

    after = (FuseAttention, FuseCacheWrites)

    def __init__(self, chunk: int, *, whole_calls: bool = False) -> None:
        self.chunk, self.whole_calls = chunk, whole_calls

    def requires(self, graph: Graph) -> None:
        """The chunk is positive."""
        if self.chunk < 1:
            raise InvariantError(f"a chunk holds at least one token, got {self.chunk}")

    def rewrite(self, graph: Graph) -> Rewrite:
        """Resize the caches of local layers and note every cache's window."""
        changes, skipped, states = 0, list[str](), dict(graph.states)
        readers = self._readers(graph)
        for rings in _by_layer(graph):
            unknown = [name for name in rings if not readers[name]]
            windows = {reader.window for name in rings for reader in readers[name] or ()}
            slots = max((reader.slots for name in rings for reader in readers[name] or ()), default=0)
            if unknown:
                for name in rings:
                    other = "" if name in unknown else " of the cache beside it"
                    reason = f"not every reader{other} is attention with a known window, so it still grows"
                    skipped.append(f"{name}: {reason}")
            elif 0 not in windows:
                for name in rings:
                    if states[name].slots is None:
                        self._resize(graph, name, slots)
                        states[name] = dataclasses.replace(states[name].fixed(slots=slots), window=max(windows))
                        changes += 1
        graph.states = states
        return Rewrite(changes=changes, skipped=tuple(skipped))

    def _resize(self, graph: Graph, name: str, slots: int) -> None:
        node, axis = graph.inputs[name], graph.states[name].axes.index(SLOTS)
        sizes = list(node.meta["val"].shape)
        with fake_mode(graph):
            node.meta["val"] = node.meta["val"].new_empty((*sizes[:axis], slots, *sizes[axis + 1 :]))
        node.meta["changed"] = True

    def ensures(self, graph: Graph) -> None:
        """No cache that only local layers read grows unreported, and none is too small for one of its readers."""
        readers = self._readers(graph)
        for rings in _by_layer(graph):
            if any(not readers[name] for name in rings):
                continue
            local = all(reader.window for name in rings for reader in readers[name] or ())
            for name in rings:
                slots = graph.states[name].slots
                for reader in readers[name] or ():
                    if (slots is None and local) or (slots is not None and (slots < reader.slots or not reader.window)):
                        raise InvariantError(
                            f"{layer_path(reader.node)}: {slots} slots of {name} for a window of {reader.window} and "
                            f"chunks of {self.chunk}, where it needs {reader.slots}"
                        )

    def _readers(self, graph: Graph) -> dict[str, list[_Reader] | None]:
        """Attention by the name of the cache that it reads; None where something else reads it."""
        inputs = graph.inputs
        slack = (self.chunk - 1) * (2 if self.whole_calls and "until" in inputs else 1)
        return {name: self._readers_of(inputs[name], slack) for name, state in graph.states.items() if state.is_ring}

    def _readers_of(self, cache: Node, slack: int) -> list[_Reader] | None:
        readers = list[_Reader]()
        for user in cache.users:
            if is_call(user, ops.ATTEND):
                readers.append(self._reader(user, slack=0))
            elif is_call(user, ops.WRITE_CACHE):
                later = [reader for reader in user.users if reader.op != "output"]
                if not all(is_call(reader, ops.ATTENTION) for reader in later):
                    return None
                readers += [self._reader(reader, slack=slack) for reader in later]
            elif not is_call(user, aten.sym_size.int):
                return None
        return readers

    @staticmethod
    def _reader(node: Node, *, slack: int) -> _Reader:
        """A reader that needs so many slots beside its window's."""
        window = mask_of(node).reach
        return _Reader(node=node, window=window, slots=window and window + slack)


def _by_layer(graph: Graph) -> Iterable[list[str]]:
    """Names of the rings, by layer."""
    layers: dict[int, list[str]] = {}
    for name, state in graph.states.items():
        if state.is_ring:
            layers.setdefault(state.layer, []).append(name)
    return layers.values()
