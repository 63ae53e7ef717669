"""Bisection: runs that agree are said to agree, and every planted fault is found, placed and named."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transom
from tests.artifacts import CHUNK, THREADS
from tests.case import Case
from tests.conftest import WINDOW
from tests.faults.graph import GRAPH_FAULTS, GraphFault, Spoil, argument
from transom.backends.artifact import read_manifest
from transom.backends.opening import open_session
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.cli import main
from transom.errors import ArtifactError, ContextLengthError, InvariantError, TargetError
from transom.export.options import Options
from transom.formats.schemes import Scheme, scheme
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.passes import pipelines
from transom.passes.add_taps import AddTaps
from transom.passes.base import Pass
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.fold_constants import FoldConstants
from transom.passes.pipelines import PIPELINES, Measure, pipeline
from transom.validation import candidates
from transom.validation.bisection import bisect as bisection
from transom.validation.bisection import sources
from transom.validation.bisection.bisect import bisect, bisect_stages
from transom.validation.bisection.context import Context
from transom.validation.bisection.divergence import Difference, compare, describe_positions
from transom.validation.bisection.eager import Eager
from transom.validation.bisection.recording import Recording, plan_calls, positions_of, record
from transom.validation.bisection.verdict import Verdict
from transom.zoo.model import Model
from transom.zoo.prompt import make_prompt

CALLS = plan_calls(window=WINDOW, chunk=CHUNK, decode=12)
SHORT: dict[str, Any] = {"length": 2 * WINDOW + 3, "decode": 2}
"""Enough for what does not depend on a cache's wrap."""
Find = Callable[[Sequence[Pass]], Verdict]


@pytest.fixture(scope="module")
def tapped(traced: Graph) -> Graph:
    return Case(graph=traced).run(AddTaps()).graph


@pytest.fixture(scope="module")
def context(tiny: Model, tapped: Graph) -> Context:
    total = CALLS[-1].stop
    return Context(graph=tapped, tokens=make_prompt(tiny, total, None).ids[:total])


def run(graph: Graph, context: Context) -> Recording:
    return record(ReferenceSession(graph, context=512, chunk=CHUNK), CALLS, context)


@pytest.fixture(scope="module")
def right(tapped: Graph, context: Context) -> Recording:
    """The graph as traced."""
    return run(tapped, context)


@pytest.fixture(scope="module")
def find(tapped: Graph, context: Context, right: Recording) -> Find:
    """Run passes on the tapped graph and compare what comes out with the graph as traced."""
    return lambda passes: compare(right, run(Case(graph=tapped).run(*passes).graph, context), context)


def passes_of(target: str) -> list[Pass]:
    return pipeline(target, chunk=CHUNK, scheme=scheme("none")).passes


def spoilt_passes(fault: GraphFault) -> list[Pass]:
    """The passes of the fault's target with the fault among them."""
    return fault.passes(passes_of(fault.target), window=WINDOW, chunk=CHUNK)


@pytest.mark.parametrize("window", [7, 16, 512, 1024])
@pytest.mark.parametrize("chunk", [256, None])
def test_single_steps_pass_the_wraps_of_both_rings(window: int, chunk: int | None) -> None:
    """Of `window` slots, where a runtime attends first, and of `window + chunk - 1`, where it writes first."""
    chunk = chunk or min(2 * window, window + 128) + 5
    calls = plan_calls(window=window, chunk=chunk)
    assert [len(call) for call in calls[:2]] == [chunk, chunk], "two whole chunks"
    assert any(1 < len(call) < chunk for call in calls), "a part of one"
    assert len(calls) <= 40
    assert positions_of("tap.norm", calls).tolist() == list(range(calls[-1].start + 1))
    single = {call.start for call in calls if len(call) == 1}
    for ring in (window, window + chunk - 1):
        assert any({wrap - 1, wrap} <= single for wrap in range(ring, calls[-1].start, ring)), ring


def test_a_prompt_that_is_asked_for_is_cut_into_whole_chunks() -> None:
    calls = plan_calls(window=WINDOW, chunk=CHUNK, length=2 * CHUNK + 3, decode=2)
    assert [len(call) for call in calls] == [CHUNK, CHUNK, 3, 1, 1]
    assert positions_of("logits", calls).tolist() == [CHUNK - 1, 2 * CHUNK - 1, *range(2 * CHUNK + 2, 2 * CHUNK + 5)]


