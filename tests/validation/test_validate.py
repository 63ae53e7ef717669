"""`transom validate`: good targets pass, broken ones fail with exit code 1 and the place, bad input is one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import transom
from tests.artifacts import CHUNK, Export
from tests.conftest import WINDOW, Cli
from tests.faults.graph import GRAPH_FAULTS
from tests.validation.conftest import TARGETS
from transom.backends.folder import CERTIFICATE
from transom.backends.onnxruntime.runtime import OnnxRuntime
from transom.backends.runtime import Call, Result
from transom.backends.session import Session
from transom.errors import TargetError
from transom.export.exporter import exporter
from transom.formats import rounding
from transom.formats.schemes import Scheme
from transom.passes import conversion, pipelines
from transom.passes.base import Pass
from transom.passes.pipelines import Measure
from transom.passes.targets import TARGETS as TARGETS_BY_NAME
from transom.validation import candidates
from transom.validation import validate as validating
from transom.validation.certificate import read_certificate
from transom.validation.result import Validation
from transom.validation.tolerances import BFLOAT16, FLOAT32
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.model import Model

LENGTHS = [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 3 * WINDOW + 5, 4 * WINDOW + 3]
RING = WINDOW + 24 - 1
PER_SLOT = 2 * 2 * 32 * 4
JSON = ("--threads", 1, "--json", "-")

Good = tuple[Validation, Path]


@pytest.fixture
def artifact(good: Good, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the artifact for ONNX Runtime, without a certificate."""
    folder = tmp_path_factory.mktemp("copy") / "onnxruntime"
    shutil.copytree(good[1] / "onnxruntime", folder)
    (folder / CERTIFICATE).unlink()
    return folder


def test_good_targets_pass_at_the_lengths_that_matter(good: Good) -> None:
    validation, _ = good
    assert validation.passed and tuple(validation.targets) == TARGETS
    for result in validation.targets.values():
        assert result.failures == () and result.first_divergence is None and result.new_tokens == 32
        assert [run.length for run in result.prefills] == LENGTHS
        # All of the longest; of the others the last call, as those before it are the longest's.
        assert [run.first for run in result.prefills] == [0, 0, 0, 24, 48, 0]
        # A call longer than the window, and decoding over the window's edge and over the wrap of the ring.
        assert result.chunk == 24 > WINDOW
        spans = [(run.first, run.length) for run in result.lengths if run.kind == "decode"]
        assert spans == [(WINDOW - 4, WINDOW + 4), (RING - 4, RING + 4)]
        assert 0 < result.worst("max_abs") < 1e-4 and result.worst("max_rel") < FLOAT32.relative
        assert result.top1_agreement == 1 and result.kl_unquantized is None
        assert result.caches is not None
        assert result.caches.local == result.caches.local_manifest == 4 * RING * PER_SLOT
        assert result.caches.local_window == 4 * WINDOW * PER_SLOT
        assert result.caches.unbounded == 4 * 128 * PER_SLOT
        assert result.caches.global_ == 2 * 128 * PER_SLOT
        assert len(result.by_position) == LENGTHS[-1]
        assert max(result.by_position) == result.prefills[-1].max_rel


def test_layers_are_compared_with_the_references(good: Good) -> None:
    validation, _ = good
    assert validation.targets["reference"].layers == ()
    for name in ("onnxruntime", "onnx"):
        layers = validation.targets[name].layers
        assert {tap.layer for tap in layers} == {None, *range(6)}
        assert {"attention", "norm", "projection", "residual"} <= {tap.op for tap in layers}
        assert 0 < max(tap.max_rel for tap in layers) < FLOAT32.relative
        assert max(tap.max_abs for tap in layers) > 0


