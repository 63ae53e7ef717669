"""The runner itself: a runtime that is right passes, and every way of being wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conformance.runner import SOFT, Report, run_suite

TOLERANCE = 1e-6

Change = Callable[["Oracle", NDArray[np.float64]], NDArray[np.float64]]


class Oracle:
    """A runtime that knows the expected logits by position, and holds caches of any size that it is told to.

    Args:
        change: What to do to the logits of a call.
        local: Slots of local layers.
        tells: Whether it tells the size of its caches.
        refuses: Whether it refuses calls that are too short for an image.
        soft: What it adds to soft tokens.
        capabilities: What it can do beyond text.
    """

    name = "oracle"

    def __init__(
        self,
        change: Change = lambda oracle, logits: logits,
        local: int | None = None,
        tells: bool = True,
        *,
        refuses: bool = True,
        soft: float = 0.0,
        capabilities: frozenset[str] = frozenset({"images"}),
    ) -> None:
        self.change, self.local, self.tells, self.refuses, self.soft = change, local, tells, refuses, soft
        self.capabilities = capabilities
        self.resets = 0

    def open(self, folder: Path, *, chunk: int, context: int) -> Oracle:
        self.case = json.loads((folder / "case.json").read_text())
        if self.refuses and chunk < self.case["image_tokens"]:
            raise ValueError("an image does not fit into a call")
        outputs, inputs = np.load(folder / "expected.npz"), np.load(folder / "inputs.npz")
        self.expected = outputs["logits"]
        if self.case["image_tokens"]:
            self.images = dict(zip(map(bytes, inputs["pixels"]), outputs["soft"], strict=True))
        self.width = 2 * 4 * 2 * 16
        self.chunk = chunk
        return self

    def reset(self) -> None:
        self.position = 0
        self.resets += 1

    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[Any]:
        return np.asarray(self.images[bytes(pixels)] + self.soft)

    def feed(self, tokens: Sequence[int], soft: NDArray[Any] | None) -> NDArray[Any]:
        assert tokens.count(SOFT) == (0 if soft is None else len(soft))
        start = self.position
        self.position += len(tokens)
        return self.change(self, self.expected[start : self.position].copy())

    def decode(self, token: int) -> NDArray[Any]:
        return np.asarray(self.feed([token], None)[0])

    def cache_slots(self) -> Mapping[int, int] | None:
        if not self.tells:
            return None
        local = min(self.position, self.case["window"]) if self.local is None else self.local
        return {index: local if kind == "L" else self.position for index, kind in enumerate(self.case["layers"])}

    def cache_bytes(self) -> int | None:
        slots = self.cache_slots()
        return None if slots is None else self.width * sum(slots.values())


def run(oracle: Oracle, suite: dict[str, Path], name: str = "two_periods") -> Report:
    return run_suite(oracle, [suite[name]], tolerance=TOLERANCE)


@pytest.mark.parametrize("name", ["two_periods", "odd_window", "window_one", "image_past_window"])
def test_a_right_runtime_passes(name: str, suite: dict[str, Path]) -> None:
    oracle = Oracle()
    report = run(oracle, suite, name)
    assert report.passed, str(report)
    assert set(report.differences.values()) == {0.0}
    assert oracle.resets == len(oracle.case["schedules"])
    encoded = {(name, "encode_image")} if oracle.case["needs"] else set()
    assert report.differences.keys() == encoded | {(name, way["name"]) for way in oracle.case["schedules"]}
    assert "0 findings" in str(report)


def test_the_first_bad_position_is_named(suite: dict[str, Path]) -> None:
    def late(oracle: Oracle, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        first = oracle.position - len(logits)
        logits[max(0, 40 - first) :, 3] += 0.25
        return logits

    report = run(Oracle(late), suite)
    assert {finding.position for finding in report.findings} == {40}
    assert {finding.schedule for finding in report.findings} == {"decode_far", "mixed_chunks", "smallest_cache"}
    assert all(finding.difference == pytest.approx(0.25) for finding in report.findings)
    assert report.red() == ["two_periods"]
    assert "wrong from position 40 on" in str(report)


def test_what_is_not_a_number_is_wrong(suite: dict[str, Path]) -> None:
    def spoil(oracle: Oracle, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        logits[-1, 0] = np.nan
        return logits

    report = run(Oracle(spoil), suite)
    assert len(report.findings) == len(report.differences)
    assert {finding.difference for finding in report.findings} == {np.inf}


@pytest.mark.parametrize(
    "change", [lambda oracle, logits: logits[1:], lambda oracle, logits: logits[:, :-1]], ids=["rows", "columns"]
)
def test_logits_of_another_shape_are_findings(change: Change, suite: dict[str, Path]) -> None:
    report = run(Oracle(change), suite)
    assert report.red() == ["two_periods"]


def test_an_error_is_a_finding_and_the_rest_still_runs(suite: dict[str, Path]) -> None:
    def refuse(oracle: Oracle, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        if len(logits) == 32:
            raise MemoryError("no room")
        return logits

    report = run(Oracle(refuse), suite)
    (finding,) = report.findings
    assert (finding.schedule, finding.kind, finding.text) == ("prompt_32", "error", "MemoryError: no room")
    assert len(report.differences) == 6


@pytest.mark.parametrize(("slots", "word"), [(14, "layer 0 (local) has 14 slots"), (53, "has 53 slots")])
def test_caches_of_a_wrong_size_are_findings(slots: int, word: str, suite: dict[str, Path]) -> None:
    report = run(Oracle(local=slots), suite)
    far = [finding for finding in report.findings if finding.schedule == "decode_far"]
    assert {finding.kind for finding in far} == {"cache"}
    assert any(word in finding.text and "expected 15 to 52" in finding.text for finding in far)
    assert any("all caches have" in finding.text for finding in far)


@pytest.mark.parametrize("slots", [15, 16, 52])
def test_caches_at_the_bounds_pass(slots: int, suite: dict[str, Path]) -> None:
    far = [f for f in run(Oracle(local=slots), suite).findings if f.schedule == "decode_far"]
    assert far == []


def test_an_unknown_cache_size_is_said(suite: dict[str, Path]) -> None:
    report = run(Oracle(tells=False), suite)
    assert report.passed
    assert report.unchecked == {"two_periods: the runtime does not tell the size of its caches: not checked"}


def test_wrong_soft_tokens_are_findings(suite: dict[str, Path]) -> None:
    report = run(Oracle(soft=0.25), suite, "image_in_window")
    (finding,) = report.findings
    assert (finding.schedule, finding.kind, finding.position) == ("encode_image", "soft", 0)
    assert finding.difference == pytest.approx(0.25)


def test_calls_too_short_for_an_image_must_be_refused(suite: dict[str, Path]) -> None:
    (finding,) = run(Oracle(refuses=False), suite, "image_in_window").findings
    assert (finding.schedule, finding.kind) == ("short_chunk", "cut")
    assert "an image of 16 tokens went through calls of 15" in str(finding)


@pytest.mark.parametrize(
    ("slots", "early", "passes"), [(28, False, True), (29, False, False), (48, True, True), (49, True, False)]
)
def test_rings_that_no_call_crosses_may_be_larger(
    slots: int, early: bool, passes: bool, suite: dict[str, Path]
) -> None:
    capabilities = frozenset({"images", *(["wraps_early"] if early else [])})
    report = run(Oracle(local=slots, capabilities=capabilities), suite, "image_past_window")
    assert passes == (not [one for one in report.findings if one.schedule == "decode_far"]), str(report)


def test_what_a_runtime_cannot_do_is_not_run(suite: dict[str, Path]) -> None:
    report = run(Oracle(capabilities=frozenset()), suite, "image_past_window")
    assert report.not_run == ["image_past_window: not run: needs images"]
    assert not report.passed, "nothing ran, so nothing is known"


def test_a_suite_of_another_format_is_refused(suite: dict[str, Path], tmp_path: Path) -> None:
    case = json.loads((suite["softcap"] / "case.json").read_text())
    (tmp_path / "case.json").write_text(json.dumps(case | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        run_suite(Oracle(), [tmp_path], tolerance=TOLERANCE)
