"""Equal past the window: one matrix of runtimes and cases, and the only place that proves it for all of them.

Models that see images have cells too: they encode their images, and feed soft tokens among those of text.

A cell feeds a text in every way of `cases.schedules`: prompts of W-1, W, W+1 and 2W, one of 3W+5 and then decoding
until every ring has wrapped twice, chunks of mixed sizes, and one token a call. Every position's logits, and the slots
and bytes of every layer's cache, are those of a float64 reference without caches. Tests elsewhere add what has no cell:
quantised weights, other dtypes, families, and what a session does beside the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.adapters import ArtifactRuntime, HuggingFaceRuntime, StageRuntime
from tests.conformance.cases import CASES
from tests.conformance.runner import Runtime, run_suite
from tests.tolerances import CONFORMANCE_FLOAT16, CONFORMANCE_LOGITS
from transom.errors import TargetError
from transom.export.exporter import exporter
from transom.passes.pipelines import PIPELINES
from transom.passes.targets import TARGETS

TEXT_CASES = [case.name for case in CASES if not case.images]
IMAGE_CASES = [case.name for case in CASES if case.images]

LONG = ("decode_far", "mixed_chunks")
"""The schedules that reach most edges."""

FEW = ("two_periods", "window_one", "wide_heads")


def cells() -> Iterator[tuple[str, str, str, tuple[str, ...] | None]]:
    """What runs, of which target, on which case; and some schedules only, where other cells prove the rest."""
    # All cases go through the two ways to keep a cache, write first and attend first. The other pipelines hold the
    # passes of the first one, or a part of them.
    for target in PIPELINES:
        for name in TEXT_CASES if target in ("onnxruntime", "xla") else FEW:
            whole = target == "onnxruntime" or (target == "xla" and name in FEW)
            yield "graph", target, name, None if whole else LONG
    for target in TARGETS:
        yield "artifact", target, "two_periods", None
        yield "artifact", target, "window_one", LONG
        yield "artifact", target, "image_past_window", None
        yield "artifact", target, "image_in_window", LONG
    for name in (*TEXT_CASES, *IMAGE_CASES):
        if name != "window_one":
            yield "transformers", "", name, None


@pytest.mark.parametrize(
    ("kind", "target", "name", "schedules"), [*cells()], ids=lambda value: value if isinstance(value, str) else ""
)
def test_equal_past_the_window(
    kind: str, target: str, name: str, schedules: tuple[str, ...] | None, suite: dict[str, Path], tmp_path: Path
) -> None:
    runtime: Runtime
    tolerance = CONFORMANCE_LOGITS
    if kind == "artifact":
        try:
            exporter(target)
        except TargetError as error:
            pytest.skip(str(error))
        runtime = ArtifactRuntime(target, tmp_path)
        if "float32" not in TARGETS[target].dtypes:
            # The more exact one of those that it has.
            runtime, tolerance = ArtifactRuntime(target, tmp_path, "float16"), CONFORMANCE_FLOAT16
    elif kind == "graph":
        runtime = StageRuntime(target)
    else:
        runtime = HuggingFaceRuntime()
    report = run_suite(runtime, [suite[name]], tolerance=tolerance, schedules=schedules)
    assert report.passed, str(report)
    assert not report.unchecked, str(report)


def test_hugging_face_forgets_to_forget_at_a_window_of_one(suite: dict[str, Path]) -> None:
    """A fault that the suite found in a release: `keys[:, :, -window + 1 :]` keeps all keys if the window is 1."""
    report = run_suite(HuggingFaceRuntime(), [suite["window_one"]], tolerance=CONFORMANCE_LOGITS)
    assert {finding.schedule for finding in report.findings} == {"decode_far", "mixed_chunks", "smallest_cache"}
    assert any("layer 0 (local) has 10 slots, expected 0 to 1" in finding.text for finding in report.findings)