def test_the_json_contract(cli: Cli, tmp_path: Path) -> None:
    options = ("--targets", "onnxruntime", "--threads", 1, "--json", tmp_path / "v.json")
    code, out, err = cli("validate", "gemma3-tiny", *options)
    assert code == 0, err
    assert "onnxruntime" in out and "pass" in out
    data = json.loads((tmp_path / "v.json").read_text())
    assert data["model"] == "gemma3-tiny" and data["passed"] is True
    target = data["targets"]["onnxruntime"]
    assert {
        "passed", "max_abs", "max_rel", "kl", "top1_agreement", "first_divergence", "cache_bytes", "lengths",
    } <= set(target)  # fmt: skip
    assert target["passed"] is True and target["first_divergence"] is None
    assert 0 <= target["kl"] <= target["kl_max"]
    assert target["cache_bytes"]["local"] == 4 * RING * PER_SLOT
    assert {"length", "max_abs", "max_rel", "kl_mean", "kl_max", "top1_agreement", "seconds"} <= set(
        target["lengths"][0]
    )


def perturbed(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Let ONNX Runtime's logits be wrong from the first position whose window has left position 0."""
    honest = OnnxRuntime._run

    def run(self: OnnxRuntime, call: Call) -> Result:
        result = honest(self, call)
        logits = result.logits.copy()
        logits[:, call.start[0] + call.logit_positions >= WINDOW, 7] += value
        return dataclasses.replace(result, logits=logits)

    monkeypatch.setattr(OnnxRuntime, "_run", run)


def test_all_targets_are_proved(cli: Cli, good: Good, tmp_path: Path) -> None:
    """What a user runs, and what an export of each target gets: a certificate that belongs to its manifest."""
    # Those of `TARGETS` were exported above.
    names = ["reference", *(name for name in TARGETS_BY_NAME if name not in TARGETS)]
    options = ("--targets", ",".join(names), "--threads", 1, "--out", tmp_path / "out")
    code, _, err = cli(
        "validate", "gemma3-tiny", *options, "--json", tmp_path / "v.json", "--html", tmp_path / "v.html"
    )
    assert code == 0, err
    targets = json.loads((tmp_path / "v.json").read_text())["targets"]
    assert list(targets) == names
    for name, target in targets.items():
        assert target["passed"] and target["first_divergence"] is None, name
        assert target["top1_agreement"] == 1 or name == "tensorrt", name
        bound = FLOAT32 if target["dtype"] == "float32" else BFLOAT16
        assert (0 < target["max_rel"] < bound.relative and target["layers"]) or name == "reference"
        slots = WINDOW if name in ("xla", "tvm") else RING
        per_slot = PER_SLOT // 2 if name == "tensorrt" else PER_SLOT
        assert target["cache_bytes"]["local"] == 4 * slots * per_slot, name
        assert (name == "tensorrt") == ("ONNX file runs on the CPU" in target["note"])
        assert f">{name}<" in (tmp_path / "v.html").read_text()
    for folder in (*(tmp_path / "out" / name for name in names[1:]), *(good[1] / name for name in TARGETS[1:])):
        inspected = json.loads(cli("inspect", folder, "--json")[1])
        assert inspected["certificate"]["passed"] is True


@pytest.mark.parametrize("value", [0.01, float("nan"), float("inf")])
def test_logits_that_are_wrong_past_the_window(
    cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    perturbed(monkeypatch, value)
    code, out, err = cli("validate", artifact, *JSON)
    assert code == 1, err
    data = json.loads(out)
    target = data["targets"]["onnxruntime"]
    assert data["passed"] is target["passed"] is False
    # The first prompt that reaches the position says so; those before it are fine.
    assert f"a prompt of {WINDOW + 1}: logits differ from position {WINDOW} on" in target["failures"][0]
    prompts = {run["length"]: run for run in target["lengths"] if run["kind"] == "prefill"}
    assert prompts[WINDOW]["max_rel"] < FLOAT32.relative
    assert prompts[WINDOW + 1]["max_abs"] == (pytest.approx(0.01, rel=0.1) if value == 0.01 else None)
    assert any(f"decoding {WINDOW - 4} to {WINDOW + 3}" in line for line in target["failures"])


def test_the_terminal_says_what_failed(cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perturbed(monkeypatch, 0.01)
    code, out, _ = cli("validate", artifact, "--threads", 1)
    assert code == 1
    assert "FAIL" in out and f"a prompt of {WINDOW + 1}: logits differ from position {WINDOW} on" in out


def test_a_cache_that_grows(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are all right, for the window's mask is there; only the memory is not."""
    whole = pipelines.PIPELINES["onnx"]

    def unbounded(chunk: int, scheme: Scheme, measure: Measure) -> list[Pass]:
        passes = [step for step in whole(chunk, scheme, measure) if step is not None]
        return GRAPH_FAULTS["a cache that grows"].passes(passes, window=WINDOW, chunk=chunk)

    monkeypatch.setitem(pipelines.PIPELINES, "onnx", unbounded)
    code, out, err = cli("validate", "gemma3-tiny", "--targets", "onnx", *JSON)
    assert code == 1, err
    target = json.loads(out)["targets"]["onnx"]
    assert target["max_rel"] < FLOAT32.relative and target["first_divergence"] is None
    # Keys and values of the four local layers, and of no global one.
    assert target["failures"] == [
        f"cache.{layer}.{part}: layer {layer} is local, but its cache grows with the context"
        for layer in (0, 1, 3, 4)
        for part in ("key", "value")
    ]


def test_a_cache_that_is_larger_than_its_manifest_says(
    cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Session.cache_bytes

    def grown(self: Session) -> dict[str, int]:
        return {**honest(self), "local": honest(self)["local"] + 4 * self.position}

    monkeypatch.setattr(Session, "cache_bytes", grown)
    code, out, _ = cli("validate", artifact, *JSON)
    (line,) = json.loads(out)["targets"]["onnxruntime"]["failures"]
    assert code == 1 and "caches of local layers take" in line and f"{4 * RING * PER_SLOT:,}" in line


def test_a_wrong_greedy_token(cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Session.generate

    def generate(self: Session, prompt: Sequence[int], **options: Any) -> Iterator[int]:
        for index, token in enumerate(honest(self, prompt, **options)):
            yield (token + 1) % self.vocab_size if index == 5 else token

    monkeypatch.setattr(Session, "generate", generate)
    code, out, _ = cli("validate", artifact, *JSON)
    target = json.loads(out)["targets"]["onnxruntime"]
    (line,) = target["failures"]
    assert code == 1 and target["first_divergence"] == target["first_different"] == 5
    assert f"prompt of {3 * WINDOW + 5} leaves the oracle's at new token 5" in line


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantised_targets_have_an_oracle_of_the_same_numbers(tiny: Model, quant: str) -> None:
    validation = transom.validate(tiny, targets=("reference", "onnxruntime"), quant=quant, threads=1)
    assert validation.passed, [result.failures for result in validation.targets.values()]
    reference, runtime = validation.targets.values()
    # The same numbers: no further away than without quantisation. The unquantised model is much further.
    assert reference.tolerance is FLOAT32
    for result in (reference, runtime):
        assert result.kl_unquantized is not None and result.kl_unquantized > 100 * FLOAT32.kl_max
    assert runtime.worst("max_rel") > 10 * FLOAT32.relative, "its activations are int8"


def test_an_artifact_is_validated_as_it_stands(cli: Cli, exported: Export, tmp_path: Path) -> None:
    """Its own chunk and context; the model is found by its manifest."""
    for name, target in (("a", "onnxruntime"), ("b", "onnxruntime"), ("c", "onnx")):
        shutil.copytree(exported(target, "none").folder, tmp_path / name)
    code, out, err = cli("validate", *(tmp_path / name for name in "abc"), "--threads", 1, "--json", "-")
    assert code == 0, err
    targets = json.loads(out)["targets"]
    assert list(targets) == [f"onnxruntime ({tmp_path / 'a'})", f"onnxruntime ({tmp_path / 'b'})", "onnx"]
    for target in targets.values():
        assert target["chunk"] == CHUNK and target["context"] == 512
        assert target["slots"] == [WINDOW + CHUNK - 1]
    assert all(read_certificate(tmp_path / name).state == "valid" for name in "abc")


def test_the_certificate(good: Good, tmp_path: Path) -> None:
    validation, out = good
    for name in ("onnxruntime", "onnx"):
        assert sorted(path.name for path in (out / name).iterdir()) == [
            "chat_template.jinja", "generation_config.json", "manifest.json", "model.onnx", "model.onnx.data",
            "tokenizer.json", "tokenizer_config.json", CERTIFICATE,
        ]  # fmt: skip
        transom.open(out / name)
        data = json.loads((out / name / CERTIFICATE).read_text())
        assert data["passed"] is True and data["model"] == "gemma3-tiny"
        assert data["result"]["tolerance"]["relative"] == FLOAT32.relative
        assert data["result"]["lengths"] == validation.to_json()["targets"][name]["lengths"]
        assert {"oracle", "versions", "date", "prompt", "manifest_sha256"} <= set(data)
        assert "torch" in data["versions"]
    assert not (out / "reference").exists()


def test_a_certificate_of_another_manifest(good: Good, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(good[1] / "onnx", folder)

    def state() -> tuple[str, str]:
        shown = cli("inspect", folder)[1]
        return json.loads(cli("inspect", folder, "--json")[1])["certificate"]["state"], shown

    assert state()[0] == "valid" and "passed on" in state()[1]
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"chunk": 24', '"chunk": 23'))
    assert state()[0] == "stale" and "the manifest has changed since" in state()[1]
    (folder / "manifest.json").write_text(manifest)
    assert state()[0] == "valid"
    (folder / CERTIFICATE).write_text('{"passed": true}')
    assert state()[0] == "damaged" and "cannot be read" in state()[1]
    (folder / CERTIFICATE).unlink()
    assert state()[0] == "none" and "not validated" in state()[1]


def test_a_failure_is_certified_too(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perturbed(monkeypatch, float("nan"))
    assert read_certificate(artifact).state == "none"
    assert not transom.validate(artifact, threads=1).passed
    certificate = read_certificate(artifact)
    assert certificate.state == "valid" and certificate.passed is False and "failed on" in certificate.describe()
    assert "NaN" not in (artifact / CERTIFICATE).read_text()


def test_a_model_without_a_tokenizer_reads_random_tokens(tmp_path: Path) -> None:
    config = preset("gemma3-tiny")
    write_checkpoint(tmp_path / "model", config, random_weights(config, 0))
    validation = transom.validate(tmp_path / "model", targets=["reference"], seed=3)
    assert validation.prompt["source"] == "random tokens of seed 3"
    assert validation.prompt["tokens"] == LENGTHS[-1]


def test_a_text_of_ones_own(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("A window. " * 3)
    code, out, err = cli("validate", artifact, *JSON, "--text", tmp_path / "text")
    assert code == 0, err
    # A short one is repeated.
    assert json.loads(out)["prompt"]["source"] == f"{tmp_path / 'text'}, 3 times"


def _without_tvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(target: str) -> Any:
        if target == "tvm":
            raise TargetError("the target 'tvm' needs a library that is missing (tvm): pip install 'transom[tvm]'")
        return exporter(target)

    monkeypatch.setattr(candidates, "exporter", without)


def test_a_missing_library(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_tvm(monkeypatch)
    code, _, err = cli("validate", "gemma3-tiny", "--targets", "reference,tvm")
    assert code == 2 and "pip install 'transom[tvm]'" in err and len(err.strip().splitlines()) == 1
    installed, missing = candidates.installed_targets(quant="none", dtype="float32")
    assert "tvm" not in installed and {"reference", "onnxruntime", "onnx"} <= set(installed)
    assert "pip install 'transom[tvm]'" in missing["tvm"]


def test_what_is_not_run_is_listed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default all targets whose libraries are installed; here TVM's is not, and XLA is not asked for."""
    _without_tvm(monkeypatch)
    # A copy: entries that are taken out and put back would change the order for every test after this one.
    left = {name: target for name, target in TARGETS_BY_NAME.items() if name in ("onnx", "tvm")}
    monkeypatch.setattr(candidates, "TARGETS", left)
    code, out, err = cli("validate", "gemma3-tiny", "--threads", 1, "--json", "-")
    assert code == 0, err
    data = json.loads(out)
    assert list(data["targets"]) == ["reference", "onnx"]
    assert "pip install" in data["not_run"]["tvm"]


def test_targets_that_cannot_hold_a_scheme_are_listed() -> None:
    installed, missing = candidates.installed_targets(quant="fp8_activations", dtype=None)
    assert installed == ["reference", "onnxruntime", "onnx", "xla"]
    assert set(missing) == {"tvm", "tensorrt"} and "rounds no activations" in missing["tvm"]


@pytest.mark.parametrize("broken", ["run", "open"])
def test_a_runtime_that_breaks_fails_alone(
    cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def breaks(*args: Any, **options: Any) -> Any:
        raise RuntimeError("illegal\ninstruction")

    monkeypatch.setattr(OnnxRuntime, {"run": "run", "open": "__init__"}[broken], breaks)
    files = ("--json", tmp_path / "v.json", "--html", tmp_path / "v.html")
    code, out, err = cli("validate", artifact, "--targets", "reference", "--threads", 1, *files)
    assert code == 1, err
    targets = json.loads((tmp_path / "v.json").read_text())["targets"]
    assert targets["reference"]["passed"] is True and targets["onnxruntime"]["passed"] is False
    assert targets["onnxruntime"]["failures"] == ["could not run: RuntimeError: illegal instruction"]
    assert targets["onnxruntime"]["max_abs"] is targets["onnxruntime"]["cache_bytes"] is None
    assert "FAIL" in out and "could not run" in out and "could not run" in (tmp_path / "v.html").read_text()
    assert read_certificate(artifact).passed is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.html", "v.json"]


@pytest.mark.parametrize("case", ["not writable", "not opened"])
def test_folders_are_tried_before_the_oracle(
    cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "denied") if case == "not writable" else TargetError("made for another CPU")

    def oracle(*args: Any) -> Any:
        raise AssertionError("the oracle ran")

    if case == "not writable":
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    else:
        monkeypatch.setattr(candidates, "open_session", refuse)
    monkeypatch.setattr(validating, "Oracle", oracle)
    code, _, err = cli("validate", artifact)
    assert code == 2 and ("cannot write to" if case == "not writable" else "another CPU") in err


def test_a_broken_quantisation(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle has the same codes, so nothing else would tell."""
    honest = rounding.round_rows

    def halved(*args: Any, **options: Any) -> Any:
        rounded = honest(*args, **options)
        return dataclasses.replace(rounded, scales=rounded.scales / 2)

    monkeypatch.setattr(conversion, "round_rows", halved)
    validation = transom.validate(tiny, targets=["reference"], quant="int4_table", context=64)
    (line,) = validation.targets["reference"].failures
    assert "the quantised weights are far from the model's" in line


def test_what_was_not_reached_is_shown(cli: Cli, tmp_path: Path) -> None:
    options = ("--targets", "reference", "--context", 12, "--no-layers", "--html", tmp_path / "v.html")
    code, out, err = cli("validate", "gemma3-tiny", *options, "--json", tmp_path / "v.json")
    assert code == 0, err
    line = "decoding over the edge of the window of 16: the context ends before it"
    assert line in json.loads((tmp_path / "v.json").read_text())["targets"]["reference"]["not_reached"]
    assert line in out and line in (tmp_path / "v.html").read_text()


def test_overwrite(cli: Cli, artifact: Path) -> None:
    before = (artifact / "manifest.json").read_text()
    out = artifact.parent
    options = ("--targets", "onnxruntime", "--out", out, "--overwrite", "--threads", 1, "--context", 64)
    code, _, err = cli("validate", "gemma3-tiny", *options)
    assert code == 0, err
    assert (artifact / "manifest.json").read_text() != before and read_certificate(artifact).passed


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "unknown target": (("gemma3-tiny", "--targets", "reference,abacus"), "abacus"),
    "target twice": (("gemma3-tiny", "--targets", "onnx,onnx"), "twice"),
    "no target": (("gemma3-tiny", "--targets", ""), "choose one of"),
    "unknown model": (("gemma9-1b",), "gemma3-270m"),
    "two models": (("gemma3-tiny", "gemma3-270m"), "one model"),
    "model named twice": (("gemma3-tiny", "--model", "gemma3-tiny"), "one model"),
    "unknown scheme": (("gemma3-tiny", "--quant", "int3"), "int8"),
    "unknown dtype": (("gemma3-tiny", "--dtype", "float64", "--targets", "reference"), "float64"),
    "dtype of another target": (("gemma3-tiny", "--dtype", "bfloat16", "--targets", "onnx"), "bfloat16"),
    "context beyond the model": (("gemma3-tiny", "--context", 513), "512"),
    "context of one token": (("gemma3-tiny", "--targets", "reference", "--context", 1), "--context"),
    "weights misspelt": (("gemma3-tiny", "--weights", "rnd"), "random"),
    "text missing": (("gemma3-tiny", "--text", "{tmp}/none.txt"), "none.txt"),
    "text that is no text": (("gemma3-tiny", "--text", "{artifact}/model.onnx.data"), "model.onnx.data"),
    "report in no folder": (("gemma3-tiny", "--html", "{tmp}/none/v.html"), "v.html"),
    "numbers in a folder": (("gemma3-tiny", "--json", "{artifact}"), "cannot write"),
    "folder exists": (("gemma3-tiny", "--targets", "onnx", "--out", "{artifact}/.."), "--overwrite"),
    "nothing to overwrite": (("gemma3-tiny", "--overwrite"), "--out"),
    "scheme of another target": (("gemma3-tiny", "--targets", "tvm", "--quant", "fp8_activations"), "activations"),
    "quant of an artifact": (("{artifact}", "--quant", "int8"), "--quant"),
    "dtype of an artifact": (("{artifact}", "--dtype", "float32"), "--dtype"),
    "context of an artifact": (("{artifact}", "--context", 64), "--context"),
    "chunk of an artifact": (("{artifact}", "--chunk", 8), "--chunk"),
    "folder for an artifact": (("{artifact}", "--out", "{tmp}/out"), "--out"),
    "weights of an artifact": (("{artifact}", "--weights", "random"), "--weights"),
    "seed of an artifact": (("{artifact}", "--seed", 1), "--seed"),
    "artifact of other weights": (("{artifact}", "--model", "gemma3-tiny", "--seed", 1), "seed 1"),
    "artifact of another model": (("{artifact}", "--model", "gemma3-1b", "--weights", "random"), "head_dim"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(cli: Cli, good: Good, tmp_path: Path, case: str) -> None:
    args, hint = BAD[case]
    filled = [str(arg).format(tmp=tmp_path, artifact=good[1] / "onnx") for arg in args]
    code, out, err = cli("validate", *filled)
    assert code == 2, out + err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
    assert hint in err
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_damaged_artifact(cli: Cli, good: Good, tmp_path: Path) -> None:
    shutil.copytree(good[1] / "onnx", tmp_path / "copy")
    data = bytearray((tmp_path / "copy" / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "copy" / "model.onnx.data").write_bytes(data)
    code, _, err = cli("validate", tmp_path / "copy")
    assert code == 2 and "sha256" in err
