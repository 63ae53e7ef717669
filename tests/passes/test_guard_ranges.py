"""Float32 islands: what float16 cannot hold is computed in float32, and nothing else is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from tests.artifacts import CHUNK
from tests.case import Case
from tests.conftest import WINDOW
from tests.faults.ranges import plant
from tests.tolerances import FLOAT16_LOGITS
from transom.backends.reference.session import ReferenceSession
from transom.errors import InvariantError, NonFiniteError, RangeError
from transom.export.ranges import Ranges, trace_ranges
from transom.formats.number_format import FORMATS
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.passes.add_taps import AddTaps
from transom.passes.base import Measurement
from transom.passes.guard_ranges import GuardRanges
from transom.passes.insert_observers import narrow_values
from transom.passes.pipelines import PIPELINES, pipeline
from transom.zoo.model import Model

FLOAT16 = FORMATS["float16"]
LENGTH = 4 * WINDOW + 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted:
    ranges: Ranges
    half: Graph
    logits: np.ndarray


@pytest.fixture(scope="module")
def planted(tiny: Model, text: list[int]) -> Planted:
    model = plant(tiny)
    half = model.trace(dtype=torch.float16)
    return Planted(
        ranges=trace_ranges(model, text[:LENGTH], half=half),
        half=half,
        logits=ReferenceSession(model.trace(), context=128, chunk=CHUNK).logits(text[:LENGTH]),
    )


@pytest.fixture(scope="module")
def calm(tiny: Model, traced_float16: Graph, text: list[int]) -> Mapping[str, float]:
    """Ranges of the model as it is: far from any edge."""
    return trace_ranges(tiny, text[:20], half=traced_float16).largest()


def measured(largest: Mapping[str, float]) -> Measurement:
    """A measurement that was taken before."""
    return lambda _: largest


def logits(graph: Graph, text: list[int], length: int = LENGTH) -> np.ndarray:
    session = ReferenceSession(graph, context=128, chunk=CHUNK)
    rows = np.concatenate((session.logits(text[: length - 3]), [session.decode(t) for t in text[length - 3 : length]]))
    assert {state.dtype for state in session.states} == {"float16"}
    return rows


def test_range_tracing_finds_what_was_planted(planted: Planted) -> None:
    names = {value.name for value in planted.ranges.overflowing(FLOAT16)}
    stream = {f"layers.{layer}.add{step}" for layer in range(2, 6) for step in ("", ".2")}
    assert names == {
        "layers.1.post_feedforward_layernorm.mul.2", "layers.1.add.2", *stream, "layers.2.mlp.mul",
        "layers.2.mlp.down_proj.linear", "layers.4.mlp.down_proj.linear",
    }  # fmt: skip


def test_unguarded_it_is_nonsense(planted: Planted, text: list[int]) -> None:
    with pytest.raises(NonFiniteError, match="at position 0 are NaN or infinite"):
        logits(planted.half, text)


def test_guarded_it_is_finite_and_right(planted: Planted, text: list[int]) -> None:
    case = Case(graph=planted.half).run(GuardRanges(measured(planted.ranges.largest()))).settled()
    assert np.abs(logits(case.graph, text) - planted.logits).max() < FLOAT16_LOGITS
    dtypes = {name: node.meta["val"].dtype for name, node in narrow_values(case.graph, torch.float16).items()}
    # Back in float16 right after the norms, and gate and up never left it.
    assert dtypes["layers.2.mlp.gate_proj.linear"] == dtypes["layers.5.self_attn.q_proj.linear"] == torch.float16
    assert not set(dtypes) & {value.name for value in planted.ranges.overflowing(FLOAT16)}
    wide = {name for name in case.graph.weights if name.startswith("float32.")}
    assert wide == {f"float32.layers.{layer}.mlp.down_proj.weight" for layer in (2, 4)}
    notes = case.records[0].notes
    assert len(notes) == len(planted.ranges.overflowing(FLOAT16))
    assert notes[0].startswith("layers.1.post_feedforward_layernorm.mul.2 reaches ")
    assert case.records[0].to_json()["notes"] == list(notes)


@pytest.mark.parametrize("target", PIPELINES)
def test_islands_outlive_every_fusion(target: str, planted: Planted, text: list[int]) -> None:
    passes = pipeline(target, chunk=CHUNK, scheme=scheme("none")).passes
    case = Case(graph=planted.half).run(GuardRanges(measured(planted.ranges.largest())), *passes)
    assert np.abs(logits(case.graph, text) - planted.logits).max() < FLOAT16_LOGITS
    changes = {record.name: record.changes for record in case.records}
    assert (changes["FuseAttention"], changes["FuseNorms"], changes["FuseRotary"]) == (6, 37, 12)
    # The selection of positions passes the casts: the last norm runs for the wanted tokens only.
    assert changes["SelectLogits"] > 2


def test_quantised_linears_may_stand_in_islands(planted: Planted, text: list[int]) -> None:
    passes = pipeline("xla", chunk=CHUNK, scheme=scheme("int8")).passes
    case = Case(graph=planted.half).run(GuardRanges(measured(planted.ranges.largest())), *passes)
    assert len(case.graph.calls(ops.LINEAR_QUANTIZED)) == 6 * 7 + 1
    assert np.isfinite(logits(case.graph, text)).all()


def test_taps_say_what_is_computed(planted: Planted, text: list[int]) -> None:
    graph = Case(graph=planted.half).run(AddTaps(), GuardRanges(measured(planted.ranges.largest()))).graph
    session = ReferenceSession(graph, context=128, chunk=CHUNK)
    session.prefill(text[:CHUNK])
    assert FLOAT16.largest < np.abs(session.tapped["tap.layers.3.residual.1"]).max() < np.inf


def test_a_model_in_range_is_left_alone(calm: Mapping[str, float], traced_float16: Graph) -> None:
    case = Case(graph=traced_float16).run(GuardRanges(measured(calm))).expect_changes(0)
    assert case.graph.digest() == traced_float16.digest()
    assert case.records[0].notes == ()


def test_scores_may_be_too_large_before_their_scale(
    calm: Mapping[str, float], traced_float16: Graph, text: list[int], text_logits: np.ndarray
) -> None:
    """The product of queries and keys becomes float32; attention is recognised all the same."""
    guard = GuardRanges(measured({**calm, "layers.1.self_attn.matmul": 1e6}))
    case = Case(graph=traced_float16).run(guard)
    assert case.records[0].changes == 2, "the product, and the scale that reads it"
    fused = case.run(*pipeline("xla", chunk=CHUNK, scheme=scheme("none")).passes)
    fused.expect({ops.ATTEND: 6, aten.matmul.default: 0})
    for graph in (case.graph, fused.graph):
        assert np.abs(logits(graph, text) - text_logits[:LENGTH]).max() < FLOAT16_LOGITS


def test_the_margin_stands_for_other_texts(calm: Mapping[str, float], traced_float16: Graph) -> None:
    ranges = {**calm, "layers.3.mlp.mul": 40_000.0}
    Case(graph=traced_float16).run(GuardRanges(measured(ranges), margin=0.0)).expect_changes(0)
    Case(graph=traced_float16).run(GuardRanges(measured(ranges))).expect_changes(2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linear", "the result, from linear, reaches 1e\\+06"),
        ("layers.2.self_attn.cat.2", r"cache\.2\.key, from layers\.2\.self_attn\.cat\.2,"),
        ("layers.5.self_attn.v_proj.linear", r"cache\.5\.value, from"),
        ("layers.5.mlp.up_proj.weight", r"the weight layers\.5\.mlp\.up_proj\.weight reaches"),
    ],
)
def test_what_no_island_helps_is_refused(
    name: str, message: str, calm: Mapping[str, float], traced_float16: Graph
) -> None:
    with pytest.raises(RangeError, match=f"{message}.*compute in bfloat16 or float32"):
        Case(graph=traced_float16).run(GuardRanges(measured({**calm, name: 1e6})))


def test_ranges_of_another_graph_are_refused(calm: Mapping[str, float], traced_float16: Graph) -> None:
    missing = {name: largest for name, largest in calm.items() if name != "layers.4.add"}
    with pytest.raises(InvariantError, match=r"1 values have no range, layers\.4\.add first"):
        Case(graph=traced_float16).run(GuardRanges(measured(missing)))
    fused = Case(graph=traced_float16).run(*pipeline("onnx", chunk=1, scheme=scheme("none")).passes)
    with pytest.raises(InvariantError, match="must run before fusion"):
        fused.run(GuardRanges(measured(calm)))