@pytest.mark.parametrize("target", PIPELINES)
def test_all_passes_of_a_target_agree_with_the_traced_graph(target: str, find: Find) -> None:
    verdict = find(passes_of(target))
    assert not verdict.diverged, verdict
    assert verdict.compared == 105, "all taps and the logits"
    assert verdict.relative and 0 < verdict.relative < verdict.tolerance / 5


def test_the_module_agrees_with_the_graph_as_traced(tiny: Model, context: Context, right: Recording) -> None:
    eager = record(Session(Eager(tiny, context.graph, "none", context=512, chunk=CHUNK)), CALLS, context)
    assert list(eager.values) == list(right.values)
    assert not compare(eager, right, context).diverged


@pytest.mark.parametrize("name", GRAPH_FAULTS)
def test_a_fault_is_placed_and_named(name: str, find: Find) -> None:
    fault = GRAPH_FAULTS[name]
    verdict = find(spoilt_passes(fault))
    if fault.op is None:
        assert not verdict.diverged, verdict
        return
    assert (verdict.diverged, verdict.layer, verdict.op, verdict.side) == (True, fault.layer, fault.op, "b"), verdict
    assert fault.cause in verdict.cause
    if "no numbers" in verdict.cause:  # tokens that see no key at all
        assert (verdict.max_abs, verdict.relative) == (None, None)
    else:
        assert verdict.max_abs and verdict.relative and verdict.relative > verdict.tolerance


def test_the_run_at_fault_is_the_one_that_is_blamed(tapped: Graph, context: Context, right: Recording) -> None:
    fault = GRAPH_FAULTS["a window in a late layer only"]
    wrong = run(Case(graph=tapped).run(*spoilt_passes(fault)).graph, context)
    verdict, turned = compare(right, wrong, context), compare(wrong, right, context)
    assert (verdict.side, turned.side) == ("b", "a")
    assert verdict.cause == turned.cause
    assert verdict.position == WINDOW, "the first token that sees a key too many"


def test_a_fault_while_decoding_only_is_told_as_such(tiny: Model, context: Context, right: Recording) -> None:
    """Numbers that are right in a prompt and wrong in single steps: the cause holds there alone."""
    tap = "tap.layers.2.pre_feedforward_layernorm"
    single = [call.start for call in CALLS if len(call) == 1]
    first = single[0]
    value = right.values[tap].copy()
    plain = tiny.weights["layers.2.pre_feedforward_layernorm.weight"].read().numpy()
    value[single] *= plain / (1 + plain)
    wrong = dataclasses.replace(right, values={**right.values, tap: value})
    verdict = compare(right, wrong, context)
    assert (verdict.layer, verdict.op, verdict.position) == (2, "norm", first)
    assert verdict.cause == (
        "the norm multiplies by w in place of 1 + w, but only where tokens are decoded one by one, "
        f"from position {first} on"
    )


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_a_difference(broken: float, context: Context, right: Recording) -> None:
    tap = "tap.layers.1.mlp.activation"
    value = right.values[tap].copy()
    value[40, 3] = broken
    value[41:] += 0.5
    verdict = compare(right, dataclasses.replace(right, values={**right.values, tap: value}), context)
    assert (verdict.diverged, verdict.layer, verdict.position) == (True, 1, 40)
    assert "1 positions hold values that are no numbers" in verdict.cause
    # Finite differences beside them would understate it.
    data = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert (data["max_abs"], data["relative"]) == (None, None)


def test_recordings_of_other_calls_or_shapes_are_refused(context: Context, right: Recording) -> None:
    with pytest.raises(ArtifactError, match="same calls"):
        compare(right, dataclasses.replace(right, calls=right.calls[:-1]), context)
    with pytest.raises(ArtifactError, match="no tap in common"):
        compare(right, dataclasses.replace(right, values={}), context)
    cut = {name: value[..., :-1] for name, value in right.values.items()}
    with pytest.raises(ArtifactError, match="runs of one model"):
        compare(right, dataclasses.replace(right, values=cut), context)


