"""`transom evaluate`: numbers against direct computations, fronts with known answers, and bad input in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import transom
from tests.artifacts import Export
from tests.conftest import WINDOW, Cli
from tests.tolerances import FP32_LOGITS
from tests.validation.conftest import parsed
from transom.backends.onnxruntime.runtime import OnnxRuntime
from transom.backends.runtime import Call, Result
from transom.errors import ConfigError, ContextLengthError, QuantizationError, TargetError, TokenizerError
from transom.validation.compare import measure
from transom.validation.evaluation import rows
from transom.validation.evaluation.evaluate import evaluate_sources
from transom.validation.evaluation.result import Evaluation, front
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.model import Model

LENGTH = 5 * WINDOW + 3
WINDOWS = 2
SCHEMES = ("none", "int8", "int4")
WORDS = "A transom is the crossbar that divides a window into panes; some of them see far, most of them do not. " * 6

Fast = ("--threads", 1, "--decode-tokens", 2)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 600 tokens: the tiny tokenizer knows bytes alone."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="session")
def weighed(tiny: Model, words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    """gemma3-tiny on ONNX Runtime, in calls longer than the window, and its artifacts. Copy what you change."""
    out = tmp_path_factory.mktemp("evaluated")
    evaluation = evaluate_sources(
        tiny,
        text=words,
        schemes=SCHEMES,
        length=LENGTH,
        windows=WINDOWS,
        chunk=37,
        decode_tokens=5,
        threads=1,
        out=out,
    )
    return evaluation, out


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    rows: NDArray[np.float64] = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
    return rows


def sequences(model: Model) -> list[list[int]]:
    """The text cut by hand: <bos> in front of each, and no token twice."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(WORDS.strip())
    return [[ids[0], *ids[1:LENGTH]], [ids[0], *ids[LENGTH : 2 * LENGTH - 1]]]


def plain(model: Model, ids: list[int]) -> NDArray[np.float64]:
    """Log probabilities [T, V] of the plain module."""
    with torch.no_grad():
        logits_BTV, _ = model.eager()(torch.tensor([ids]), torch.tensor(0), None)
    return log_softmax(logits_BTV[0].numpy())


def test_the_oracle_is_the_plain_module(weighed: tuple[Evaluation, Path], tiny: Model) -> None:
    evaluation, _ = weighed
    losses = np.concatenate([-plain(tiny, ids)[range(LENGTH - 1), ids[1:]] for ids in sequences(tiny)])
    row = evaluation.plain
    assert evaluation.rows[0] is row and row.target == "plain module" and row.scheme == "none"
    assert row.loss.mean == pytest.approx(losses.mean(), abs=FP32_LOGITS)
    assert row.perplexity == pytest.approx(math.exp(losses.mean()), rel=FP32_LOGITS)
    assert row.loss.error == pytest.approx(losses.std(ddof=1) / math.sqrt(losses.size), rel=1e-4)
    assert row.perplexity_error == pytest.approx(row.perplexity * row.loss.error)
    assert (row.kl.mean, row.loss_difference.mean, row.top1_agreement) == (0, 0, 1)
    assert row.prefill is None and row.decode is None
    assert evaluation.parameters == tiny.parameters
    assert row.bytes == 4 * tiny.parameters and row.bytes_per_weight == 4
    assert evaluation.text["scored"] == losses.size == WINDOWS * (LENGTH - 1)
    assert (evaluation.text["sequences"], evaluation.text["length"]) == (WINDOWS, LENGTH)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_row_is_what_its_session_says(weighed: tuple[Evaluation, Path], tiny: Model, name: str) -> None:
    """Past the window, over calls that end inside a sequence; the session is run in one go here."""
    evaluation, out = weighed
    (row,) = [row for row in evaluation.measured if row.scheme == name]
    session = transom.open(out / f"onnxruntime-{name}", threads=1)
    losses, differences, distances, agreements = [], [], [], []
    for ids in sequences(tiny):
        p, q = plain(tiny, ids)[:-1], log_softmax(session.logits(ids))[:-1]
        took = (np.arange(LENGTH - 1), ids[1:])
        losses.append(-q[took])
        differences.append(p[took] - q[took])
        distances.append((np.exp(p) * (p - q)).sum(-1))
        agreements.append(p.argmax(-1) == q.argmax(-1))
    difference, distance = np.concatenate(differences), np.concatenate(distances)
    assert row.loss.mean == pytest.approx(np.concatenate(losses).mean(), abs=FP32_LOGITS)
    assert row.loss_difference.mean == pytest.approx(difference.mean(), abs=FP32_LOGITS)
    assert row.kl.mean == pytest.approx(distance.mean(), rel=1e-3, abs=1e-6)
    assert row.top1_agreement == np.concatenate(agreements).mean()
    if name == "none":
        assert abs(row.loss_difference.mean) < FP32_LOGITS and row.kl.mean < 1e-6 and row.top1_agreement == 1
    else:
        assert row.kl.error == pytest.approx(distance.std(ddof=1) / math.sqrt(distance.size), rel=1e-3)
        assert row.loss_difference.error == pytest.approx(difference.std(ddof=1) / math.sqrt(difference.size), rel=1e-3)
        # The text's own spread, which both sides share, is taken out of the difference.
        assert row.kl.mean > 1e-3 and row.loss_difference.error < row.loss.error
    assert row.prefill is not None and row.prefill > 0 and row.decode is not None and row.decode > 0


