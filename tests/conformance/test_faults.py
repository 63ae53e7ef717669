"""Every planted fault turns the suite red, and the bisection finds where it was planted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.adapters import PlainRuntime, StageRuntime, model_of
from tests.conformance.cases import CASES
from tests.conformance.runner import Report, Runtime, run_suite
from tests.faults.configuration import CONFIG_FAULTS
from tests.faults.graph import GRAPH_FAULTS, GraphFault
from tests.faults.images import IMAGE_FAULTS
from tests.tolerances import CONFORMANCE_FAULT, CONFORMANCE_LOGITS
from transom.graphs.graph import Graph
from transom.passes.add_taps import AddTaps
from transom.passes.base import Pass, Pipeline
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.validation.bisection.bisect import bisect, bisect_stages

LONG = ("decode_far", "mixed_chunks")
# Graphs of this case, LLG with a window of 13, are spoilt.
CASE, WINDOW = "odd_window", 13
LOUD_FAULTS = {name: fault for name, fault in GRAPH_FAULTS.items() if fault.suite}
CHUNK = 2 * WINDOW + 5
# Chunks longer than two windows over the wrap of a ring, a short one and two tokens one by one.
LENGTH, DECODE = 2 * CHUNK + 3, 2


class SpoiltStageRuntime(StageRuntime):
    """The graph that a target's passes leave, with a fault among them."""

    def __init__(self, name: str, fault: GraphFault) -> None:
        super().__init__(fault.target)
        self.name, self._fault = name, fault

    def passes(self, chunk: int) -> list[Pass]:
        return self._fault.passes(super().passes(chunk), window=WINDOW, chunk=chunk)


def loud(report: Report, case: str) -> bool:
    """Whether a case's logits are wrong by far more than rounding can be."""
    worst = max(difference for (name, _), difference in report.differences.items() if name == case)
    return worst > CONFORMANCE_FAULT and any(f.kind == "logits" and f.case == case for f in report.findings)


@pytest.mark.parametrize("name", LOUD_FAULTS)
def test_a_spoilt_graph_turns_the_suite_red(name: str, suite: dict[str, Path]) -> None:
    fault = GRAPH_FAULTS[name]
    report = run_suite(SpoiltStageRuntime(name, fault), [suite[CASE]], tolerance=CONFORMANCE_LOGITS, schedules=LONG)
    assert report.red() == [CASE]
    assert loud(report, CASE) == ("logits" in fault.suite), str(report)
    assert {finding.kind for finding in report.findings} == fault.suite


@pytest.fixture(scope="module")
def tapped(suite: dict[str, Path]) -> Graph:
    """The right graph, with taps."""
    graph, _ = Pipeline([AddTaps(), *StageRuntime("onnx").passes(CHUNK)]).run(model_of(suite[CASE]).trace())
    return graph


@pytest.mark.parametrize("name", LOUD_FAULTS)
def test_the_bisection_names_layer_and_operation(name: str, suite: dict[str, Path], tapped: Graph) -> None:
    fault, model = GRAPH_FAULTS[name], model_of(suite[CASE])
    graph = model.trace()
    spoilt, _ = Pipeline([AddTaps(), *SpoiltStageRuntime(name, fault).passes(CHUNK)]).run(graph)
    verdict = bisect(tapped, spoilt, model=model, chunk=CHUNK, length=LENGTH, decode=DECODE)
    side = "b" if fault.op else None
    assert (verdict.layer, verdict.op, verdict.side) == (fault.layer, fault.op, side), verdict


def test_the_bisection_finds_no_fault_where_none_is(suite: dict[str, Path], tapped: Graph) -> None:
    other, _ = Pipeline([AddTaps(), *StageRuntime("xla").passes(CHUNK)]).run(model_of(suite[CASE]).trace())
    assert not bisect(tapped, other, model=model_of(suite[CASE]), chunk=CHUNK, length=LENGTH, decode=DECODE).diverged


def test_the_bisection_names_the_pass(suite: dict[str, Path]) -> None:
    fault = GRAPH_FAULTS["a cache of a window's slots"]
    # Every stage is run, so the pipeline is cut short.
    shortest = [Canonicalize(), FuseAttention(), FuseCacheWrites(), BoundLocalCaches(CHUNK)]
    passes = fault.passes(shortest, window=WINDOW, chunk=CHUNK)
    verdict = bisect_stages(passes, model=model_of(suite[CASE]), chunk=CHUNK, length=LENGTH, decode=DECODE)
    assert (verdict.stage, verdict.layer, verdict.op) == (passes[-1].name, fault.layer, fault.op), verdict


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_a_wrong_configuration_turns_the_right_cases_red(name: str, suite: dict[str, Path]) -> None:
    cases = CONFIG_FAULTS[name].red
    others = [case.name for case in CASES if case.name not in cases][:2]
    folders = [suite[case] for case in (*cases, *others)]
    report = run_suite(
        PlainRuntime(name, CONFIG_FAULTS[name].change), folders, tolerance=CONFORMANCE_LOGITS, schedules=LONG
    )
    assert set(report.red()) == set(cases), str(report)
    assert all(loud(report, case) for case in cases)


def test_every_case_is_turned_red_by_some_fault() -> None:
    red = {case for fault in CONFIG_FAULTS.values() for case in fault.red}
    assert {case.name for case in CASES} == red


IMAGE_CASES = [case.name for case in CASES if case.images]


@pytest.mark.parametrize("name", IMAGE_FAULTS)
def test_wrong_images_turn_the_suite_red(name: str, suite: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fault = IMAGE_FAULTS[name]
    runtime, folders = fault.runtime(), [suite[case] for case in IMAGE_CASES]
    fault.plant(monkeypatch)
    report = run_suite(runtime, folders, tolerance=CONFORMANCE_LOGITS, schedules=LONG)
    assert report.red() == list(fault.red), str(report)
    assert {finding.kind for finding in report.findings} == fault.kinds
    assert all(loud(report, case) for case in fault.red), str(report)


@pytest.mark.parametrize(
    "runtime", dict.fromkeys(fault.runtime for fault in IMAGE_FAULTS.values()), ids=lambda make: make().name
)
def test_without_a_fault_the_suite_is_green(runtime: Callable[[], Runtime], suite: dict[str, Path]) -> None:
    report = run_suite(runtime(), [suite[case] for case in IMAGE_CASES], tolerance=CONFORMANCE_LOGITS)
    assert report.passed, str(report)
