"""The oracle and every scheme, measured one after another."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from transom.backends.artifact import read_manifest
from transom.errors import TransomError
from transom.validation.candidates import Candidate, OnProgress, Opener
from transom.validation.compare import ROWS, Differences, compare_rows, counter, measure
from transom.validation.evaluation.result import PLAIN, Row
from transom.validation.evaluation.speed import measure_speed
from transom.validation.evaluation.text import Text
from transom.validation.oracle import Reading
from transom.validation.target import in_a_line
from transom.zoo.companions import COMPANIONS
from transom.zoo.model import Model

CALL = 256
"""Most positions whose logits are computed at once: 256 MiB of a vocabulary of 262,144."""


def evaluate_all(
    opener: Opener,
    candidates: Sequence[Candidate],
    text: Text,
    decode_tokens: int,
    not_run: dict[str, Exception],
    on_progress: OnProgress,
) -> Iterator[Row]:
    """Yield the oracle's row, then those of the targets; `not_run` takes the errors of those that fail, by name."""
    model = opener.model
    began = time.perf_counter()
    advance = counter(partial(on_progress, "oracle"), 2 * len(text.sequences) * text.length)
    readings = _read(model, text, advance)
    oracle = [_score(tokens, reading, advance) for tokens, reading in zip(text.sequences, readings, strict=True)]
    size = sum(weight.bytes for weight in model.weights.values())
    yield Row.of(
        oracle,
        oracle,
        name=PLAIN,
        target=PLAIN,
        scheme="none",
        dtype="float32",
        folder=None,
        weights={"name": model.source, "revision": model.revision},
        bytes=size,
        bytes_per_weight=size / model.parameters,
        prefill=None,
        decode=None,
        seconds=time.perf_counter() - began,
    )
    for candidate in candidates:
        try:
            row = _measure_one(opener, candidate, text, readings, oracle, decode_tokens, on_progress)
        except Exception as error:
            # Runtimes raise what they like, and what the other schemes give must not be lost.
            # Without its frames, which would keep the session in memory.
            not_run[candidate.name] = error.with_traceback(None)
        else:
            yield row


def reason(error: Exception) -> str:
    """Why something did not run, in a line."""
    return str(error) if isinstance(error, TransomError) else in_a_line(error)


def _read(model: Model, text: Text, advance: Callable[[int], None]) -> list[Reading]:
    """What the oracle says; of the module, only the table of the head outlives this."""
    module, readings = model.eager(), []
    for tokens in text.sequences:
        readings.append(Reading(module, tokens))
        advance(len(tokens))
    return readings


def _score(tokens: Sequence[int], reading: Reading, advance: Callable[[int], None]) -> Differences:
    """The oracle beside itself."""
    parts = []
    for low in range(0, len(tokens), ROWS):
        rows = reading.logits(low, min(low + ROWS, len(tokens)))
        parts.append(compare_rows(rows, rows, low, tokens[low + 1 : low + 1 + ROWS]))
        advance(len(rows))
    return Differences.join(parts)


def _measure_one(
    opener: Opener,
    candidate: Candidate,
    text: Text,
    readings: Sequence[Reading],
    oracle: Sequence[Differences],
    decode_tokens: int,
    on_progress: OnProgress,
) -> Row:
    began, name = time.perf_counter(), candidate.name
    with tempfile.TemporaryDirectory(prefix="transom-evaluate-", ignore_cleanup_errors=True) as scratch:
        folder = candidate.folder or Path(scratch) / candidate.target
        placed = dataclasses.replace(candidate, folder=folder)
        with opener.open(placed, lambda stage, done, total: on_progress(f"{name}: {stage}", done, total)) as session:
            manifest = read_manifest(folder, verify=False)
            advance = counter(partial(on_progress, name), len(text.sequences) * text.length)
            step = min(session.chunk, CALL)
            scores = [
                measure(session, tokens, reading.logits, step=step, on_tokens=advance).differences
                for tokens, reading in zip(text.sequences, readings, strict=True)
            ]
            speed = measure_speed(session, text.sequences[0], decode_tokens)
    # What it needs to run: neither the tokenizer, nor the sampling settings, nor the manifest.
    size = sum(int(entry["bytes"]) for file, entry in manifest.files.items() if file not in COMPANIONS)
    return Row.of(
        scores,
        oracle,
        name=name,
        target=candidate.target,
        scheme=candidate.options.quant,
        dtype=candidate.options.dtype,
        folder=None if candidate.folder is None else str(candidate.folder),
        weights=dict(manifest.source),
        bytes=size,
        bytes_per_weight=size / opener.model.parameters,
        prefill=speed.prefill,
        decode=speed.decode,
        seconds=time.perf_counter() - began,
    )
