"""Artifacts beside each other on the same rows of a file, with intervals over the rows."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.artifact import Manifest, read_manifest
from transom.backends.folder import MANIFEST
from transom.backends.opening import open_session
from transom.backends.session import Session
from transom.backends.threads import check_threads
from transom.compiler import versions
from transom.errors import EvaluationError, TokenizerError
from transom.validation.evaluation.statistics import Estimate, estimate_difference, estimate_mean, win_rate
from transom.validation.validate import LIBRARIES
from transom.zoo.tokenizer import Tokenizer

OnProgress = Callable[[str, int, int], None]

WIN_RATE = "win rate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entrant:
    """An artifact that takes part, checked but not yet opened."""

    name: str
    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer

    def open(self, threads: int | None) -> Session:
        """A session on it. Its hashes were checked."""
        return open_session(self.folder, tokenizer=self.tokenizer, threads=threads, verify=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured on an artifact.

    Attributes:
        scores: By measure, one number a row of the file, [P]; NaN where a row has none.
        failures: How many completions could not be scored, by reason.
    """

    scores: Mapping[str, NDArray[np.float64]]
    failures: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """An artifact with its numbers.

    Attributes:
        weights: Where the numbers came from, and their revision.
        measures: Means over the rows that have a number, by measure; without those that no row has.
        differences: How much higher than the first contender, row by row, by measure, and the win rate against it;
            empty for the first one itself.
        failures: How many completions could not be scored, by reason; they count in no mean.
    """

    name: str
    folder: str
    target: str
    scheme: str
    weights: Mapping[str, str]
    measures: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    failures: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = dict(vars(self))
        for name in ("measures", "differences"):
            data[name] = {measure: estimate.to_json() for measure, estimate in data[name].items()}
        return data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
    """Artifacts on one file.

    Attributes:
        kind: What the file's rows are: "pairs" or "tasks".
        file: Its name; `sha256` is of its bytes, `rows` how many it has.
        settings: What else the numbers depend on.
        contenders: The first is the one that the others are compared with.
    """

    kind: str
    file: str
    sha256: str
    rows: int
    settings: Mapping[str, Any]
    date: str
    versions: Mapping[str, str]
    contenders: tuple[Contender, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, JSON's own."""
        return {**vars(self), "contenders": [contender.to_json() for contender in self.contenders]}


def read_entrants(folders: Sequence[str | Path], *, threads: int | None) -> list[Entrant]:
    """Artifacts by their folders, checked.

    Raises:
        EvaluationError: If there is none, one is named twice, or something is no artifact.
        ArtifactError: If one is damaged.
        TokenizerError: If one has no tokenizer.
        TargetError: If threads are far more than cores.
    """
    check_threads(threads)
    if not folders:
        raise EvaluationError("nothing is to be evaluated: name an artifact")
    entrants: list[Entrant] = []
    for folder in map(Path, folders):
        if not (folder / MANIFEST).is_file():
            raise EvaluationError(
                f"{folder} is no artifact, and what is measured is what is deployed: export it first (transom export)"
            )
        if any(folder.resolve() == other.folder.resolve() for other in entrants):
            raise EvaluationError(f"{folder} is named twice: name each artifact once")
        manifest = read_manifest(folder)
        if not (folder / "tokenizer.json").is_file():
            raise TokenizerError(f"{folder} has no tokenizer, so it reads no text: export a source that has one")
        name = f"{manifest.target} {manifest.quantization}"
        entrants.append(Entrant(name=name, folder=folder, manifest=manifest, tokenizer=Tokenizer.from_folder(folder)))
    names = [entrant.name for entrant in entrants]
    return [
        dataclasses.replace(entrant, name=f"{entrant.name} ({entrant.folder})")
        if names.count(entrant.name) > 1
        else entrant
        for entrant in entrants
    ]


def run_contest(
    entrants: Sequence[Entrant],
    measure: Callable[[Entrant], Measured],
    *,
    kind: str,
    file: Path,
    rows: int,
    settings: Mapping[str, Any],
    wins: str | None = None,
    seed: int = 0,
) -> Contest:
    """Measure one artifact after another, and compare each with the first, row by row.

    Args:
        entrants: What takes part.
        measure: Measures one of them; the same measures for all.
        kind: See `Contest`.
        file: What the rows were read from.
        rows: How many there are.
        settings: See `Contest`.
        wins: Measure of which a higher number wins a row; None where nothing is to be won.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If the first measure of an artifact has a number on no row.
    """
    contenders: list[Contender] = []
    first: Measured | None = None
    for entrant in entrants:
        measured = measure(entrant)
        if np.isnan(next(iter(measured.scores.values()))).all():
            reasons = "; ".join(f"{reason} ({count:,})" for reason, count in measured.failures.items())
            raise EvaluationError(f"nothing of {entrant.name} could be scored: mend the data or the machine: {reasons}")
        differences: dict[str, Estimate] = {}
        if first is not None:
            for name, (ours, theirs) in _shared(measured, first):
                differences[name] = estimate_difference(ours, theirs, seed=seed)
                if name == wins:
                    differences[WIN_RATE] = win_rate(ours, theirs, seed=seed)
        contenders.append(
            Contender(
                name=entrant.name,
                folder=str(entrant.folder),
                target=entrant.manifest.target,
                scheme=entrant.manifest.quantization,
                weights=dict(entrant.manifest.source),
                measures={
                    name: estimate_mean(scores[~np.isnan(scores)], seed=seed)
                    for name, scores in measured.scores.items()
                    if not np.isnan(scores).all()
                },
                differences=differences,
                failures=dict(measured.failures),
            )
        )
        first = first or measured
    return Contest(
        kind=kind,
        file=str(file),
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        rows=rows,
        settings=dict(settings),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(LIBRARIES),
        contenders=tuple(contenders),
    )


def _shared(one: Measured, other: Measured) -> Iterator[tuple[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """Scores of the rows on which both have one, by measure; measures without such rows are left out."""
    for name, ours in one.scores.items():
        theirs = other.scores[name]
        both = ~(np.isnan(ours) | np.isnan(theirs))
        if both.any():
            yield name, (ours[both], theirs[both])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log probabilities [..., V] of logits, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide
