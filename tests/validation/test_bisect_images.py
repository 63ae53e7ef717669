"""Bisection of models that see images: each of their entries, with faults of either placed and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import transom
from tests.case import Case
from tests.conftest import Cli
from tests.export.test_images import window_on_both_sides
from tests.faults.image_graphs import ENTRY_FAULTS, EntryFault, InEntry
from transom.backends.artifact import DECODE, ENCODE_IMAGE
from transom.errors import ContextLengthError
from transom.passes.add_taps import AddTaps
from transom.validation.bisection.bisect import _Plan, _plans, bisect, bisect_stages
from transom.validation.bisection.divergence import compare
from transom.validation.bisection.recording import Recording, record
from transom.validation.bisection.verdict import Verdict
from transom.zoo.model import Model, load

CHUNK = 21
SHORT: dict[str, Any] = {"length": 2 * CHUNK + 3, "decode": 2}


@pytest.fixture(scope="module")
def model() -> Model:
    """A window of 8, shorter than an image's 16 tokens."""
    return load("gemma3-vision-tiny", images=True)


@pytest.fixture(scope="module")
def plans(model: Model) -> dict[str, _Plan]:
    return {plan.entry: plan for plan in _plans(model, "none", [], SHORT["length"], CHUNK, SHORT["decode"])}


@pytest.fixture(scope="module")
def right(plans: dict[str, _Plan]) -> dict[str, Recording]:
    """The graphs as traced."""
    return {
        entry: record(plan.interpret(plan.context.graph), plan.calls, plan.context) for entry, plan in plans.items()
    }


def assert_named(verdict: Verdict, fault: EntryFault) -> None:
    place = (verdict.diverged, verdict.entry, verdict.layer, verdict.op, verdict.side)
    assert place == (True, fault.entry, fault.layer, fault.op, "b"), verdict
    assert fault.cause in verdict.cause and ", but" not in verdict.cause


@pytest.mark.parametrize("name", ENTRY_FAULTS)
def test_a_fault_is_placed_and_named(name: str, plans: dict[str, _Plan], right: dict[str, Recording]) -> None:
    fault = ENTRY_FAULTS[name]
    plan = plans[fault.entry]
    graph = Case(graph=plan.context.graph).run(fault.fault).graph
    wrong = record(plan.interpret(graph), plan.calls, plan.context)
    assert_named(compare(right[fault.entry], wrong, plan.context), fault)


@pytest.mark.parametrize("name", [name for name, fault in ENTRY_FAULTS.items() if fault.lowers])
def test_a_fault_is_named_on_onnxruntime(
    name: str, model: Model, plans: dict[str, _Plan], right: dict[str, Recording], tmp_path: Path
) -> None:
    fault = ENTRY_FAULTS[name]
    before = [AddTaps(), InEntry(fault.entry, fault.fault)]
    transom.compile(model, out=tmp_path / "a", chunk=CHUNK, context=64, before=before)
    session = transom.open(tmp_path / "a", threads=1)
    recordings = {entry: record(session, plan.calls, plan.context) for entry, plan in plans.items()}
    for entry, plan in plans.items():
        verdict = compare(right[entry], recordings[entry], plan.context)
        if entry == fault.entry:
            assert_named(verdict, fault)
        else:
            assert not verdict.diverged, verdict


