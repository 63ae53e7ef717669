"""Graphs that compute in bfloat16: every pass keeps the rounding steps of the plain module."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.artifacts import CHUNK
from tests.tolerances import BF16_RMS, BF16_STEP
from transom.backends.reference.session import ReferenceSession
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.pipelines import PIPELINES, pipeline
from transom.zoo.model import Model


@pytest.fixture(scope="module")
def traced_bfloat16(tiny: Model) -> Graph:
    return tiny.trace(dtype=torch.bfloat16)


@pytest.mark.parametrize("target", PIPELINES)
def test_the_numbers_are_those_of_the_plain_bfloat16_module(
    target: str, traced_bfloat16: Graph, tiny: Model, text: list[int]
) -> None:
    module, ids = tiny.eager().to(torch.bfloat16), text[:111]
    with torch.no_grad():
        expected = module(torch.tensor([ids]), torch.tensor(0), None)[0][0].float().numpy()
    graph, _ = pipeline(target, chunk=CHUNK, scheme=scheme("none")).run(traced_bfloat16)
    session = _session(graph)
    assert {state.dtype for state in session.states} == {"bfloat16"}
    assert np.abs(session.logits(ids) - expected).max() <= BF16_STEP


@pytest.mark.parametrize("target", ["onnxruntime", "xla"])
def test_quantised_rows_are_rounded_to_the_graphs_dtype(
    target: str, traced_bfloat16: Graph, traced: Graph, text: list[int]
) -> None:
    logits = {}
    for name, graph in (("half", traced_bfloat16), ("full", traced)):
        rewritten, _ = pipeline(target, chunk=CHUNK, scheme=scheme("int4")).run(graph)
        assert rewritten.outputs["logits"].meta["val"].dtype == rewritten.inputs["cache.0.key"].meta["val"].dtype
        logits[name] = _session(rewritten).logits(text[:111])
    difference = logits["half"] - logits["full"]
    assert 0 < np.sqrt(np.square(difference).mean()) < BF16_RMS


def _session(graph: Graph) -> ReferenceSession:
    return ReferenceSession(graph, context=128, chunk=CHUNK)
