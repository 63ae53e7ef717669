"""A graph inlined is the same program in plain operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.artifacts import CHUNK
from tests.tolerances import FP32_LOGITS
from transom.errors import TraceError
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.inline import inline
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model

SLOTS = 4 * CHUNK


@pytest.mark.parametrize("target", ["onnxruntime", "xla"])
def test_it_computes_the_same_without_operations_of_ours(
    target: str, traced: Graph, tiny: Model, text: list[int], text_logits: NDArray[np.float32]
) -> None:
    graph, _ = pipeline(target, chunk=CHUNK, scheme=scheme("none")).run(traced)
    program = inline(graph, tokens=CHUNK, slots=SLOTS, positions=CHUNK)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and not [name for name in called if name.startswith("transom")]
    run = program.module()
    caches = [torch.zeros(state.shape(SLOTS)) for state in graph.states.values()]
    for start in range(0, SLOTS, CHUNK):
        tokens = torch.tensor([text[start : start + CHUNK]])
        with torch.no_grad():
            logits, *caches = run(tokens, torch.tensor(start), torch.arange(CHUNK), *caches)
        assert np.abs(logits[0].numpy() - text_logits[start : start + CHUNK]).max() < FP32_LOGITS


def test_a_tied_table_stays_one_buffer(traced: Graph) -> None:
    graph, _ = pipeline("xla", chunk=1, scheme=scheme("int8")).run(traced)
    program = inline(graph, tokens=1, slots=16)
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in program.state_dict.values()}
    assert sum(sizes.values()) == graph.weight_bytes()


def test_only_decode_graphs(scored: Graph) -> None:
    with pytest.raises(TraceError, match="only a 'decode' graph"):
        inline(scored, tokens=1, slots=16)
