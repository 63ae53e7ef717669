"""Distillation as an objective: a student learns a teacher's next-token probabilities, on texts or on its own samples.

Source: the Gemma 3 report (section 2.2); online distillation as in arXiv 2306.13649.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from transom.errors import TrainingError
from transom.training.divergence import READINGS, Full, Sparse, Targets, distillation_loss
from transom.training.loop import LoopSettings, Loss, Objective
from transom.training.policy import Policy
from transom.training.teacher_samples import TeacherSamples
from transom.training.text import generator_at, index_at

FULL = "full"
"""Targets that are the teacher's whole distribution."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How to distil.

    Attributes:
        steps: Of the optimiser.
        length: Tokens of a sequence.
        batch: Sequences in a step.
        learning_rate: At its peak.
        targets: "full" for the teacher's whole distribution, or one of `READINGS` for a few tokens of it.
        samples: Draws a token, or likeliest tokens, where the targets are few.
        forward: Share of KL(teacher || student) in the loss; the rest is KL(student || teacher), of full targets only.
        online: Share of the sequences that the student continues itself, from the beginning of one of the text.
        prompt: Tokens of the text that such a sequence begins with.
        replay: Share of the sequences that are taken from another text, of what should not be forgotten.
        train_table: Whether the table of tokens is trained too.
        recompute: Compute every layer again on the way back: memory for time.
        seed: Of the order of the texts, and of draws.
        device: Where to compute.
        save_every: Steps between two saved states.

    Raises:
        TrainingError: If a setting is unknown, out of range, or goes with no other.
    """

    steps: int
    length: int = 256
    batch: int = 1
    learning_rate: float = 1e-5
    targets: str = "counts"
    samples: int = 256
    forward: float = 1.0
    online: float = 0.0
    prompt: int = 32
    replay: float = 0.0
    train_table: bool = True
    recompute: bool = False
    seed: int = 0
    device: str = "cpu"
    save_every: int = 50

    def __post_init__(self) -> None:
        if self.targets != FULL and self.targets not in READINGS:
            raise TrainingError(f"targets are {self.targets!r}: choose {', '.join((FULL, *READINGS))}")
        for name in ("forward", "online", "replay"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} is {getattr(self, name)}: give a share from 0 to 1")
        if self.forward < 1 and self.targets != FULL:
            raise TrainingError(
                f"a loss with KL(student || teacher) needs the whole distribution of the teacher, not {self.targets}: "
                f"choose the targets {FULL}"
            )
        if self.online and not 1 <= self.prompt < self.length:
            raise TrainingError(f"a prompt of {self.prompt} tokens in sequences of {self.length}: give a shorter one")

    @property
    def loop(self) -> LoopSettings:
        """How the optimiser steps."""
        return LoopSettings(steps=self.steps, learning_rate=self.learning_rate, save_every=self.save_every)


class Distillation(Objective):
    """A student and its teacher.

    Args:
        student: What is trained.
        teacher: Its weights take no gradients; None where samples are all that is needed of it.
        settings: How.
        sequences_NT: The text, int64.
        replay_NT: The text of what should not be forgotten.
        samples: The teacher's samples of `sequences_NT`, if they were drawn beforehand.
    """

    def __init__(
        self,
        student: Policy,
        teacher: Policy | None,
        settings: DistillSettings,
        sequences_NT: torch.Tensor,
        *,
        replay_NT: torch.Tensor | None = None,
        samples: TeacherSamples | None = None,
    ) -> None:
        self.parameters, self.parts, self.shards = student.parameters, settings.batch, student.shards
        self._student, self._teacher, self._settings = student, teacher, settings
        self._sequences, self._replay, self._samples = sequences_NT, replay_NT, samples

    def losses(self, step: int) -> Iterator[Loss]:
        """Mean divergence of each sequence of a step, in nats."""
        settings, seed = self._settings, self._settings.seed
        for place in self.shards.share(range(step * settings.batch, (step + 1) * settings.batch)):
            replayed, ahead = _turn(place, settings.replay if self._replay is not None else 0.0)
            if replayed and self._replay is not None:
                tokens_BT = self._replay[index_at(ahead, len(self._replay), seed)][None]
                yield self._loss(tokens_BT, place)
                continue
            own, _ = _turn(place - ahead, settings.online)
            index = index_at(place - ahead, len(self._sequences), seed)
            tokens_BT = self._sequences[index][None]
            if own:
                yield self._own(tokens_BT, place)
            else:
                yield self._loss(tokens_BT, place, None if self._samples is None else self._samples.read(index))

    def _own(self, tokens_BT: torch.Tensor, place: int) -> Loss:
        """What the student says after the beginning of a text, and what the teacher would."""
        prompt = tokens_BT[0, : self._settings.prompt].tolist()
        (new,) = self._student.sample(
            [prompt],
            max_new=self._settings.length - len(prompt),
            stops=frozenset(),
            generator=self._generator(place, 1),
        )
        return self._loss(torch.tensor([prompt + new]), place, first=len(prompt) - 1)

    def _loss(self, tokens_BT: torch.Tensor, place: int, targets: Targets | None = None, *, first: int = 0) -> Loss:
        """Of the positions from `first` on."""
        if targets is None:
            targets = self._targets(tokens_BT, place, first)
        hidden_ND = self._student.hidden(tokens_BT)[0, first:]
        return Loss(value=distillation_loss(hidden_ND, self._student.head, targets))

    @torch.no_grad()
    def _targets(self, tokens_BT: torch.Tensor, place: int, first: int) -> Targets:
        assert self._teacher is not None, "the teacher's samples are of the text alone"
        hidden_ND = self._teacher.hidden(tokens_BT)[0, first:]
        head = self._teacher.head_of(self._student)
        if self._settings.targets == FULL:
            return Full(hidden=hidden_ND, head=head, forward=self._settings.forward)
        return Sparse.draw(hidden_ND, head, self._settings.samples, self._generator(place, 0), self._settings.targets)

    def _generator(self, place: int, kind: int) -> torch.Generator:
        """Of the teacher's tokens (kind 0), or of what the student writes (1), which is drawn on the CPU."""
        return generator_at(2 * place + kind, self._settings.seed, "cpu" if kind else self._student.device)


def _turn(place: int, share: float) -> tuple[bool, int]:
    """Whether a place is one of an even share of all, and how many before it are."""
    before = int(place * share + 1e-9)
    return int((place + 1) * share + 1e-9) > before, before
