"""Distil a checkpoint from another: the run from text to folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from transom.errors import TokenizerError, TrainingError
from transom.training.checkpoint import TRAINED, check_apart, write_trained
from transom.training.loop import Loop, OnStep
from transom.training.objectives.distillation import FULL, Distillation, DistillSettings
from transom.training.parallel import ONE, processes
from transom.training.policy import Policy
from transom.training.state import TrainingState, digest
from transom.training.teacher_samples import TeacherSamples
from transom.training.text import read_sequences
from transom.zoo.architectures import build_empty
from transom.zoo.model import Model


def distill(
    student: Model,
    teacher: Model,
    settings: DistillSettings,
    *,
    text: Path,
    out: Path,
    replay: Path | None = None,
    teacher_samples: Path | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    on_step: OnStep = lambda done, total, metrics: None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[float]:
    """Train a student on a teacher's probabilities, and write it.

    Args:
        student: Where it begins.
        teacher: Of the same vocabulary.
        settings: How.
        text: To learn on.
        out: Folder of the checkpoint; it appears only when it is whole.
        replay: Text of what should not be forgotten.
        teacher_samples: Folder of the teacher's samples; those that it lacks are drawn first.
        dtype: Of the weights that are written.
        overwrite: Whether to replace a folder that an earlier run wrote.
        on_step: Told of every step.
        on_progress: Told of what comes before: (stage, done, total).

    Returns:
        The loss of every step, in nats.

    Raises:
        TrainingError: If settings don't go together, the vocabularies differ, the device is missing, a saved state or
            samples are of another run, training diverges, or another process of the run ends.
        TokenizerError: If a text cannot be read or is too short.
        ArtifactError: If `out` exists or cannot be written.
    """
    if (replay is None) != (settings.replay == 0):
        raise TrainingError("a text to replay and its share go together: give both, or none")
    if teacher_samples is not None and settings.targets == FULL:
        raise TrainingError(f"samples on disk cannot stand for the targets {FULL}: choose another kind, or keep none")
    student, teacher = student.text(), teacher.text()
    check_vocabulary(student, teacher)
    for model in (student, teacher):
        check_apart(out, model)
    with processes(settings.device) as shards, shards.new_folder(out, overwrite=overwrite, kind=TRAINED) as folder:
        if shards.count > 1 and settings.online:
            raise TrainingError("several processes draw no samples of the student: leave out --online, or start one")
        sequences = read_sequences(student, text, settings.length)
        replayed = None if replay is None else read_sequences(student, replay, settings.length)
        data = digest(sequences) if replayed is None else digest(torch.cat((sequences, replayed)))
        state = TrainingState(out, settings, f"{student.revision} {teacher.revision}", data, shards)
        saved = state.load()
        samples = None
        if teacher_samples is not None:
            if not shards.is_first:
                shards.wait()
            samples = TeacherSamples(
                teacher_samples,
                teacher=teacher.revision,
                sequences_NT=sequences,
                reading=settings.targets,
                count=settings.samples,
                seed=settings.seed,
            )
            if shards.is_first:
                shards.wait()
        master = None
        if samples is None or samples.missing or settings.online or replayed is not None:
            # Where one process may need the teacher while another reads samples, they cannot gather it together.
            alone = samples is not None and replayed is not None
            master = Policy(
                teacher, device=settings.device, trained=lambda name: False, shards=ONE if alone else shards
            )
        head = build_empty(student.config).head_weight
        pupil = Policy(
            student,
            device=settings.device,
            trained=lambda name: settings.train_table or name != head,
            recompute=settings.recompute,
            shards=shards,
        )
        if samples is not None and master is not None:

            def on_drawn(done: int, total: int) -> None:
                if shards.is_first:
                    on_progress("draw samples of the teacher", done, total)

            samples.draw(master.hidden, master.head_of(pupil), on_drawn)
        objective = Distillation(pupil, master, settings, sequences, replay_NT=replayed, samples=samples)
        loop = Loop(objective, settings.loop, state=state, saved=saved, on_step=on_step)
        losses = [metrics["loss"] for metrics in loop.run()]
        report = {
            "settings": dataclasses.asdict(settings),
            "loss": losses,
            "source": student.source,
            "teacher": teacher.source,
        }
        pupil.write(lambda model: write_trained(folder, model, report, dtype=dtype))
        state.finish(folder)
    state.remove()
    return losses


def check_vocabulary(student: Model, teacher: Model) -> None:
    """Raise `TrainingError` unless every token of the student is the same token of the teacher.

    The table of a teacher may have more rows: those of some releases are padded, or hold tokens of images.
    """
    for model in (student, teacher):
        if model.tokenizer is None:
            raise TokenizerError(f"{model.config.name} has no tokenizer, so its tokens cannot be compared: add one")
    if teacher.config.vocab_size < student.config.vocab_size:
        raise TrainingError(
            f"the teacher {teacher.config.name} knows {teacher.config.vocab_size:,} tokens, the student "
            f"{student.config.name} {student.config.vocab_size:,}: choose a teacher of the same vocabulary"
        )
    assert student.tokenizer is not None and teacher.tokenizer is not None
    ours, theirs = student.tokenizer.vocabulary, teacher.tokenizer.vocabulary
    for token, id in ours.items():
        if id < student.config.vocab_size and theirs.get(token) != id:
            raise TrainingError(
                f"the token {token!r} is {id} to the student {student.config.name} and {theirs.get(token)} to the "
                f"teacher {teacher.config.name}: choose a teacher of the same vocabulary"
            )
