"""Every pass on the graphs it was written for: what it does, that once is enough, and that no number changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.artifacts import CHUNK
from tests.case import Case, run_graph
from tests.conftest import WINDOW, Stage
from tests.faults.graph import GRAPH_FAULTS
from tests.tolerances import FP32_LOGITS
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.passes.pipelines import PIPELINES, pipeline
from transom.zoo.model import Model

transom = torch.ops.transom
BOUNDED = WINDOW + CHUNK - 1

# What stands in the decode graph after each pass of `onnxruntime`, and how many sites the pass reports.
EXPECTED: dict[str, tuple[int | None, Mapping[Any, int]]] = {
    "Canonicalize": (
        None,
        {aten.chunk.default: 0, aten._assert_tensor_metadata.default: 0, aten.type_as.default: 0, aten.softmax.int: 6},
    ),
    "ShareEmbedding": (0, {}),
    "FuseAttention": (6, {transom.attention.default: 6, aten.softmax.int: 0, aten.repeat_interleave.self_int: 0}),
    "FuseExperts": (0, {}),
    "FuseCacheWrites": (12, {transom.write_cache.default: 12, aten.index_copy.default: 0}),
    "FuseNorms": (37, {transom.rms_norm.default: 37, aten.rsqrt.default: 0}),
    "FuseRotary": (12, {transom.rotary.default: 12, aten.cat.default: 0}),
    "SelectLogits": (None, {aten.index_select.default: 2}),
    "BoundLocalCaches": (8, {}),
    "FoldConstants": (2, {aten.pow.Scalar: 0, aten.arange.start_step: 0}),
    "ConvertQuantized": (0, {transom.linear_quantized.default: 0}),
    "FuseGatedMLP": (6, {transom.gated.default: 6, aten.gelu.default: 0, aten.linear.default: 37}),
    "PackProjections": (6, {aten.linear.default: 25}),
    "AttendBeforeWrites": (
        6,
        {transom.attend.default: 6, transom.attention.default: 0, transom.write_cache.default: 12},
    ),
    "FuseAddNorms": (12, {transom.add_rms_norm.default: 12, transom.rms_norm.default: 25}),
}


def test_every_pass_of_every_target_is_expected_here() -> None:
    for target in PIPELINES:
        names = [current.name for current in pipeline(target, chunk=1, scheme=scheme("none")).passes]
        assert set(names) <= set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_pass_does_its_work_once_and_changes_no_number(
    name: str,
    stages: list[Stage],
    traced: Graph,
    tiny: Model,
    text: list[int],
    text_logits: NDArray[np.float32],
) -> None:
    names = [stage.ran.name for stage in stages]
    index = names.index(name)
    before = stages[index - 1].graph if index else traced
    changes, counts = EXPECTED[name]
    case = Case(graph=before, model=tiny).run(stages[index].ran).expect(counts)
    if changes is not None:
        case.expect_changes(changes)
    elif case.records[0].changes == 0:
        pytest.fail("the pass found nothing to do")
    assert case.records[0].skipped == ()
    case.settled()
    case.expect_cache(local=BOUNDED if index >= names.index("BoundLocalCaches") else None)
    case.matches_eager(text, text_logits, chunk=CHUNK, lengths=(3 * WINDOW + 5,), decode=2)


@pytest.mark.parametrize("name", ["FuseAttention", "FuseGatedMLP", "FoldConstants"])
def test_the_score_graph_keeps_its_numbers(
    name: str, scored: Graph, text: list[int], text_logits: NDArray[np.float32]
) -> None:
    graphs: dict[str, Graph] = {}
    pipeline("onnx", chunk=1, scheme=scheme("none")).run(
        scored, on_pass=lambda ran, graph: graphs.update({ran.name: graph.clone()})
    )
    sites = [(node.args[3], node.kwargs) for node in graphs[name].calls(transom.attention.default)]
    others = {"scale": 40**-0.5, "segment": 0, "dilation": 1, "softcap": 0.0}
    assert sites == [(None, {**others, "window": window}) for window in (16, 16, 0, 16, 16, 0)]
    (logits,) = run_graph(graphs[name], torch.tensor([text]))
    assert np.abs(logits[0].numpy() - text_logits).max() < FP32_LOGITS


def test_every_pass_keeps_two_rows_apart(stages: list[Stage], tiny: Model, text: list[int]) -> None:
    """A batch of two through the graph that all passes have rewritten, in two steps."""
    graph, module = stages[-1].graph, tiny.eager()
    caches = [torch.zeros(state.shape(64, batch=2)) for state in graph.states.values()]
    tokens_BT = torch.tensor([text[:40], text[40:80]])
    with torch.no_grad():
        expected, _ = module(tokens_BT, torch.tensor(0), None)
    for start, stop in ((0, CHUNK), (CHUNK, 40)):
        part = tokens_BT[:, start:stop]
        logits, *caches = run_graph(graph, part, torch.tensor(start), torch.arange(stop - start), *caches)
        assert (logits - expected[:, start:stop]).abs().max() < FP32_LOGITS


@pytest.mark.parametrize("chunk", [1, CHUNK])
def test_bounded_caches_have_the_bytes_that_the_formula_says(traced: Graph, tiny: Model, chunk: int) -> None:
    config = tiny.config
    case = Case.of(tiny).run(Canonicalize(), FuseAttention(), FuseCacheWrites(), BoundLocalCaches(chunk))
    case.expect_changes(case.records[0].changes, 6, 12, 8)
    per_slot = 2 * config.num_kv_heads * config.head_dim * 4
    grown, bounded = (kind.session(chunk=chunk) for kind in (Case(graph=traced), case))
    for session in (grown, bounded):
        session.reserve(config.context)
    assert bounded.cache_bytes() == {
        "local": 4 * per_slot * (WINDOW + chunk - 1),
        "global": 2 * per_slot * config.context,
    }
    assert grown.cache_bytes() == {"local": 0, "global": 6 * per_slot * config.context}


def test_one_slot_fewer_loses_a_key(
    traced: Graph, tiny: Model, text: list[int], text_logits: NDArray[np.float32]
) -> None:
    """The comparison with eager notices a cache that is one slot too small, so it can be trusted."""
    passes = [Canonicalize(), FuseAttention(), FuseCacheWrites(), BoundLocalCaches(CHUNK)]
    fault = GRAPH_FAULTS["one slot too few"]
    case = Case(graph=traced, model=tiny).run(*fault.passes(passes, window=WINDOW, chunk=CHUNK))
    with pytest.raises(AssertionError, match="a prompt of 149"):
        case.matches_eager(text, text_logits, chunk=CHUNK, lengths=(4 * CHUNK + 1,), decode=0)
