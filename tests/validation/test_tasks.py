"""`transom evaluate --tasks` and `--pairs`: known answers, direct computations, and bad input in one line."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import transom
from tests.artifacts import CHUNK, Export
from tests.conftest import Cli
from tests.tolerances import BATCHED_KL, FP32_LOGITS
from tests.training.pairs import write_pairs
from transom.backends.onnxruntime.runtime import OnnxRuntime
from transom.backends.prompt import split_at
from transom.backends.runtime import Call, Result
from transom.errors import ContextLengthError, EvaluationError, RewardError, TokenizerError
from transom.images.pairs import read_pairs
from transom.training.rewards.mathematics import Mathematics
from transom.validation.evaluation.contest import WIN_RATE
from transom.validation.evaluation.pairs import evaluate_pairs
from transom.validation.evaluation.tasks import TaskSettings, evaluate_tasks
from transom.zoo.model import load

NEW = 6


def write_tasks(path: Path, *lines: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """What an echo gets right twice of four times, and what no reward can judge once."""
    return write_tasks(
        tmp_path / "tasks.jsonl",
        {"prompt": "Say 7", "answer": 7},
        {"prompt": "Say 8", "answer": "8"},
        {"prompt": "Say 3", "answer": 4},
        {"prompt": "Say 2", "answer": 5},
        {"prompt": "Say 1", "answer": "x + 1"},
    )


@pytest.fixture
def folders(exported: Export) -> list[Path]:
    return [exported("onnxruntime", quant).folder for quant in ("none", "int8")]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch, folders: list[Path]) -> None:
    """An artifact that repeats the last token of its prompt and stops; that of int8 writes nothing but the 8."""
    session = transom.open(folders[0], threads=1)
    (eight,), stop = session.encode("8")[1:], next(iter(session.stop_ids))
    opened = OnnxRuntime.__init__

    def init(self: OnnxRuntime, folder: Path, *args: Any, **options: Any) -> None:
        opened(self, folder, *args, **options)
        self.note = str(folder)

    def run(self: OnnxRuntime, call: Call) -> Result:
        logits = np.zeros((len(call.tokens), len(call.logit_positions), self.vocab_size), np.float32)
        for row, last in enumerate(call.tokens[:, -1]):
            writes = call.tokens.shape[1] > 1 and (self.note == str(folders[0]) or last == eight)
            logits[row, :, last if writes else stop] = 50
        return Result(logits=logits)

    monkeypatch.setattr(OnnxRuntime, "__init__", init)
    monkeypatch.setattr(OnnxRuntime, "_run", run)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    result: NDArray[np.float64] = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
    return result


@pytest.mark.usefixtures("echo")
def test_known_answers(folders: list[Path], tasks: Path) -> None:
    contest = evaluate_tasks(folders, tasks, Mathematics().score, settings=TaskSettings(max_new=NEW), threads=1)
    echo, eight = contest.contenders
    assert contest.rows == 5 and list(echo.measures) == ["reward", "exact match"]
    for contender, share in ((echo, 0.5), (eight, 0.25)):
        for estimate in contender.measures.values():
            assert (estimate.value, estimate.prompts) == (share, 4)
            assert 0 <= estimate.low < share < estimate.high <= 1
        # What has no value is counted, and in no mean.
        assert sum(contender.failures.values()) == 1 and "x + 1" in next(iter(contender.failures))
    assert not echo.differences
    judged = evaluate_tasks(
        folders[:1], tasks, Mathematics().score, settings=TaskSettings(max_new=NEW, right=False), threads=1
    )
    assert list(judged.contenders[0].measures) == ["reward"]
    assert eight.differences["reward"].value == -0.25 and eight.differences[WIN_RATE].value == 0.5 * 3 / 4
    with pytest.raises(EvaluationError, match=r"nothing of onnxruntime none could be scored.*broken \(5\)"):
        evaluate_tasks(folders, tasks, lambda *_: (None, "broken"), settings=TaskSettings(max_new=NEW), threads=1)


def test_a_continuation_is_the_sessions_own(folders: list[Path], tasks: Path) -> None:
    """Greedy ones are what `generate` writes, and their KL what both models' logits of the whole text come to."""
    texts: list[str] = []

    def reward(prompt: str, completion: str, reference: Mapping[str, Any]) -> tuple[float, str]:
        texts.append(completion)
        return float(len(completion)), ""

    contest = evaluate_tasks(
        folders[1:], tasks, reward, settings=TaskSettings(max_new=NEW), start=folders[0], threads=1
    )
    base, session = (transom.open(folder, threads=1) for folder in folders)
    assert session.tokenizer is not None
    expected, divergences = [], []
    for line in tasks.read_text().splitlines():
        ids = session.encode(json.loads(line)["prompt"])
        new = list(session.generate(ids, max_new_tokens=NEW))
        assert len(new) == NEW
        expected.append(session.tokenizer.decode(new))
        rows = []
        for one in (session, base):
            one.reset()
            rows.append(log_softmax(np.stack([one.prefill(ids), *(one.decode(token) for token in new[:-1])])))
        p, q = rows
        divergences.append((np.exp(p) * (p - q)).sum())
    # The first call is the probe that tells a missing tool.
    assert texts == ["", *expected]
    measures = contest.contenders[0].measures
    assert measures["reward"].value == np.mean([len(text) for text in expected])
    assert measures["KL to start"].value == pytest.approx(np.mean(divergences), rel=1e-6)
    assert measures["KL to start"].low > 0
    itself = evaluate_tasks(folders[:1], tasks, reward, settings=TaskSettings(max_new=NEW), start=folders[0], threads=1)
    assert itself.contenders[0].measures["KL to start"].value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("target", ["onnxruntime", "onnx"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_together_as_one_at_a_time(
    target: str, temperature: float, exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of three lengths, one longer than a call, continuations that end at different times past the window."""
    prompts = ["Say 7", "Say 9", "Why", "Say 8", "A long " * 9, "A wide " * 9]
    tasks = write_tasks(tmp_path / "t.jsonl", *({"prompt": prompt} for prompt in prompts))
    folder, start = exported(target, "none").folder, exported("onnxruntime", "int8").folder
    settings = TaskSettings(samples=3 if temperature else 1, temperature=temperature, max_new=40)
    calls: list[tuple[int, ...]] = []
    honest = OnnxRuntime._run

    def run(self: OnnxRuntime, call: Call) -> Result:
        calls.append(call.tokens.shape)
        return honest(self, call)

    def written() -> tuple[list[str], float]:
        texts: list[str] = []

        def reward(prompt: str, completion: str, reference: Mapping[str, Any]) -> tuple[float, str]:
            texts.append(completion)
            return 1.0, ""

        contest = evaluate_tasks([folder], tasks, reward, settings=settings, start=start, threads=1)
        return texts, contest.contenders[0].measures["KL to start"].value

    monkeypatch.setattr(OnnxRuntime, "_run", run)
    together = written()
    most = max(rows for rows, _ in calls)
    assert most == 3 * settings.samples and max(tokens for _, tokens in calls) == CHUNK
    # What repeats is read once.
    assert sum(rows * tokens for rows, tokens in calls if tokens > 1) == 2 * sum(len(p) + 1 for p in prompts)
    monkeypatch.setattr(OnnxRuntime, "takes_rows", False)
    calls.clear()
    alone = written()
    assert {rows for rows, _ in calls} == {1}
    assert together[0] == alone[0] and together[1] == pytest.approx(alone[1], rel=BATCHED_KL)


def test_passes_of_several_samples(folders: list[Path], tmp_path: Path) -> None:
    """Of four samples, a prompt passes in one, the other in three; a third has only two that could be judged."""
    tasks = write_tasks(tmp_path / "t.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    values = iter([None, 1, 0, 0.5, 0, 1, 1, 0, 1, None, 1, 0, None])
    texts: list[str] = []

    def reward(prompt: str, completion: str, reference: Mapping[str, Any]) -> tuple[float | None, str]:
        texts.append(completion)
        return next(values), "why"

    settings = TaskSettings(samples=4, temperature=1.0, max_new=NEW)
    contest = evaluate_tasks(folders[:1], tasks, reward, settings=settings, threads=1)
    measures, failures = contest.contenders[0].measures, contest.contenders[0].failures
    assert list(measures) == ["reward", "exact match", "pass@2", "pass@4"] and failures == {"why": 2}
    assert measures["reward"].value == pytest.approx(np.mean([1.5 / 4, 3 / 4, 1 / 2]))
    assert measures["exact match"].value == pytest.approx(np.mean([1 / 4, 3 / 4, 1 / 2]))
    assert measures["pass@2"].value == pytest.approx(np.mean([1 / 2, 1, 1]))
    assert (measures["pass@4"].value, measures["pass@4"].prompts) == (1, 2)
    assert len(set(texts[1:])) > 6, "samples differ"
    drawn = list(texts[1:])
    texts.clear()
    values = itertools.repeat(1)
    evaluate_tasks(folders[:1], tasks, reward, settings=settings, threads=1)
    assert texts[1:] == drawn, "the seed alone decides"


@pytest.mark.usefixtures("echo")
def test_the_command(cli: Cli, folders: list[Path], tasks: Path, tmp_path: Path) -> None:
    options = ("--tasks", tasks, "--reward", "mathematics", "--max-new", NEW, "--threads", 1)
    files = ("--json", tmp_path / "e.json", "--html", tmp_path / "e.html")
    code, out, err = cli("evaluate", *folders, *options, *files)
    assert code == 0, err
    assert "0.500 [" in out and "-0.250 [" in out and "0.375 [" in out and out.count("not scored: 1 of") == 2
    data = json.loads((tmp_path / "e.json").read_text())
    assert set(data) == {"kind", "file", "sha256", "rows", "settings", "date", "versions", "contenders"}
    assert data["kind"] == "tasks" and data["settings"]["max_new"] == NEW
    one, other = data["contenders"]
    assert set(one) == {
        "name", "folder", "target", "scheme", "weights", "measures", "differences", "failures",
    }  # fmt: skip
    assert one["measures"]["exact match"]["value"] == 0.5 and other["differences"]["win rate"]["value"] == 0.375
    page = (tmp_path / "e.html").read_text()
    assert "0.500 [" in page and "-0.250 [" in page and page.count("Not scored") == 2 and str(folders[1]) in page
    code, out, err = cli("evaluate", folders[0], *options, "--json", "-")
    assert code == 0 and json.loads(out)["contenders"][0]["measures"]["reward"]["value"] == 0.5, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tasks", "{tasks}"), "give --reward mathematics"),
        (("--tasks", "{tasks}", "--reward", "preference"), "model"),
        (("--tasks", "{tasks}", "--reward", "luck"), "no reward 'luck'"),
        (("--tasks", "{tasks}", "--reward", "mathematics", "--samples", 2), "all the same"),
        (("--tasks", "{tasks}", "--reward", "mathematics", "--max-new", 999), "do not fit into the context"),
        (("--tasks", "{tasks}", "--reward", "mathematics", "--schemes", "int8"), "--schemes does nothing"),
        (("--tasks", "{tasks}", "--reward", "mathematics", "--start", "{tmp}"), "is no artifact"),
        (("--tasks", "{tmp}/none", "--reward", "mathematics"), "cannot be read"),
        (("--tasks", "{tmp}/empty", "--reward", "mathematics"), "has no prompts"),
        (("--tasks", "{tmp}/list", "--reward", "mathematics"), "line 1"),
        (("--tasks", "{tmp}/mute", "--reward", "mathematics"), "no text under `prompt`"),
        (("--text", "{tmp}/empty", "--reward", "code"), "--reward does nothing"),
        (("--text", "{tmp}/empty", "--tasks", "{tasks}"), "give one of --text"),
        ((), "give one of --text, --pairs and --tasks"),
        (("--pairs", "{tasks}", "--chat"), "--chat does nothing"),
        (("--tasks", "{tasks}", "--reward", "mathematics", "--json", "{tasks}"), "it is read"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, folders: list[Path], tasks: Path, tmp_path: Path, options: tuple[Any, ...], words: str
) -> None:
    for name, content in (("empty", "\n"), ("list", "[1]\n"), ("mute", '{"prompt": 3}\n')):
        (tmp_path / name).write_text(content)
    filled = [str(option).format(tasks=tasks, tmp=tmp_path) for option in options]
    code, out, err = cli("evaluate", folders[0], *filled)
    assert code == 2 and words in err and err.count("\n") == 1 and out == "", err


def test_what_cannot_take_part(
    folders: list[Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = Mathematics().score
    for entrants, words in (
        ([], "name an artifact"),
        (["gemma3-tiny"], "export it first"),
        ([folders[0], folders[0]], "twice"),
    ):
        with pytest.raises(EvaluationError, match=words):
            evaluate_tasks(entrants, tasks, reward)
    with pytest.raises(EvaluationError, match="sees no images"):
        evaluate_pairs(folders, write_pairs(tmp_path / "pairs", 1))
    with pytest.raises(ContextLengthError, match="prompt 1: "):
        evaluate_tasks(folders, tasks, reward, settings=TaskSettings(max_new=510))

    def missing(*_: Any) -> tuple[float, str]:
        raise RewardError("bwrap is missing")

    def generate(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is generated")

    monkeypatch.setattr(OnnxRuntime, "_run", generate)
    with pytest.raises(RewardError, match="bwrap"):
        evaluate_tasks(folders, tasks, missing, settings=TaskSettings(max_new=NEW), threads=1)


def test_no_chat_template(tmp_path: Path, tasks: Path) -> None:
    folder = transom.compile(load("llama3-tiny"), out=tmp_path / "llama", context=64).folder
    with pytest.raises(TokenizerError, match="no chat template"):
        evaluate_tasks([folder], tasks, Mathematics().score, settings=TaskSettings(chat=True, max_new=NEW))


def test_pairs(cli: Cli, tmp_path: Path) -> None:
    """Two artifacts that see images, against logits of prompt and answer in one go."""
    path = write_pairs(tmp_path / "pairs", 5)
    model = load("gemma3-vision-tiny", images=True)
    folders = [
        transom.compile(model, out=tmp_path / quant, chunk=20, context=128, quant=quant).folder
        for quant in ("none", "int8")
    ]
    # One answer is what the first artifact says itself, in more than one token.
    session = transom.open(folders[0], threads=1)
    assert session.tokenizer is not None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    prompt = session.prompt([path.parent / lines[0]["image"], lines[0]["prompt"]])
    lines[0]["answer"] = session.tokenizer.decode(list(session.generate(prompt, max_new_tokens=2, stop_ids=())))
    write_tasks(path, *lines)
    contest = evaluate_pairs(folders, path, threads=1)
    losses, exact = [], []
    for folder in folders:
        session = transom.open(folder, threads=1)
        assert session.tokenizer is not None
        for pair in read_pairs(path):
            session.reset()
            prompt = session.prompt(split_at(pair.prompt, "<image>", [pair.image]))
            answer = session.tokenizer.encode(pair.answer, bos=False)
            rows = [session.prefill(prompt), *(session.decode(token) for token in answer[:-1])]
            losses.append(-np.mean([log_softmax(row)[token] for row, token in zip(rows, answer, strict=True)]))
            exact.append(list(session.generate(prompt, max_new_tokens=len(answer), stop_ids=())) == answer)
    assert any(exact) and not all(exact)
    means = np.reshape(losses, (2, -1)).mean(1)
    for contender, mean, right in zip(contest.contenders, means, np.reshape(exact, (2, -1)).mean(1), strict=True):
        assert contender.measures["loss"].value == pytest.approx(mean, abs=FP32_LOGITS)
        assert contender.measures["exact match"].value == right
    assert contest.contenders[1].differences["loss"].value == pytest.approx(means[1] - means[0], abs=FP32_LOGITS)
    assert WIN_RATE not in contest.contenders[1].differences
    code, out, err = cli("evaluate", *folders, "--pairs", path, "--threads", 1)
    assert code == 0, err
    assert "5 pairs" in out and re.search(r"loss +onnxruntime int8 +\d", out) and "are against onnxruntime none" in out
