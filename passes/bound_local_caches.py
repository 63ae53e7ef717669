"""BoundLocalCaches: strip the growth of local layers' caches.

Precondition: `FuseAttention` and `FuseCacheWrites` have run, so that every cache is read by attention whose window is
known.
Rewrite: a local layer's cache gets `window + chunk - 1` slots, for good. A chunk of `chunk` new tokens overwrites
that many slots, and its first token still sees the `window - 1` keys before it, so fewer slots would lose keys. If
`FuseCachedAttention` has run, `window` slots are enough: the fused operation attends before it writes.
Skips: global layers; caches that are read by something other than fused attention, with the reason.
"""

from __future__ import annotations

import dataclasses

import torch

from transom.errors import InvariantError
from transom.graphs import ops
from transom.graphs.graph import Graph, fake_mode
from transom.graphs.match import is_call, layer_path
from transom.graphs.node import Node
from transom.graphs.state import SLOTS
from transom.passes.base import Pass, Rewrite
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites


class BoundLocalCaches(Pass):
    """Give local layers' caches a fixed number of slots.

    Args:
        chunk: Largest number of new tokens in one call.
    """

    after = (FuseAttention, FuseCacheWrites)

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def requires(self, graph: Graph) -> None:
        """The chunk is positive."""
        if self.chunk < 1:
            raise InvariantError(f"a chunk holds at least one token, got {self.chunk}")

    def rewrite(self, graph: Graph) -> Rewrite:
        """Resize the caches of local layers and note every cache's window."""
        inputs = graph.inputs
        changes, skipped = 0, list[str]()
        rings = {name: state for name, state in graph.states.items() if state.is_ring}
        unknown = self._unknown_layers(graph)
        for name, state in rings.items():
            node = inputs[name]
            window = self._window(node)
            if state.layer in unknown:
                reader = "" if window is None else " of the cache beside it"
                skipped.append(f"{name}: not every reader{reader} is attention with a known window, so it still grows")
                window = None
            slots = window + self._slack(node) if window else None
            if slots is not None and state.slots is None:
                sizes, axis = list(node.meta["val"].shape), state.axes.index(SLOTS)
                with fake_mode(graph):
                    node.meta["val"] = node.meta["val"].new_empty((*sizes[:axis], slots, *sizes[axis + 1 :]))
                node.meta["changed"] = True
                changes += 1
            if state.slots is None:
                sized = state if slots is None else state.fixed(slots=slots)
                rings[name] = dataclasses.replace(sized, window=window or None)
        graph.states = {**graph.states, **rings}
        return Rewrite(changes=changes, skipped=tuple(skipped))

    def _slack(self, cache: Node) -> int:
        """Slots beside the window: those that a chunk overwrites before its first token has attended."""
        return 0 if any(is_call(user, ops.CACHED_ATTENTION) for user in cache.users) else self.chunk - 1

    def ensures(self, graph: Graph) -> None:
        """No local attention reads a cache that grows unreported, or one too small for its window and chunk."""
        unknown = self._unknown_layers(graph)
        grow = {graph.inputs[name].name for name, state in graph.states.items() if state.layer in unknown}
        for node in graph.calls(ops.ATTENTION, ops.CACHED_ATTENTION):
            fused = node.target is ops.CACHED_ATTENTION
            window = node.args[7 if fused else 5]
            cache = node.args[3] if fused else node.args[1]
            if not fused and is_call(cache, ops.WRITE_CACHE):
                cache = cache.args[0]
            if not window or cache.op != "placeholder" or cache.name in grow:
                continue
            slots = cache.meta["val"].shape[2]
            if not isinstance(slots, int) or slots < window + self._slack(cache):
                raise InvariantError(
                    f"{layer_path(node)}: {slots} slots for a window of {window} and chunks of {self.chunk}"
                )

    def _unknown_layers(self, graph: Graph) -> set[int]:
        """Layers with a ring of unknown window: rings of a layer go together, so that slots mean the same in all."""
        inputs = graph.inputs
        rings = {name: state for name, state in graph.states.items() if state.is_ring}
        return {state.layer for name, state in rings.items() if self._window(inputs[name]) is None}

    @staticmethod
    def _window(cache: Node) -> int | None:
        """Window of the layer that a cache belongs to; 0 if global, None if some reader is unknown."""
        windows = set()
        for write in cache.users:
            if is_call(write, torch.ops.aten.sym_size.int):
                continue
            if is_call(write, ops.CACHED_ATTENTION):
                windows.add(write.args[7])
                continue
            if not is_call(write, ops.WRITE_CACHE):
                return None
            for reader in write.users:
                if is_call(reader, ops.ATTENTION):
                    windows.add(reader.args[5])
                elif reader.op != "output":
                    return None
        return windows.pop() if len(windows) == 1 else None