def test_a_fault_of_a_lowering_is_named(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    window_on_both_sides(monkeypatch)
    verdict = bisect("reference", "onnxruntime", model=model, chunk=CHUNK, **SHORT)
    assert_named(verdict, ENTRY_FAULTS["a window on both sides"])
    assert verdict.stage == "lowering" and [other.diverged for other in verdict.others] == [False]


@pytest.mark.parametrize("pair", [("eager", "onnxruntime"), ("eager", "tensorrt")])
def test_both_entries_of_a_correct_model_agree(pair: tuple[str, str], model: Model) -> None:
    verdict = bisect(*pair, model=model, chunk=CHUNK, **SHORT)
    assert not verdict.diverged, verdict
    assert [(each.entry, each.compared, each.diverged) for each in (verdict, *verdict.others)] == [
        (ENCODE_IMAGE, 28, False),
        (DECODE, 105, False),
    ]


def test_an_image_within_the_window_is_compared_too() -> None:
    wide = load("gemma3-vision-tiny-wide", images=True)
    verdict = bisect("eager", "onnxruntime", model=wide, chunk=29, length=60, decode=2)
    assert not verdict.diverged and [other.diverged for other in verdict.others] == [False], verdict


def test_a_fault_on_xla_is_named(model: Model, plans: dict[str, _Plan], tmp_path: Path) -> None:
    pytest.importorskip("jax")
    fault = ENTRY_FAULTS["averages transposed"]
    before = [AddTaps(), InEntry(fault.entry, fault.fault)]
    transom.compile(model, target="xla", out=tmp_path / "a", chunk=CHUNK, context=64, before=before)
    verdict = bisect("reference", tmp_path / "a", **SHORT)
    assert_named(verdict, fault)
    assert [(other.entry, other.diverged) for other in verdict.others] == [(DECODE, False)]


def test_a_quantised_encoder_is_compared_with_what_its_codes_mean(model: Model) -> None:
    verdict = bisect("eager", "onnx@ConvertQuantized", model=model, quant="int8", chunk=CHUNK, **SHORT)
    assert not verdict.diverged and len(verdict.others) == 1, verdict


def test_the_pass_at_fault_is_named(model: Model) -> None:
    fault = ENTRY_FAULTS["another epsilon"]
    verdict = bisect_stages([InEntry(fault.entry, fault.fault)], model=model, chunk=CHUNK, **SHORT)
    assert_named(verdict, fault)
    assert verdict.stage == "InEntry"


def test_a_call_that_holds_no_image_is_refused(model: Model) -> None:
    with pytest.raises(ContextLengthError, match="calls of 15 tokens do not hold the 16 of an image"):
        bisect("reference", "eager", model=model, chunk=15)
    assert not bisect("reference", "eager", model=model, chunk=15, vision=False, length=16, decode=1).others


@pytest.fixture(scope="module")
def folders(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A correct artifact, one with a fault in its encoder, and that one without taps."""
    root = tmp_path_factory.mktemp("bisect")
    fault = ENTRY_FAULTS["scores without a scale"]
    spoilt = InEntry(fault.entry, fault.fault)
    for name, before in (("good", [AddTaps()]), ("wrong", [AddTaps(), spoilt]), ("bare", [spoilt])):
        transom.compile(model, out=root / name, chunk=CHUNK, context=64, before=before)
    return lambda name: root / name


def test_folders_on_the_command_line(cli: Cli, folders: Callable[[str], Path]) -> None:
    sizes = ("--length", 24, "--decode", 1)
    code, out, err = cli("bisect", folders("good"), "reference", *sizes)
    assert code == 0, err
    assert "encode_image: no divergence: 28 values agree" in out and "decode: no divergence: 105 values" in out
    code, out, _ = cli("bisect", folders("good"), folders("wrong"), *sizes)
    assert code == 1 and "encode_image: diverged at layer 1, softmax" in out and "decode: no divergence" in out
    assert "cause: the softmax scale is 1 in place of 0.25: the scores are not scaled" in out
    code, out, _ = cli("bisect", folders("good"), folders("wrong"), *sizes, "--json")
    verdict = json.loads(out)
    assert code == 1 and (verdict["entry"], verdict["layer"], verdict["op"]) == ("encode_image", 1, "softmax")
    assert [(other["entry"], other["diverged"]) for other in verdict["others"]] == [("decode", False)]
    code, out, _ = cli("bisect", folders("good"), folders("wrong"), *sizes, "--no-vision")
    assert code == 0 and out.startswith("no divergence: 105 values agree")
    # Made again, the spoilt one is good: so it is the folder that is at fault.
    code, out, _ = cli("bisect", folders("good"), folders("bare"), *sizes)
    assert code == 1 and "the soft tokens differ, but not those of the same artifacts made again" in out