def test_bytes_are_those_of_the_payload(weighed: tuple[Evaluation, Path]) -> None:
    evaluation, out = weighed
    sizes = {row.scheme: row.bytes for row in evaluation.measured}
    for name, size in sizes.items():
        folder = out / f"onnxruntime-{name}"
        assert size == sum((folder / part).stat().st_size for part in ("model.onnx", "model.onnx.data"))
    assert sizes["int4"] < sizes["int8"] < sizes["none"]
    for row in evaluation.measured:
        assert row.bytes_per_weight == row.bytes / evaluation.parameters


@pytest.mark.usefixtures("traced_once")
def test_a_text_of_its_own_is_worth_a_known_perplexity(
    tiny: Model, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that knows nothing has the vocabulary for its perplexity, and the oracle's loss less log V from it."""

    def run(self: OnnxRuntime, call: Call) -> Result:
        return Result(logits=np.zeros((1, len(call.logit_positions), self.vocab_size), dtype=np.float32))

    monkeypatch.setattr(OnnxRuntime, "_run", run)
    evaluation = evaluate_sources(tiny, text=words, schemes=["none"], length=40, decode_tokens=1, threads=1)
    (row,) = evaluation.measured
    assert row.perplexity == pytest.approx(tiny.config.vocab_size, rel=1e-6) and row.loss.error < 1e-6
    assert row.loss_difference.mean == pytest.approx(math.log(tiny.config.vocab_size) - evaluation.plain.loss.mean)
    assert row.folder is None


@pytest.mark.usefixtures("traced_once")
def test_logits_that_are_no_numbers(tiny: Model, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OnnxRuntime._run

    def run(self: OnnxRuntime, call: Call) -> Result:
        result = honest(self, call)
        logits = result.logits.copy()
        logits[:, call.start[0] + call.logit_positions == 3] = np.nan
        return dataclasses.replace(result, logits=logits)

    monkeypatch.setattr(OnnxRuntime, "_run", run)
    evaluation = evaluate_sources(tiny, text=words, schemes=["none"], length=40, decode_tokens=1, threads=1)
    assert math.isnan(evaluation.measured[0].perplexity) and evaluation.measured[0].top1_agreement < 1
    assert evaluation.front("bytes") == () and evaluation.front("decode") == ()
    row = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))["rows"][1]
    assert row["perplexity"] is None and row["kl"] is None and row["on_front"] == []


