"""The oracle and every scheme, measured one after another."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transom.backends.artifact import Manifest, read_manifest
from transom.errors import TransomError
from transom.validation.candidates import Candidate, OnProgress, Opener
from transom.validation.compare import Array
from transom.validation.evaluation.result import PLAIN, Facts, Row, oracle_row, target_row
from transom.validation.evaluation.score import score, score_oracle
from transom.validation.evaluation.speed import measure_speed
from transom.validation.evaluation.text import Text
from transom.validation.measure import in_a_line
from transom.validation.oracle import Reading
from transom.zoo.companions import COMPANIONS
from transom.zoo.model import Model


def measure_all(
    opener: Opener,
    candidates: Sequence[Candidate],
    text: Text,
    decode_tokens: int,
    not_run: dict[str, Exception],
    on_progress: OnProgress,
) -> Iterator[Row]:
    """Yield the oracle's row, then those of the targets.

    Args:
        opener: Of the unquantised model.
        candidates: What to measure.
        text: What they read.
        decode_tokens: Tokens to decode when decoding is timed.
        not_run: Takes the errors of those that fail, by name.
        on_progress: Called with (step, done, total).
    """
    model = opener.model
    began, advance = time.perf_counter(), _counter("oracle", 2 * text.scored, on_progress)
    readings = _read(model, text, advance)
    log_likelihood = score_oracle(text, readings, advance)
    size = sum(weight.bytes for weight in model.weights.values())
    facts = Facts(
        name=PLAIN,
        target=PLAIN,
        scheme="none",
        dtype="float32",
        folder=None,
        weights={"name": model.source, "revision": model.revision},
        bytes=size,
        bytes_per_weight=size / model.parameters,
    )
    yield oracle_row(facts, log_likelihood, time.perf_counter() - began)
    for candidate in candidates:
        try:
            row = _measure_one(opener, candidate, text, readings, log_likelihood, decode_tokens, on_progress)
        except Exception as error:
            # Runtimes raise what they like, and what the other schemes give must not be lost.
            # Without its frames, which would keep the session in memory.
            not_run[candidate.name] = error.with_traceback(None)
        else:
            yield row


def reason(error: Exception) -> str:
    """Why something did not run, in a line."""
    return str(error) if isinstance(error, TransomError) else in_a_line(error)


def payload_bytes(manifest: Manifest) -> int:
    """Bytes of an artifact's files, without the tokenizer, the sampling settings and the manifest."""
    return sum(int(entry["bytes"]) for name, entry in manifest.files.items() if name not in COMPANIONS)


def _read(model: Model, text: Text, advance: Callable[[int], None]) -> list[Reading]:
    """What the oracle says; of the module, only the table of the head outlives this."""
    module, readings = model.eager(), []
    for tokens in text.sequences:
        readings.append(Reading(module, tokens))
        advance(len(tokens) - 1)
    return readings


def _measure_one(
    opener: Opener,
    candidate: Candidate,
    text: Text,
    readings: Sequence[Reading],
    oracle: Array,
    decode_tokens: int,
    on_progress: OnProgress,
) -> Row:
    began, name = time.perf_counter(), candidate.name
    with tempfile.TemporaryDirectory(prefix="transom-evaluate-", ignore_cleanup_errors=True) as scratch:
        folder = candidate.folder or Path(scratch) / candidate.target
        placed = dataclasses.replace(candidate, folder=folder)
        with opener.open(placed, lambda stage, done, total: on_progress(f"{name}: {stage}", done, total)) as session:
            manifest = read_manifest(folder, verify=False)
            scores = score(session, text, readings, _counter(name, len(text.sequences) * text.length, on_progress))
            speed = measure_speed(session, text.sequences[0], decode_tokens)
    size = payload_bytes(manifest)
    facts = Facts(
        name=name,
        target=candidate.target,
        scheme=candidate.options.quant,
        dtype=candidate.options.dtype,
        folder=None if candidate.folder is None else str(candidate.folder),
        weights=dict(manifest.source),
        bytes=size,
        bytes_per_weight=size / opener.model.parameters,
    )
    return target_row(facts, scores, oracle, speed, time.perf_counter() - began)


def _counter(stage: str, total: int, on_progress: OnProgress) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(stage, done, total)

    return advance
