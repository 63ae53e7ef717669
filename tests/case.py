"""A fluent tester of passes.

Case(model).trace().run(FuseAttention()).expect({attention: 6}).matches_eager()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.tolerances import FP32_LOGITS
from transom.backends.reference.session import ReferenceSession
from transom.graphs.check import check
from transom.graphs.graph import Graph
from transom.graphs.trace import DECODE
from transom.graphs.weight import read_all
from transom.passes.base import Pass, PassRecord, Pipeline
from transom.zoo.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A graph on its way through passes. Every method checks something or returns the next case.

    Attributes:
        graph: As it is now.
        model: The model that it was traced from, if it is one of the zoo.
        passes: The passes of the last `run`.
        records: What they reported.
        chunk: Most tokens to feed in one call.
    """

    graph: Graph
    model: Model | None = None
    passes: tuple[Pass, ...] = ()
    records: tuple[PassRecord, ...] = ()
    chunk: int = 1

    @staticmethod
    def of(model: Model, task: str = DECODE) -> Case:
        """The graph of a model of the zoo."""
        return Case(graph=model.trace(task=task), model=model)

    def run(self, *passes: Pass) -> Case:
        """Run passes; the graph that they started from stays as it was."""
        before = self.graph.digest()
        graph, records = Pipeline(passes).run(self.graph)
        assert self.graph.digest() == before, "the passes edited the graph that they were given"
        check(graph)
        return dataclasses.replace(self, graph=graph, passes=passes, records=tuple(records))

    def expect(self, counts: Mapping[Any, int]) -> Case:
        """Check how often the graph calls some operations."""
        calls = {target: len(self.graph.calls(target)) for target in counts}
        assert calls == dict(counts)
        return self

    def expect_changes(self, *changes: int) -> Case:
        """Check what the passes of the last `run` reported, one number a pass."""
        assert [record.changes for record in self.records] == list(changes)
        return self

    def expect_skipped(self, *reasons: str) -> Case:
        """Check that the last pass skipped exactly as many sites, each for a reason that holds these words."""
        skipped = self.records[-1].skipped
        assert len(skipped) == len(reasons), skipped
        for reason, words in zip(skipped, reasons, strict=True):
            assert words in reason
        return self

    def expect_cache(self, *, local: int | None) -> Case:
        """Check that local layers hold this many slots (None: as many as global ones), and global layers grow."""
        assert self.model is not None
        nodes = self.graph.inputs
        for cache in self.graph.states.values():
            window = self.model.config.layers[cache.layer].window
            slots = nodes[cache.name].meta["val"].shape[2]
            bounded = window is not None and local is not None
            assert cache.slots == (local if bounded else None), cache
            assert isinstance(slots, int) == bounded, f"{cache.name} was traced with {slots} slots"
            assert slots == local or not bounded, f"{cache.name} was traced with {slots} slots"
            assert cache.window == (window if local is not None else None), cache
        return self

    def settled(self) -> Case:
        """Check that running the last passes again changes nothing."""
        again = self.run(*self.passes)
        assert [record.changes for record in again.records] == [0] * len(self.passes)
        assert again.graph.digest() == self.graph.digest()
        return self

    def session(self, *, chunk: int, context: int = 512) -> ReferenceSession:
        """A session that interprets the graph."""
        return ReferenceSession(self.graph, context=context, chunk=chunk)

    def matches_eager(
        self, text: Sequence[int], expected: NDArray[np.float32], *, chunk: int, lengths: Sequence[int], decode: int
    ) -> Case:
        """Compare logits with those of the plain module, at every position.

        Args:
            text: Token ids.
            expected: The module's logits of every position [T, V], computed without caches.
            chunk: Most tokens in one call.
            lengths: Prompts to prefill, each from empty caches.
            decode: Tokens to run one by one after the last prompt.
        """
        session = self.session(chunk=chunk)
        for length in lengths:
            logits = session.logits(text[:length])
            assert np.abs(logits - expected[:length]).max() < FP32_LOGITS, f"a prompt of {length}"
        for position in range(lengths[-1], lengths[-1] + decode):
            logits = session.decode(text[position])
            assert np.abs(logits - expected[position]).max() < FP32_LOGITS, f"decode at {position}"
        return self


def export(module: torch.nn.Module, *inputs: Any, dynamic_shapes: Any = None) -> Graph:
    """Export a hand-made module the way anybody would, without this project's tracing."""
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes, strict=False)
    return Graph.from_program(program)


def run_graph(graph: Graph, *inputs: Any) -> list[torch.Tensor]:
    """Run a graph node by node on the tensors that a caller passes."""
    given, weights = iter(inputs), graph.weight_names()
    tensors = read_all(graph.weights)
    values = [tensors[weights[n]] if n in weights else next(given) for n in graph.placeholders()]
    with torch.no_grad():
        return list(torch.fx.Interpreter(graph.module).run(*values))
