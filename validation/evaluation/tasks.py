"""Continuations of prompts by artifacts, judged by a reward: what is measured is what is deployed."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.backends.sampling import Sampling
from transom.backends.session import Session
from transom.errors import ContextLengthError, EvaluationError, TokenizerError
from transom.json_object import parse_object
from transom.validation.evaluation.contest import (
    Contest,
    Entrant,
    Measured,
    OnProgress,
    log_softmax,
    read_entrants,
    run_contest,
)
from transom.validation.evaluation.statistics import pass_at_k
from transom.zoo.chat import Message

Reward = Callable[[str, str, Mapping[str, Any]], tuple[float | None, str]]
"""From prompt, completion and reference to a value, 1 for all that could be wanted, and its reason. No value: it could
not be computed, for which the completion is not to blame."""

MAX_NEW = 256


class Task(NamedTuple):
    """A line of a file of tasks.

    Attributes:
        prompt: What is asked.
        reference: The line's other keys: what a reward knows of a right answer.
    """

    prompt: str
    reference: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How to draw continuations.

    Attributes:
        samples: Continuations of each prompt.
        temperature: Of sampling; 0 takes the likeliest token.
        max_new: Most tokens of a continuation.
        chat: Whether prompts are what a user says, in the model's chat template.
        right: Whether a reward of 1 means a right answer; a preference model's means nothing of the kind.
        seed: Of the draws and of the bootstrap.

    Raises:
        EvaluationError: If several samples would all be the same, or a number is out of range.
    """

    samples: int = 1
    temperature: float = 0.0
    max_new: int = MAX_NEW
    chat: bool = False
    right: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new < 1:
            raise EvaluationError(
                f"{self.samples} samples of {self.max_new} tokens: --samples and --max-new must be 1 or more"
            )
        if self.samples > 1 and self.temperature == 0:
            raise EvaluationError(
                f"{self.samples} samples at temperature 0 are all the same: give a --temperature, or one sample"
            )

    @property
    def tries(self) -> list[int]:
        """The k above 1 of pass@k: powers of two, and the number of samples."""
        powers = (1 << exponent for exponent in range(1, self.samples.bit_length()))
        return sorted({*powers, self.samples} - {1})


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a file of JSON lines, in its order. Empty lines are passed over.

    Raises:
        EvaluationError: If the file cannot be read, a line is no JSON object with a `prompt`, or there is none.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror or error}): name a file of JSON lines") from None
    tasks = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            values = parse_object(line, where, EvaluationError, "write a JSON object in each line")
            prompt = values.pop("prompt", None)
            if not isinstance(prompt, str) or not prompt:
                raise EvaluationError(f"{where} has no text under `prompt`: write an object in each line that has")
            tasks.append(Task(prompt, values))
    if not tasks:
        raise EvaluationError(f"{path} has no prompts: write a JSON object with a `prompt` in each line")
    return tasks


