"""Observers: they stand where they say, at every stage, and count what is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.artifacts import CHUNK
from tests.case import Case, export, run_graph
from tests.conftest import WINDOW, Stage
from transom.formats.observation import Observation
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.add_taps import AddTaps
from transom.passes.insert_observers import InsertObservers, computed_values, narrow_values
from transom.passes.pipelines import pipeline

LINEARS = [
    *(
        f"range.layers.{layer}.{name}.input"
        for layer in range(6)
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj",
        )
    ),
    "range.embed_tokens.input",
]  # fmt: skip


def test_inputs_of_linears_are_named_after_weights(traced: Graph) -> None:
    case = Case(graph=traced).run(InsertObservers()).expect_changes(len(LINEARS)).settled()
    assert [tap.name for tap in case.graph.taps] == LINEARS
    assert {(tap.layer, tap.op) for tap in case.graph.taps} == {
        *((layer, "range") for layer in range(6)),
        (None, "range"),
    }
    case.expect({torch.ops.transom.observe.default: 4 * 6 + 1})  # query, key and value read one tensor; gate and up too


def test_they_count_what_flows(traced: Graph, text: list[int]) -> None:
    """Beside the taps of AddTaps, whose values are the very inputs; past the window, in several calls."""
    session = Case(graph=traced).run(AddTaps(), InsertObservers()).session(chunk=24)
    pairs = {
        "range.layers.2.mlp.down_proj.input": "tap.layers.2.mlp.activation",
        "range.layers.5.self_attn.o_proj.input": "tap.layers.5.self_attn.attention",
        "range.layers.0.self_attn.q_proj.input": "tap.layers.0.input_layernorm",
    }
    merged = dict.fromkeys(pairs, Observation.none())
    values: dict[str, list[np.ndarray]] = {name: [] for name in pairs}

    def on_chunk(count: int) -> None:
        for name, tap in pairs.items():
            merged[name] = merged[name].merge(Observation.of(session.tapped[name]))
            values[name].append(session.tapped[tap].ravel())

    session.prefill(text[: 3 * WINDOW + 5], on_chunk=on_chunk)
    for name, observation in merged.items():
        exact = np.concatenate(values[name])
        assert (observation.minimum, observation.maximum, observation.count) == (exact.min(), exact.max(), exact.size)
        assert observation.share_above(1.0) == (np.abs(exact) > 1).mean()


@pytest.mark.parametrize("sites", ["linears", "values"])
def test_every_stage_can_be_observed(sites: str, stages: list[Stage], text: list[int], text_logits: np.ndarray) -> None:
    counts = []
    for stage in (stages[0], stages[7], stages[-1]):
        case = Case(graph=stage.graph).run(InsertObservers("linears" if sites == "linears" else "values")).settled()
        counts.append(len(case.graph.taps))
    assert counts == sorted(counts, reverse=True), "fusions leave fewer values"
    case.matches_eager(text, text_logits, chunk=CHUNK, lengths=(2 * WINDOW + 3,), decode=2)


def test_quantised_linears_keep_their_names(traced: Graph) -> None:
    passes = pipeline("xla", chunk=CHUNK, scheme=scheme("int8")).passes
    case = Case(graph=traced).run(*passes, InsertObservers())
    assert sorted(tap.name for tap in case.graph.taps) == sorted(LINEARS)


def test_the_score_graph_has_observers_too(scored: Graph, text: list[int]) -> None:
    graph = Case(graph=scored).run(InsertObservers()).graph
    _, *statistics = run_graph(graph, torch.tensor([text[:20], text[20:40]]))
    assert len(statistics) == len(LINEARS)
    assert all(Observation.of(observation.numpy()).count % 40 == 0 for observation in statistics)


def test_names_do_not_depend_on_the_dtype(traced: Graph, traced_float16: Graph) -> None:
    full, half = ([name for name, _ in computed_values(graph)] for graph in (traced, traced_float16))
    assert full == half
    narrow = narrow_values(traced_float16, torch.float16)
    assert {"mul", "layers.0.add", "layers.1.add.2", "layers.0.post_feedforward_layernorm.mul.2"} <= set(narrow)
    assert not any(name.endswith((".pow", ".rsqrt", ".mean")) for name in narrow), "norms compute in float32"


class _Odd(nn.Module):
    """One linear of a made-up weight, and one weight for two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.weight * 2)
        return nn.functional.linear(nn.functional.linear(x, self.weight), self.weight)


def test_linears_without_a_name_are_reported() -> None:
    case = Case(graph=export(_Odd(), torch.ones(2, 4))).run(InsertObservers())
    case.expect_changes(1).expect_skipped("weight is no input", "another linear of the same weight")
