"""The reference: a graph interpreted in PyTorch. Every other backend is held against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.artifact import CacheRecord, TapRecord
from transom.backends.session import Float, Session, Tokenizer
from transom.graphs import ops  # noqa: F401 (registers the fused operations)
from transom.graphs.graph import Graph
from transom.graphs.weight import read_all


def cache_records(graph: Graph) -> tuple[CacheRecord, ...]:
    """What a graph says of its caches, in the form that sessions and manifests use."""
    nodes = graph.placeholders()
    records = []
    for cache in graph.caches:
        value = nodes[cache.input].meta["val"]
        records.append(
            CacheRecord(
                name=cache.name,
                layer=cache.layer,
                window=cache.window,
                slots=cache.slots,
                heads=int(value.shape[1]),
                width=int(value.shape[3]),
                dtype=str(value.dtype).removeprefix("torch."),
            )
        )
    return tuple(records)


def tap_records(graph: Graph) -> tuple[TapRecord, ...]:
    """A graph's taps, in the form that manifests use."""
    return tuple(TapRecord(name=tap.name, layer=tap.layer, op=tap.op) for tap in graph.taps)


class ReferenceSession(Session):
    """A `decode` graph, at any stage of the passes, run node by node.

    Args:
        graph: The graph; its weights are read into memory here.
        context: Longest sequence, in tokens.
        chunk: Most new tokens in one call; bounded caches must have been made for at least as many.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, graph: Graph, *, context: int, chunk: int, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(
            context=context,
            chunk=chunk,
            vocab_size=int(graph.output.args[0][0].meta["val"].shape[-1]),
            caches=cache_records(graph),
            stop_ids=tokenizer.stop_ids if tokenizer else (),
            tokenizer=tokenizer,
        )
        self._interpreter = torch.fx.Interpreter(graph.module)
        names, tensors = graph.weight_names(), read_all(graph.weights)
        self._inputs: list[torch.Tensor | None] = [
            tensors[names[placeholder]] if placeholder in names else None for placeholder in graph.placeholders()
        ]
        self._tensors: list[torch.Tensor] = []
        self._taps = [tap.name for tap in graph.taps]

    def _run(self, tokens: NDArray[np.int64], logit_positions: NDArray[np.int64]) -> Float:
        new = [torch.from_numpy(tokens)[None], torch.tensor(self.position), torch.from_numpy(logit_positions)]
        given = iter([*new, *self._tensors])
        inputs = [next(given) if value is None else value for value in self._inputs]
        with torch.no_grad():
            logits, *rest = self._interpreter.run(*inputs)
        self._tensors, taps = rest[: len(self.caches)], rest[len(self.caches) :]
        self.tapped = {name: _array(value) for name, value in zip(self._taps, taps, strict=True)}
        rows: Float = logits[0].float().numpy()
        return rows

    def _allocate(self, slots: int) -> None:
        old, grown = self._tensors, []
        for index, cache in enumerate(self.caches):
            shape = (1, cache.heads, cache.slots or slots, cache.width)
            tensor = torch.zeros(shape, dtype=getattr(torch, cache.dtype))
            if old:
                tensor[:, :, : old[index].shape[2]] = old[index]
            grown.append(tensor)
        self._tensors = grown

    def _cache_arrays(self) -> Iterator[tuple[CacheRecord, Any]]:
        yield from zip(self.caches, self._tensors, strict=False)


def _array(value: torch.Tensor) -> NDArray[Any]:
    """As numpy knows it: what is narrower than float32 is widened; statistics are float64 and stay so."""
    return (value if value.dtype == torch.float64 else value.float()).numpy()