def test_equal_infinities_are_no_difference() -> None:
    value = np.array([[np.inf, 1.0], [2.0, -np.inf]], np.float32)
    assert Difference.between("tap", value, value).relative.tolist() == [0, 0]
    assert np.isinf(Difference.between("tap", value, -value).relative).all()


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        (range(1, 20), "from position 1 on"),
        (range(16, 20), "only where tokens are decoded one by one, from position 16 on"),
        ([10, 11], "only at the first tokens of a later call, from position 10 on"),
        ([7, 9, 17], "only past the window of 8 keys, from position 7 on"),
        ([3, 12], "at 2 of 20 positions, from 3 on"),
    ],
)
def test_where_runs_differ_in_words(positions: Sequence[int], words: str) -> None:
    calls = [range(10), range(10, 16), *(range(at, at + 1) for at in range(16, 20))]
    assert describe_positions(np.array(positions), np.arange(20), calls, 8) == words


def test_the_first_pass_at_fault_is_named(tiny: Model) -> None:
    verdict = bisect_stages(spoilt_passes(GRAPH_FAULTS["the first of two"]), model=tiny, chunk=CHUNK, decode=2)
    # The pass that spoils layer 4 runs before the one that spoils layer 3.
    assert (verdict.stage, verdict.layer, verdict.op) == ("Spoil", 4, "mask")


def test_no_pass_of_a_good_target_is_at_fault(tiny: Model) -> None:
    verdict = bisect_stages("xla", model=tiny, quant="int8", length=2 * WINDOW + 3, decode=2)
    assert not verdict.diverged, verdict


def test_quantised_runs_agree_with_what_their_codes_mean(tiny: Model) -> None:
    assert not bisect("reference", "xla@ConvertQuantized", model=tiny, quant="int8", **SHORT).diverged
    # ONNX Runtime rounds activations too: allowed by the tolerance, and named where it is not.
    assert not bisect("eager", "onnxruntime", model=tiny, quant="int8", **SHORT).diverged
    verdict = bisect("reference", "onnxruntime", model=tiny, quant="int8", share=1e-4, **SHORT)
    # The last stage, interpreted, is right: see the faults below, which are told apart from this.
    assert (verdict.layer, verdict.op, verdict.stage) == (0, "quantisation", "lowering")
    assert "activations are rounded to 8 bits" in verdict.cause


@pytest.mark.parametrize(
    ("behind", "fault", "stage", "op"),
    [
        (FoldConstants, lambda: GRAPH_FAULTS["another epsilon"].plant(WINDOW, CHUNK), "Spoil", "norm"),
        (FoldConstants, lambda: [ConvertQuantized(scheme("int4"))], "ConvertQuantized", "quantisation"),
        (ConvertQuantized, lambda: GRAPH_FAULTS["another epsilon"].plant(WINDOW, CHUNK), "Spoil", "norm"),
    ],
)
def test_a_quantised_target_is_traced_to_its_pass(
    behind: type[Pass],
    fault: Callable[[], list[Pass]],
    stage: str,
    op: str,
    tiny: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[Pass] = []
    for current in pipeline("xla", chunk=CHUNK, scheme=scheme("int8")).passes:
        if not (stage == "ConvertQuantized" and isinstance(current, ConvertQuantized)):
            passes.append(current)
        if isinstance(current, behind):
            passes += fault()
    monkeypatch.setitem(pipelines.PIPELINES, "xla", lambda chunk, quant, measure: passes)
    verdict = bisect("reference", f"xla@{passes[-1].name}", model=tiny, quant="int8", chunk=CHUNK, **SHORT)
    assert (verdict.stage, verdict.op, verdict.side) == (stage, op, "b"), verdict


def test_no_pass_is_blamed_for_a_fault_of_the_trace(
    tiny: Model, traced: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = Case(graph=traced).run(Spoil(aten.mul.Tensor, argument(1, 1.0), "")).graph
    monkeypatch.setattr(Model, "trace", lambda model, **options: spoilt)
    verdict = bisect("eager", "onnx@FuseAttention", model=tiny, chunk=CHUNK, **SHORT)
    assert (verdict.diverged, verdict.op, verdict.side, verdict.stage) == (True, "embedding", "b", None)


def test_xla_agrees_with_tvm(tiny: Model) -> None:
    """Both runtimes, from the command's own sources to their taps, over a wrap of a local ring."""
    pytest.importorskip("jax")
    pytest.importorskip("tvm")
    verdict = bisect("xla", "tvm", model=tiny, chunk=WINDOW + 5, length=2 * WINDOW - 2, decode=4)
    assert not verdict.diverged, verdict
    assert verdict.compared == 105, "all taps and the logits"


def test_bad_input_is_one_line(tiny: Model, traced: Graph, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="name a model"):
        bisect("onnx", "onnxruntime")
    with pytest.raises(TargetError, match="'abacus' is no folder and no target"):
        bisect("onnx", "abacus", model=tiny)
    with pytest.raises(TargetError, match="onnx has no pass 'FuseEverything': choose one of Canonicalize"):
        bisect("reference", "onnx@FuseEverything", model=tiny)
    with pytest.raises(TargetError, match="'reference@FuseNorms' is no folder"):
        bisect("reference@FuseNorms", "onnx", model=tiny)
    with pytest.raises(ArtifactError, match="not an artifact"):
        bisect(tmp_path, "onnx", model=tiny)
    with pytest.raises(InvariantError, match="a graph without taps"):
        bisect("reference", traced, model=tiny)
    with pytest.raises(ContextLengthError, match="shorter --length"):
        bisect("reference", "eager", model=tiny, length=510, decode=10)


def test_an_artifact_is_made_again_for_its_own_processor(
    tiny: Model, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors: list[str | None] = []

    @contextlib.contextmanager
    def compiled(model: Model, options: Options) -> Iterator[None]:
        processors.append(options.cpu)
        yield

    monkeypatch.setattr(sources, "_compiled", compiled)
    manifest = read_manifest(folders["good_bare"])
    for machine, cpu, system in (
        ("x86_64", "x86-64-v3", "linux-gnu"),
        ("aarch64", "generic", "linux-gnu"),
        ("aarch64", "generic", "apple-darwin"),
    ):
        details = {"machine": machine, "triple": f"{machine}-{system}", "cpu": cpu}
        with sources.rebuilt(dataclasses.replace(manifest, target="tvm", details=details), tiny):
            pass
    with sources.rebuilt(manifest, tiny):
        pass
    assert processors == ["x86-64-v3", "aarch64", None, None]


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `transom bisect`; returns (exit code, standard output, standard error)."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transom", "bisect", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def folders(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of the tiny model: good, with a fault, and both without taps."""
    root, artifacts = tmp_path_factory.mktemp("bisect"), {}
    passes = spoilt_passes(GRAPH_FAULTS["a window in a late layer only"])

    def spoilt(chunk: int, quant: Scheme, measure: Measure) -> list[Pass]:
        return passes

    for name, list_of, taps in (
        ("good", PIPELINES["onnx"], True),
        ("good_bare", PIPELINES["onnx"], False),
        ("wrong", spoilt, True),
        ("wrong_bare", spoilt, False),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(pipelines.PIPELINES, "onnx", list_of)
            before = [AddTaps()] if taps else []
            artifacts[name] = transom.compile(
                tiny, target="onnx", context=128, chunk=CHUNK, before=before, out=root / name
            ).folder
    return artifacts


def test_two_folders(cli: Cli, folders: dict[str, Path]) -> None:
    code, out, _ = cli(folders["good"], folders["wrong"], "--json")
    verdict = json.loads(out)
    assert code == 1
    assert {key: verdict[key] for key in ("diverged", "layer", "op", "side", "stage")} == {
        "diverged": True, "layer": 4, "op": "mask", "side": "b", "stage": None,
    }  # fmt: skip
    assert verdict["max_abs"] > 0.01
    assert "off by one: 17 keys in place of 16" in verdict["cause"]
    code, out, _ = cli(folders["good"], folders["good"])
    assert code == 0
    assert "no divergence: 105 values agree" in out


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("source", "revision", "seed 1", "(revision differ)"),
        ("model", "window", 32, "(window differ)"),
        (None, "quantization", "int8", "(quantization differ)"),
    ],
)
def test_folders_of_different_models(
    cli: Cli, folders: dict[str, Path], tmp_path: Path, section: str | None, key: str, value: object, words: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders["good"], other)
    manifest = json.loads((other / "manifest.json").read_text())
    (manifest[section] if section else manifest)[key] = value
    (other / "manifest.json").write_text(json.dumps(manifest))
    code, out, err = cli(folders["good"], other)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert "hold different models" in err and words in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--quant", "int8"], "--quant int8 has no effect on folders"),
        (["--seed", 3], "--weights and --seed say how --model is loaded"),
        (["--weights", "random"], "--weights and --seed say how --model is loaded"),
        (["--model", "gemma3-tiny", "--weights", "random", "--seed", 3], "the model at hand is seed 3"),
    ],
)
def test_options_without_effect_on_folders(cli: Cli, folders: dict[str, Path], args: list[object], words: str) -> None:
    code, out, err = cli(folders["good"], folders["wrong"], *args)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert words in err


def test_a_folder_and_another_quantisation(tiny: Model, folders: dict[str, Path]) -> None:
    with pytest.raises(ArtifactError, match="holds the quantisation 'none', not 'int8'"):
        bisect(folders["good"], "onnx", model=tiny, quant="int8")


def test_what_is_not_a_number_in_words(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Verdict(diverged=True, tap="tap.norm", max_abs=None, relative=None, position=3, positions=1)
    monkeypatch.setattr(bisection, "bisect", lambda *_, **__: broken)
    code, out, _ = cli("reference", "eager", "--model", "gemma3-tiny")
    assert code == 1
    assert "the largest difference is not a number" in out


def test_folders_without_taps(cli: Cli, folders: dict[str, Path]) -> None:
    code, out, _ = cli(folders["good_bare"], folders["good"], "--json")
    assert (code, json.loads(out)["compared"]) == (0, 1)
    assert "only logits were compared" in out
    code, out, _ = cli(folders["good_bare"], folders["wrong"], "--json")
    assert (code, json.loads(out)["layer"], json.loads(out)["op"]) == (1, 4, "mask")
    # Made again, the spoilt one is good: so it is the folder that is at fault.
    code, out, _ = cli(folders["good"], folders["wrong_bare"], "--json")
    assert (code, json.loads(out)["layer"], json.loads(out)["op"]) == (1, None, "logits")
    assert "a folder holds something else than this version exports" in out


def test_targets_and_stages(cli: Cli) -> None:
    code, out, _ = cli("onnxruntime", "onnx@FuseRotary", "--model", "gemma3-tiny", "--decode", 2)
    assert code == 0, out
    code, out, _ = cli("--stages", "tvm", "--model", "gemma3-tiny", "--length", 24, "--decode", 1, "--json")
    assert (code, json.loads(out)["diverged"]) == (0, False)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["onnx"], "give two things to compare"),
        (["onnx", "xla", "--stages", "xla"], "give two things to compare"),
        (["--stages", "xla"], "needs --model"),
        (["--stages", "abacus", "--model", "gemma3-tiny"], "no target named 'abacus'"),
        (["nowhere", "onnx", "--model", "gemma3-tiny"], "'nowhere' is no folder and no target"),
        (["onnx", "xla", "--model", "gemma9"], "no model named 'gemma9'"),
    ],
)
def test_bad_input_on_the_command_line(cli: Cli, args: list[str], words: str) -> None:
    code, out, err = cli(*args)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert words in err


def test_a_target_at_fault_is_traced_to_its_pass(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = spoilt_passes(GRAPH_FAULTS["another epsilon"])
    monkeypatch.setitem(pipelines.PIPELINES, "onnx", lambda chunk, quant, measure: passes)
    code, out, _ = cli("reference", "onnx", "--model", "gemma3-tiny", "--decode", 2)
    assert code == 1
    for words in ("diverged at layer 3, norm", "epsilon is 0.01", "stage: Spoil", "at fault: onnx"):
        assert words in out


@pytest.mark.real
@pytest.mark.slow
def test_two_targets_agree_on_the_real_model(real: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "open_session", functools.partial(open_session, threads=THREADS))
    # With short chunks both rings wrap in half as many tokens.
    verdict = transom.bisect("onnxruntime", "onnx", model=real, chunk=64)
    assert not verdict.diverged, verdict
    assert verdict.compared == 309