def test_known_fronts() -> None:
    points = [(4.0, 1.0), (1.0, 4.0), (2.0, 2.0), (3.0, 3.0), (2.0, 2.0), (2.0, 5.0), (math.nan, 0.0), (0.0, math.inf)]
    assert front(points) == [1, 2, 4, 0]
    assert front([]) == [] and front([(math.nan, 1.0)]) == [] and front([(1.0, 1.0)]) == [0]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_what_is_off_the_front_is_beaten_by_what_is_on_it(points: list[tuple[int, int]]) -> None:
    indices = front([(float(x), float(y)) for x, y in points])
    on = [points[index] for index in indices]
    assert on == sorted(on)
    for index, (x, y) in enumerate(points):
        beaten = any((a, b) != (x, y) and a <= x and b <= y for a, b in on)
        assert beaten == (index not in indices)


def test_rows_on_the_fronts(weighed: tuple[Evaluation, Path]) -> None:
    evaluation = weighed[0]
    sizes = {"none": (100, 10.0), "int8": (50, 20.0), "int4": (30, 30.0)}
    losses = {"none": 2.0, "int8": 2.5, "int4": 2.4}
    rows = tuple(
        dataclasses.replace(
            row,
            bytes=sizes[row.scheme][0],
            decode=sizes[row.scheme][1],
            loss=dataclasses.replace(row.loss, mean=losses[row.scheme]),
        )
        for row in evaluation.measured
    )
    known = dataclasses.replace(evaluation, rows=(evaluation.plain, *rows))
    # int8 is beaten by int4, which is smaller, faster and likelier.
    assert [row.scheme for row in known.front("bytes")] == ["int4", "none"]
    assert [row.scheme for row in known.front("decode")] == ["int4", "none"]
    assert [row["on_front"] for row in known.to_json()["rows"]] == [
        [], ["bytes", "decode"], [], ["bytes", "decode"],
    ]  # fmt: skip