def evaluate_tasks(
    folders: Sequence[str | Path],
    tasks: str | Path,
    reward: Reward,
    *,
    settings: TaskSettings | None = None,
    start: str | Path | None = None,
    threads: int | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Contest:
    """Let artifacts continue prompts, and judge what they write.

    "reward" is the mean over the samples of a prompt; "exact match" the share of them whose reward is 1; "pass@k" the
    chance that one of k is. "KL to start" is that of a whole continuation in nats: at each token that was written, the
    one that ends it included, KL(this || start) of the next token's distributions at temperature 1, added up. With
    samples at temperature 1 its mean is the KL of the two models' texts. A contender's "win rate" is the share of
    prompts whose mean reward is higher than the first one's, ties counted half. What a reward fails on is counted, and
    in no mean.

    Args:
        folders: Artifacts, of any target and scheme; the others are compared with the first.
        tasks: JSON lines, each with its `prompt` and what the reward reads.
        reward: What judges; such as the `score` of a reward of `transom.training.rewards`.
        settings: How continuations are drawn; by default greedily, one a prompt.
        start: Artifact to take the KL to.
        threads: Threads of the runtimes.
        on_progress: Called with (artifact, done, total).

    Raises:
        EvaluationError: If there is no artifact or prompt, settings do not go together, `start` reads a prompt as other
            tokens, or all completions of an artifact fail to be scored.
        TokenizerError: If an artifact has no tokenizer, or no chat template that is wanted.
        ContextLengthError: If a prompt and its continuation do not fit.
        RewardError: If nothing can be judged here, as a tool is missing.
    """
    path, settings = Path(tasks), settings or TaskSettings()
    sampling = Sampling(temperature=settings.temperature)
    rows, entrants = read_tasks(path), read_entrants(folders, threads=threads)
    prompts = [_read(entrant, rows, settings, path) for entrant in entrants]
    base, anchor = None, None
    if start is not None:
        (base,) = read_entrants([start], threads=threads)
        starts = _read(base, rows, settings, path)
        for entrant, read in zip(entrants, prompts, strict=True):
            if read != starts or entrant.manifest.vocab_size != base.manifest.vocab_size:
                raise EvaluationError(
                    f"{base.folder} and {entrant.folder} read prompts as different tokens, so there is no KL between "
                    "them: give a --start of the same vocabulary"
                )
    # A missing tool is told before anything is generated, not after.
    reward(rows[0].prompt, "", rows[0].reference)
    if base is not None:
        anchor = base.open(threads)

    def measure(entrant: Entrant) -> Measured:
        session = entrant.open(threads)
        total, done = len(rows) * settings.samples, 0
        values = np.full((len(rows), settings.samples), np.nan)
        divergences = np.zeros_like(values)
        failures = collections.Counter[str]()
        for index, (task, ids) in enumerate(zip(rows, prompts[entrants.index(entrant)], strict=True)):
            for sample in range(settings.samples):
                on_progress(entrant.name, done, total)
                # Every draw has a seed of its own, so that it depends on no other.
                generator = np.random.default_rng([settings.seed, index, sample])
                new, divergences[index, sample] = _continue(session, ids, settings, sampling, generator, anchor)
                value, reason = reward(task.prompt, entrant.tokenizer.decode(new), task.reference)
                if value is None:
                    failures[reason] += 1
                else:
                    values[index, sample] = value
                done += 1
        on_progress(entrant.name, total, total)
        scores = _measures(values, settings)
        if anchor is not None:
            scores["KL to start"] = divergences.mean(1)
        return Measured(scores=scores, failures=failures)

    return run_contest(
        entrants,
        measure,
        kind="tasks",
        file=path,
        rows=len(rows),
        settings=dataclasses.asdict(settings) | {"start": None if start is None else str(start)},
        wins="reward",
        seed=settings.seed,
    )


def _read(entrant: Entrant, rows: Sequence[Task], settings: TaskSettings, path: Path) -> list[list[int]]:
    """Prompts as tokens of an artifact."""
    tokenizer, context, prompts = entrant.tokenizer, entrant.manifest.context, []
    for number, task in enumerate(rows, 1):
        if settings.chat:
            ids = tokenizer.encode_chat([Message(role="user", content=task.prompt)])
        else:
            ids = tokenizer.encode(task.prompt)
        if not ids:
            raise TokenizerError(f"{path}, prompt {number} is no tokens for {entrant.folder}: give it some text")
        # The last new token is never run, so it needs no slot.
        if len(ids) + settings.max_new - 1 > context:
            raise ContextLengthError(
                f"{path}, prompt {number}: {len(ids):,} tokens and {settings.max_new:,} new ones do not fit into the "
                f"context of {entrant.folder}, {context:,}: shorten the prompt, give a smaller --max-new, or export "
                "with a larger --context"
            )
        prompts.append(ids)
    return prompts


def _continue(
    session: Session,
    ids: Sequence[int],
    settings: TaskSettings,
    sampling: Sampling,
    generator: np.random.Generator,
    anchor: Session | None,
) -> tuple[list[int], float]:
    """A continuation without the token that ends it, and its KL in nats; 0 without an anchor."""
    sessions = [session] if anchor is None else [session, anchor]
    new: list[int] = []
    divergence = 0.0
    for one in sessions:
        one.reset()
        one.reserve(len(ids) + settings.max_new - 1)
    logits = [one.prefill(ids) for one in sessions]
    while True:
        token = sampling.choose(logits[0], generator)
        if anchor is not None:
            log_p, log_q = map(log_softmax, logits)
            divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        if token in session.stop_ids:
            return new, divergence
        new.append(token)
        if len(new) == settings.max_new:
            return new, divergence
        logits = [one.decode(token) for one in sessions]


def _measures(values: NDArray[np.float64], settings: TaskSettings) -> dict[str, NDArray[np.float64]]:
    """Measures of each prompt [P] from values [P, samples], NaN where there is none."""
    counted = (~np.isnan(values)).sum(1)
    passed = (values == 1).sum(1)
    some = np.maximum(counted, 1)
    scores = {"reward": np.where(counted > 0, np.nansum(values, 1) / some, np.nan)}
    if not settings.right:
        return scores
    scores["exact match"] = np.where(counted > 0, passed / some, np.nan)
    for k in settings.tries:
        scores[f"pass@{k}"] = np.array(
            [pass_at_k(int(n), int(c), k) if n >= k else np.nan for n, c in zip(counted, passed, strict=True)]
        )
    return scores
