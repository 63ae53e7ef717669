"""Distillation: a student learns what its teacher knows, from disk too, goes on to the bit, and refuses strangers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.conftest import Cli
from tests.training.test_quantize import divergence
from transom.errors import TokenizerError, TrainingError
from transom.training.distill import distill
from transom.training.divergence import READINGS, Full, distillation_loss
from transom.training.loop import Metrics
from transom.training.objectives.distillation import Distillation, DistillSettings
from transom.training.policy import Policy
from transom.training.text import read_sequences
from transom.zoo.model import Model, load

SHORT = DistillSettings(steps=6, length=40, batch=2, learning_rate=2e-3, samples=64, save_every=2)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A local layer sees a window; a global one sees all that came before it. " * 60)
    return path


@pytest.fixture(scope="module")
def student() -> Model:
    return load("gemma3-tiny", weights="random", seed=7)


@pytest.fixture(scope="module")
def teacher() -> Model:
    return load("llama3-tiny", weights="random", seed=1)


def between(student: Model, teacher: Model, ids: list[int]) -> float:
    """Mean KL(teacher || student) in nats."""
    tokens, start = torch.tensor([ids]), torch.tensor(0)
    log_p, log_q = (model.eager()(tokens, start, None)[0].log_softmax(-1) for model in (teacher, student))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("targets", ["full", *READINGS])
def test_a_student_comes_nearer_to_its_teacher(
    targets: str, student: Model, teacher: Model, words: Path, tmp_path: Path
) -> None:
    """Of another architecture; measured on the text past the window."""
    settings = dataclasses.replace(SHORT, steps=30, targets=targets)
    losses = distill(student, teacher, settings, text=words, out=tmp_path / "out")
    assert student.tokenizer is not None
    ids = student.tokenizer.encode(words.read_text())[500:600]
    assert between(load(tmp_path / "out"), teacher, ids) < 0.7 * between(student, teacher, ids)
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["loss"] == losses and report["settings"]["targets"] == targets
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 30


def test_the_same_model_loses_nothing(student: Model, words: Path, tmp_path: Path) -> None:
    """Nor do its own samples, in whichever direction the divergence is taken."""
    settings = dataclasses.replace(SHORT, targets="full", forward=0.5, online=0.5, prompt=8, learning_rate=0.0)
    losses = distill(student, student, settings, text=words, out=tmp_path / "out")
    assert max(map(abs, losses)) < 1e-5
    assert divergence(student, load(tmp_path / "out"), [2, 5, 9, 8]) < 1e-9


def test_where_samples_come_from(student: Model, teacher: Model, words: Path) -> None:
    """Replayed, own and plain sequences take the turns that their shares say; own ones lose after the prompt alone."""
    settings = dataclasses.replace(SHORT, batch=8, targets="full", online=0.5, prompt=10, replay=0.25)
    sequences = read_sequences(student, words, settings.length)
    replayed = torch.full((3, settings.length), 77)
    policies = Policy(student), Policy(teacher, trained=lambda name: False)
    seen: list[torch.Tensor] = []
    original = Policy.hidden

    def watch(policy: Policy, tokens_BT: torch.Tensor) -> torch.Tensor:
        if policy is policies[0]:
            seen.append(tokens_BT[0])
        return original(policy, tokens_BT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "hidden", watch)
        losses = list(Distillation(*policies, settings, sequences, replay_NT=replayed).losses(0))
    rows = {tuple(row.tolist()) for row in sequences}
    starts = {tuple(row[:10].tolist()) for row in sequences}
    kinds = []
    for tokens in seen:
        ids = tuple(tokens.tolist())
        kinds.append("replay" if set(ids) == {77} else "text" if ids in rows else "own")
        assert kinds[-1] != "own" or (len(ids) == settings.length and ids[:10] in starts)
    assert sorted(kinds) == ["own"] * 3 + ["replay"] * 2 + ["text"] * 3
    own = kinds.index("own")
    states = [policy.hidden(seen[own][None])[0, 9:] for policy in policies]
    targets = Full(hidden=states[1], head=policies[1].head)
    assert float(losses[own].value.detach()) == pytest.approx(
        float(distillation_loss(states[0], policies[0].head, targets).detach())
    )


@pytest.mark.parametrize("targets", ["counts", "renorm"])
def test_samples_on_disk(targets: str, student: Model, teacher: Model, words: Path, tmp_path: Path) -> None:
    """They are kept as the report counts them, drawing goes on where it stopped, and then no teacher is needed."""
    settings = dataclasses.replace(SHORT, targets=targets)
    folder, runs = tmp_path / "samples", {}

    class StoppedError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done == 70:
            raise StoppedError

    with pytest.raises(StoppedError):
        distill(student, teacher, settings, text=words, out=tmp_path / "cut", teacher_samples=folder, on_progress=stop)
    first = sorted(folder.glob("*.safetensors"))
    assert len(first) == 2 and not (tmp_path / "cut").exists()
    with safe_open(first[0], framework="pt") as opened:
        ids, shares = opened.get_tensor("ids"), opened.get_tensor("counts" if targets == "counts" else "shares")
    assert ids.dtype == torch.int32 and ids.shape[:2] == (32, settings.length)
    if targets == "counts":
        assert shares.dtype == torch.uint16 and bool((shares.long().sum(-1) == settings.samples).all())
    times = [path.stat().st_mtime_ns for path in first]
    runs["drawn"] = distill(student, teacher, settings, text=words, out=tmp_path / "a", teacher_samples=folder)
    assert [path.stat().st_mtime_ns for path in first] == times
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "_targets", None)
        runs["read"] = distill(student, teacher, settings, text=words, out=tmp_path / "b", teacher_samples=folder)
    assert runs["drawn"] == runs["read"]
    with pytest.raises(TrainingError, match="samples of another seed: choose another folder"):
        distill(
            student,
            teacher,
            dataclasses.replace(settings, seed=1),
            text=words,
            out=tmp_path / "c",
            teacher_samples=folder,
        )
    first[0].write_bytes(first[0].read_bytes()[:100])
    with pytest.raises(TrainingError, match="remove it to draw it again"):
        distill(student, teacher, settings, text=words, out=tmp_path / "d", teacher_samples=folder)


def test_it_goes_on_to_the_bit(student: Model, teacher: Model, words: Path, tmp_path: Path) -> None:
    """With draws of the teacher, own samples and a replay in every step."""
    settings = dataclasses.replace(SHORT, online=0.5, prompt=8, replay=0.5)
    whole = distill(student, teacher, settings, text=words, out=tmp_path / "whole", replay=words)

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, metrics: Metrics) -> None:
        if done == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        distill(student, teacher, settings, text=words, out=tmp_path / "parts", replay=words, on_step=stop)
    assert distill(student, teacher, settings, text=words, out=tmp_path / "parts", replay=words) == whole
    first, second = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert all(torch.equal(first.weights[name].read(), weight.read()) for name, weight in second.weights.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_a_frozen_table_stays(student: Model, teacher: Model, words: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, steps=1, train_table=False)
    distill(student, teacher, settings, text=words, out=tmp_path / "out")
    trained = load(tmp_path / "out")
    changed = {n for n, w in trained.weights.items() if not torch.equal(w.read(), student.weights[n].read())}
    assert "embed_tokens.weight" not in changed and len(changed) > 20


def test_what_is_refused(student: Model, teacher: Model, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert teacher.tokenizer is not None
    larger = dataclasses.replace(student, config=dataclasses.replace(student.config, vocab_size=9999))
    with pytest.raises(TrainingError, match="choose a teacher of the same vocabulary"):
        distill(larger, teacher, SHORT, text=words, out=out)
    with pytest.MonkeyPatch.context() as patch:
        ids = {id(student.tokenizer): 300, id(teacher.tokenizer): 301}
        patch.setattr(type(teacher.tokenizer), "vocabulary", property(lambda tokenizer: {"a": ids[id(tokenizer)]}))
        with pytest.raises(TrainingError, match=r"the token 'a' is 300 to the student .* and 301 to the teacher"):
            distill(student, teacher, SHORT, text=words, out=out)
    with pytest.raises(TokenizerError, match="no tokenizer"):
        distill(student, dataclasses.replace(teacher, tokenizer=None), SHORT, text=words, out=out)
    with pytest.raises(TrainingError, match="choose the targets full"):
        dataclasses.replace(SHORT, forward=0.0)
    with pytest.raises(TrainingError, match="targets are 'some': choose full, counts"):
        dataclasses.replace(SHORT, targets="some")
    with pytest.raises(TrainingError, match="give a share from 0 to 1"):
        dataclasses.replace(SHORT, online=2.0)
    with pytest.raises(TrainingError, match="give both, or none"):
        distill(student, teacher, SHORT, text=words, out=out, replay=words)
    with pytest.raises(TrainingError, match="cannot stand for the targets full"):
        distill(student, teacher, dataclasses.replace(SHORT, targets="full"), text=words, out=out, teacher_samples=out)
    with pytest.raises(TrainingError, match="holds other files than a teacher's samples"):
        distill(student, teacher, SHORT, text=words, out=out, teacher_samples=words.parent)
    assert not out.exists()


def test_the_command(cli: Cli, words: Path, tmp_path: Path) -> None:
    arguments = ("distill", "gemma3-tiny", "--teacher", "gemma3-tiny", "--data", words, "-o", tmp_path / "out")
    code, out, _ = cli(*arguments, "--steps", "2", "--length", "16", "--json")
    assert code == 0 and len(json.loads(out)["loss"]) == 2
    code, _, err = cli(*arguments, "--steps", "2", "--length", "16")
    assert code == 2 and "--overwrite" in err