def test_the_json_contract(cli: Cli, words: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    options = ("--schemes", "none,int8", "--length", 40, "--json", "-")
    code, out, err = cli("evaluate", "gemma3-tiny", "--text", words, *options, *Fast)
    assert code == 0, err
    data = json.loads(out)
    assert {"model", "parameters", "source", "oracle", "text", "speed", "versions", "date", "not_run", "rows"} == set(
        data
    )
    assert data["model"] == "gemma3-tiny" and data["not_run"] == {}
    assert [row["name"] for row in data["rows"]] == ["plain module", "onnxruntime none", "onnxruntime int8"]
    for row in data["rows"]:
        assert {
            "target", "scheme", "dtype", "folder", "weights", "bytes", "bytes_per_weight", "perplexity",
            "perplexity_error", "loss", "loss_error", "loss_difference", "loss_difference_error", "kl", "kl_error",
            "top1_agreement", "prefill_tokens_per_s", "decode_tokens_per_s", "seconds", "on_front", "name",
            "by_position",
        } == set(row)  # fmt: skip
    assert data["speed"]["prefill_tokens"] == 38 and data["speed"]["decode_tokens"] == 2
    assert set(tmp_path.iterdir()) == before, "what was compiled is not kept"


def test_the_table_and_the_files(cli: Cli, words: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"e.{name}" for name in ("json", "html")} | {"plot": tmp_path / "e.svg"}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    code, out, err = cli(
        *("evaluate", "gemma3-tiny", "--text", words, "--schemes", "fp8_activations", "--targets", "onnxruntime,tvm"),
        *("--length", 40, *options, *Fast),
    )
    assert code == 0, err
    assert "plain module" in out and "onnxruntime fp8_activations" in out and "not run: tvm fp8_activations" in out
    data = parsed(files["json"])
    assert list(data["not_run"]) == ["tvm fp8_activations"]  # type: ignore[call-overload]
    assert "rounds no activations" in files["html"].read_text()
    assert "<svg xmlns:" in files["plot"].read_text()


def test_artifacts_as_they_stand(cli: Cli, weighed: tuple[Evaluation, Path], words: Path) -> None:
    """Their model is found again, and the numbers are those of the run that made them."""
    evaluation, out = weighed
    folders = [out / f"onnxruntime-{name}" for name in ("int8", "int4")]
    options = ("--length", LENGTH, "--windows", WINDOWS, "--json", "-")
    code, printed, err = cli("evaluate", *folders, "--text", words, *options, *Fast)
    assert code == 0, err
    rows = json.loads(printed)["rows"]
    assert [(row["scheme"], row["folder"]) for row in rows[1:]] == [
        ("int8", str(folders[0])),
        ("int4", str(folders[1])),
    ]
    for row, measured in zip(rows, [evaluation.plain, *evaluation.measured[1:]], strict=True):
        assert row["loss"] == pytest.approx(measured.loss.mean, abs=1e-9) and row["bytes"] == measured.bytes


def test_artifacts_of_one_scheme_are_told_apart(weighed: tuple[Evaluation, Path], words: Path, tmp_path: Path) -> None:
    folder = weighed[1] / "onnxruntime-int8"
    shutil.copytree(folder, tmp_path / "again")
    evaluation = evaluate_sources([folder, tmp_path / "again"], text=words, length=40, decode_tokens=1, threads=1)
    assert [row.name for row in evaluation.measured] == [
        f"onnxruntime int8 ({path})" for path in (folder, tmp_path / "again")
    ]


def test_weights_that_were_trained_on(
    tiny: Model, weighed: tuple[Evaluation, Path], words: Path, tmp_path: Path
) -> None:
    """An artifact of other weights is held against the model that is named, and refused if none is."""
    write_checkpoint(tmp_path / "other", tiny.config, random_weights(tiny.config, 5))
    trained = dataclasses.replace(transom.load(tmp_path / "other"), tokenizer=tiny.tokenizer)
    folder = transom.compile(trained, out=tmp_path / "artifact", context=128).folder
    options: dict[str, Any] = {"text": words, "length": 40, "decode_tokens": 1, "threads": 1}
    evaluation = evaluate_sources(folder, model="gemma3-tiny", **options)
    assert evaluation.source == {"name": "random", "revision": "seed 0"}
    assert evaluation.measured[0].weights == {"name": trained.source, "revision": trained.revision}
    assert evaluation.measured[0].kl.mean > 0.1 and evaluation.measured[0].top1_agreement < 0.5
    own = evaluate_sources(folder, model=trained, **options)
    assert own.measured[0].kl.mean < 1e-6 and own.measured[0].loss.mean == evaluation.measured[0].loss.mean
    with pytest.raises(ConfigError, match="was made from revision"):
        evaluate_sources([weighed[1] / "onnxruntime-int8", folder], **options)


@pytest.mark.usefixtures("traced_once")
def test_what_fails_alone_is_told(tiny: Model, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = measure

    def fail(session: Any, *args: Any, **options: Any) -> Any:
        if failing and session.states:
            raise failing.pop()
        return honest(session, *args, **options)

    monkeypatch.setattr(rows, "measure", fail)
    options: dict[str, Any] = {"text": words, "length": 40, "decode_tokens": 1, "threads": 1}
    failing: list[Exception] = [RuntimeError("out of\nmemory")]
    evaluation = evaluate_sources(tiny, schemes=["none", "int8"], **options)
    assert evaluation.not_run == {"onnxruntime none": "RuntimeError: out of memory"}
    assert [row.name for row in evaluation.measured] == ["onnxruntime int8"]
    failing = [QuantizationError("64 columns"), RuntimeError("gone")]
    with pytest.raises(TargetError, match="nothing could be evaluated: onnxruntime none: RuntimeError: gone; onnx"):
        evaluate_sources(tiny, schemes=["none", "int8"], **options)
    failing = [QuantizationError("64 columns")]
    with pytest.raises(QuantizationError, match=r"^64 columns$"):
        evaluate_sources(tiny, schemes=["int8"], **options)


@pytest.mark.parametrize(
    ("options", "words_of_error"),
    [
        (("--schemes", "int3"), "no quantisation scheme named 'int3'"),
        (("--schemes", "none,none"), "'none' is given twice"),
        (("--schemes", ","), "no scheme is named"),
        (("--targets", "cuda"), "no target named 'cuda': choose one of onnxruntime"),
        (("--targets", "reference"), "no target named 'reference'"),
        (("--schemes", "fp8_activations", "--targets", "tvm"), "rounds no activations"),
        (("--dtype", "float16"), "not in 'float16'"),
        (("--length", 1000), "do not fit into a context of 512"),
        (("--context", 32, "--length", 40), "do not fit into a context of 32"),
        (("--context", 600), "made for 1 to 512"),
        (("--length", 2), "nothing to score"),
        (("--length", 400, "--windows", 2), "too few for 2 sequences of 400 tokens"),
        (("--overwrite",), "--overwrite"),
        (("--weights", "none"), "'checkpoint' or 'random'"),
        (("--html", "missing/e.html"), "name a file in a folder that exists"),
        (("--plot", "."), "name a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[Any, ...],
    words_of_error: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("evaluate", "gemma3-tiny", "--text", words, *options)
    assert code == 2 and words_of_error in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_bad_texts(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    for name, words_of_error in (
        ("missing", "cannot read the text"),
        ("empty", "holds no text"),
        ("short", "has 1 tokens, too few for a sequence of 3"),
        ("latin", "is not UTF-8"),
    ):
        code, _, err = cli("evaluate", "gemma3-tiny", "--text", tmp_path / f"{name}.txt")
        assert code == 2 and words_of_error in err and err.count("\n") == 1, err


def test_a_model_without_a_tokenizer(cli: Cli, words: Path) -> None:
    code, _, err = cli("evaluate", "gemma3-270m", "--weights", "random", "--text", words)
    assert code == 2 and "has no tokenizer" in err


def test_what_would_be_left_aside_is_refused(
    cli: Cli, weighed: tuple[Evaluation, Path], words: Path, tmp_path: Path
) -> None:
    folder = weighed[1] / "onnxruntime-int8"
    for options in (("--context", 64), ("--chunk", 8), ("--out", tmp_path / "o"), ("--seed", 3)):
        code, _, err = cli("evaluate", folder, "--text", words, *options)
        assert code == 2 and f"leave out {options[0]}" in err
    code, _, err = cli("evaluate", "gemma3-tiny", folder, "gemma3-tiny", "--text", words)
    assert code == 2 and "one model" in err
    code, _, err = cli("evaluate", "gemma3-tiny", "--text", words, "--schemes", "int8", "--out", weighed[1])
    assert code == 2 and "exists already" in err


def test_an_artifact_bounds_the_length(weighed: tuple[Evaluation, Path], words: Path) -> None:
    folder = weighed[1] / "onnxruntime-int8"
    evaluation = evaluate_sources(folder, text=words, decode_tokens=1, threads=1)
    assert evaluation.text["length"] == 128
    with pytest.raises(ContextLengthError, match="context of 128"):
        evaluate_sources(folder, text=words, length=129)


def test_the_public_function(exported: Export, words: Path) -> None:
    folder = exported("onnxruntime", "none").folder
    evaluation = transom.evaluate(folder, text=words, length=20, decode_tokens=1, threads=1)
    assert isinstance(evaluation, Evaluation) and re.match(r"\d{4}-\d\d-\d\dT", evaluation.date)
    with pytest.raises(TokenizerError):
        transom.evaluate(folder, text=words.parent / "nothing.txt")
