"""Every runtime over the suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.adapters import ArtifactRuntime, HuggingFaceRuntime, StageRuntime
from tests.conformance.cases import CASES
from tests.conformance.eager import EagerRuntime
from tests.conformance.runner import Report, run_suite
from tests.tolerances import CONFORMANCE_FLOAT16, CONFORMANCE_LOGITS
from transom.errors import TargetError
from transom.export.exporter import exporter
from transom.passes.pipelines import PIPELINES
from transom.passes.targets import TARGETS

TEXT_CASES = [case.name for case in CASES if not case.images]
IMAGE_CASES = [case.name for case in CASES if case.images]

LONG = ("decode_far", "mixed_chunks")
"""The schedules that reach most edges."""

# All cases go through the two ways to keep a cache, write first and attend first. The other pipelines hold the
# passes of the first one, or a part of them.
FEW = ("two_periods", "window_one", "wide_heads")
STAGES = [
    *(("onnxruntime", name, None) for name in TEXT_CASES),
    *(("xla", name, None if name in FEW else LONG) for name in TEXT_CASES),
    *((target, name, LONG) for target in sorted(set(PIPELINES) - {"onnxruntime", "xla"}) for name in FEW),
]


def expect_clean(report: Report) -> None:
    assert report.passed, str(report)
    assert not report.unchecked, str(report)


@pytest.mark.parametrize(
    ("target", "name", "schedules"), STAGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_graph_of_every_pipeline(
    target: str, name: str, schedules: tuple[str, ...] | None, suite: dict[str, Path]
) -> None:
    report = run_suite(StageRuntime(target), [suite[name]], tolerance=CONFORMANCE_LOGITS, schedules=schedules)
    expect_clean(report)


@pytest.mark.parametrize("name", ["two_periods", "window_one"])
@pytest.mark.parametrize("target", TARGETS)
def test_artifacts(target: str, name: str, suite: dict[str, Path], tmp_path: Path) -> None:
    try:
        exporter(target)
    except TargetError as error:
        pytest.skip(str(error))
    # The more exact one of those that a target without float32 has.
    dtype = "float32" if "float32" in TARGETS[target].dtypes else "float16"
    tolerance = CONFORMANCE_LOGITS if dtype == "float32" else CONFORMANCE_FLOAT16
    expect_clean(
        run_suite(ArtifactRuntime(target, tmp_path, dtype), [suite[name]], tolerance=tolerance, schedules=LONG)
    )


@pytest.mark.parametrize("name", [name for name in (*TEXT_CASES, *IMAGE_CASES) if name != "window_one"])
def test_hugging_face(name: str, suite: dict[str, Path]) -> None:
    expect_clean(run_suite(HuggingFaceRuntime(), [suite[name]], tolerance=CONFORMANCE_LOGITS))


def test_hugging_face_forgets_to_forget_at_a_window_of_one(suite: dict[str, Path]) -> None:
    """A fault that the suite found in a release: `keys[:, :, -window + 1 :]` keeps all keys if the window is 1."""
    report = run_suite(HuggingFaceRuntime(), [suite["window_one"]], tolerance=CONFORMANCE_LOGITS)
    assert {finding.schedule for finding in report.findings} == {"decode_far", "mixed_chunks", "smallest_cache"}
    assert any("layer 0 (local) has 10 slots, expected 0 to 1" in finding.text for finding in report.findings)


@pytest.mark.parametrize("name", [*IMAGE_CASES, "two_periods", "odd_window"])
def test_the_zoo_run_eagerly(name: str, suite: dict[str, Path]) -> None:
    expect_clean(run_suite(EagerRuntime(), [suite[name]], tolerance=CONFORMANCE_LOGITS))


@pytest.mark.parametrize("target", PIPELINES)
def test_what_a_runtime_cannot_do_is_not_run(target: str, suite: dict[str, Path]) -> None:
    report = run_suite(StageRuntime(target), [suite["image_blocks"]], tolerance=CONFORMANCE_LOGITS)
    assert report.not_run == ["image_blocks: not run: needs image_blocks"]
    assert not report.passed, "nothing ran, so nothing is known"
