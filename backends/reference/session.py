"""A session on the reference."""

from __future__ import annotations

from transom.backends.reference.runtime import Reference
from transom.backends.session import Session, Tokenizer
from transom.graphs.graph import Graph


class ReferenceSession(Session):
    """A `decode` graph, at any stage of the passes, run node by node.

    Args:
        graph: The graph; its weights are read into memory here.
        context: Longest sequence, in tokens.
        chunk: Most new tokens in one call; bounded caches must have been made for at least as many.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, graph: Graph, *, context: int, chunk: int, tokenizer: Tokenizer | None = None) -> None:
        stop_ids = tokenizer.stop_ids if tokenizer else ()
        super().__init__(Reference(graph, context=context, chunk=chunk), stop_ids=stop_ids, tokenizer=tokenizer)
