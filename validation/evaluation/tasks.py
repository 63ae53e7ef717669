"""Continuations of prompts by artifacts, judged by a reward: what is measured is what is deployed."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.backends.batch import Batch
from transom.backends.runtime import Float
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

ROWS = 16
"""Continuations that are written together where an artifact's runtime takes several."""

Draw = tuple[int, int]
"""Which prompt, and which of its samples."""


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
        read, total, done = prompts[entrants.index(entrant)], len(rows) * settings.samples, 0
        values = np.full((len(rows), settings.samples), np.nan)
        divergences = np.zeros_like(values)
        failures = collections.Counter[str]()
        texts: dict[tuple[int, int], str] = {}
        writer = _Writer([entrant.open(threads), *([] if anchor is None else [anchor])], settings)
        for draws in _together(read, settings.samples, writer.rows):
            on_progress(entrant.name, done, total)
            written = writer.write([read[index] for index, _ in draws], draws)
            for draw, (new, divergence) in zip(draws, written, strict=True):
                texts[draw], divergences[draw] = entrant.tokenizer.decode(new), divergence
            done += len(draws)
        # Judged in the order of the file, whatever was written first.
        for (index, sample), text in sorted(texts.items()):
            value, reason = reward(rows[index].prompt, text, rows[index].reference)
            if value is None:
                failures[reason] += 1
            else:
                values[index, sample] = value
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


def _together(prompts: Sequence[Sequence[int]], samples: int, most: int) -> Iterator[list[Draw]]:
    """Draws that are written together: at most so many, of prompts of one length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for _, group in itertools.groupby(order, key=lambda index: len(prompts[index])):
        draws = [(index, sample) for index in group for sample in range(samples)]
        for low in range(0, len(draws), most):
            yield draws[low : low + most]


class _Writer:
    """Continues prompts on an artifact.

    Args:
        sessions: That artifact's, and one to take the KL to if there are two.
        settings: How to draw.

    Attributes:
        rows: Prompts that it takes at a time.
    """

    def __init__(self, sessions: Sequence[Session], settings: TaskSettings) -> None:
        self._sessions, self._settings = sessions, settings
        self._sampling = Sampling(temperature=settings.temperature)
        several = all(session.runtime.takes_rows for session in sessions)
        self._runs: list[Batch | _Single] = [
            Batch(session.runtime) if several else _Single(session) for session in sessions
        ]
        self.rows = ROWS if several else 1

    def write(self, prompts: Sequence[Sequence[int]], draws: Sequence[Draw]) -> list[tuple[list[int], float]]:
        """Continuations without the token that ends them, and their KL in nats; 0 without an artifact to take it to.

        Args:
            prompts: Token ids, all of them as many.
            draws: Which prompt and sample each is.
        """
        stops, most = self._sessions[0].stop_ids, self._settings.max_new
        # Every draw has a seed of its own, so that it depends on no other.
        generators = [np.random.default_rng([self._settings.seed, *draw]) for draw in draws]
        new: list[list[int]] = [[] for _ in draws]
        divergences = [0.0] * len(draws)
        going = list(range(len(draws)))
        logits = [run.begin(prompts, len(prompts[0]) + most - 1) for run in self._runs]
        while True:
            tokens, kept = list[int](), list[int]()
            for row, place in enumerate(going):
                token = self._sampling.choose(logits[0][row], generators[place])
                if len(logits) > 1:
                    log_p, log_q = (log_softmax(values[row]) for values in logits)
                    divergences[place] += float((np.exp(log_p) * (log_p - log_q)).sum())
                if token in stops:
                    continue
                new[place].append(token)
                if len(new[place]) < most:
                    tokens.append(token)
                    kept.append(row)
            if not kept:
                return list(zip(new, divergences, strict=True))
            if len(kept) < len(going):
                going = [going[row] for row in kept]
                for run in self._runs:
                    run.take(kept)
            logits = [run.decode(np.array(tokens)) for run in self._runs]


class _Single:
    """A session as a batch of one."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def begin(self, prompts: Sequence[Sequence[int]], slots: int) -> Float:
        (prompt,) = prompts
        self._session.reset()
        self._session.reserve(slots)
        return self._session.prefill(prompt)[None]

    def decode(self, tokens_B: NDArray[np.int64]) -> Float:
        return self._session.decode(int(tokens_B[0]))[None]

    def take(self, rows: Sequence[int]) -> None:
        """The one goes on."""


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
