"""Run one target through a schedule and compare it with the oracle."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from transom.backends.session import Session
from transom.errors import ArtifactError, SamplingError
from transom.validation.candidates import Candidate
from transom.validation.compare import Differences, compare, divergence
from transom.validation.judge import judge, weigh
from transom.validation.lengths import Schedule, schedule
from transom.validation.oracle import Oracle, Reading
from transom.validation.result import LengthResult, TargetResult
from transom.validation.tolerances import quantization_limit, tolerance
from transom.zoo.config import DecoderConfig

MESSAGE_LIMIT = 400
"""Most characters of a runtime's own message in a failure: some write pages."""


class Run(NamedTuple):
    """One run: its differences, and the time that the target took."""

    kind: str
    differences: Differences
    seconds: float
    kl_unquantized: float | None = None


def measure(
    session: Session,
    candidate: Candidate,
    config: DecoderConfig,
    oracle: Oracle,
    text: Sequence[int],
    *,
    unquantized: Reading | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TargetResult:
    """Run all lengths, the continuation, and weigh the caches.

    Args:
        session: The target, opened.
        candidate: What it is.
        config: The model's configuration.
        oracle: Of the same quantisation; it has read `text`.
        text: Token ids, as many as the longest prompt takes.
        unquantized: The unquantised oracle's reading of the text.
        on_progress: Called with (positions done, positions to do).
    """
    if session.vocab_size != config.vocab_size:
        raise ArtifactError(f"{candidate.name} has {session.vocab_size} tokens, {config.name} has {config.vocab_size}")
    session.refuses_nonfinite = False  # the verdict says from which position on logits are no numbers
    bound = tolerance(candidate.target, dtype=candidate.options.dtype, quant=candidate.options.quant)
    plans = schedule(window=config.longest_window, context=session.context, chunk=session.chunk, caches=session.caches)
    total, done = _positions(plans), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    runs = []
    for length in plans.prompts:
        whole = length == plans.longest
        beside = unquantized if whole else None
        runs.append(_prefill(session, oracle, text[:length], advance, beside, whole=whole))
    runs += [_decode(session, oracle, text, span, advance) for span in plans.decodes]
    began = time.perf_counter()
    prompt = list(text[: plans.continued])
    new, unchosen = _continuation(session, prompt, plans.new_tokens)
    seconds = time.perf_counter() - began
    advance(plans.continued + plans.new_tokens)
    different, diverged = (_first_divergence(oracle, prompt, new, tie) for tie in (0.0, bound.tie))
    longest = runs[len(plans.prompts) - 1]
    caches, failures = weigh(session, config, plans.longest)
    failures = [*(line for run in runs for line in judge(run.kind, run.differences, bound)), *failures]
    if unchosen is not None:
        failures.append(f"the greedy continuation of a prompt of {plans.continued} ends at {len(new)}: {unchosen}")
    if diverged is not None:
        failures.append(
            f"the greedy continuation of a prompt of {plans.continued} leaves the oracle's at new token {diverged}"
        )
    limit = quantization_limit(candidate.options.quant)
    if longest.kl_unquantized is not None and limit is not None and not longest.kl_unquantized <= limit:
        failures.append(
            f"the quantised weights are far from the model's: mean KL from the unquantised model is "
            f"{longest.kl_unquantized:.1e} nats, {limit:.0e} is allowed for {candidate.options.quant}"
        )
    return TargetResult(
        target=candidate.target,
        folder=str(candidate.folder) if candidate.folder else None,
        quant=candidate.options.quant,
        dtype=candidate.options.dtype,
        context=session.context,
        chunk=session.chunk,
        window=config.longest_window,
        slots=tuple(sorted({c.slots for c in session.caches if c.window is not None and c.slots is not None})),
        tolerance=bound,
        lengths=tuple(_result(run) for run in runs),
        new_tokens=plans.new_tokens,
        first_different=different,
        first_divergence=diverged,
        kl_unquantized=longest.kl_unquantized,
        kl_unquantized_limit=limit,
        caches=caches,
        not_reached=plans.not_reached,
        failures=tuple(failures),
        by_position=tuple(float(value) for value in longest.differences.relative),
        note=session.note,
        seconds=sum(run.seconds for run in runs) + seconds,
    )


def in_a_line(error: Exception) -> str:
    """A runtime's own words, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MESSAGE_LIMIT]}"


def not_measured(candidate: Candidate, config: DecoderConfig, error: Exception) -> TargetResult:
    """The result of a target that could not be run."""
    options = candidate.options
    return TargetResult(
        target=candidate.target,
        folder=str(candidate.folder) if candidate.folder else None,
        quant=options.quant,
        dtype=candidate.options.dtype,
        context=options.context,
        chunk=options.chunk,
        window=config.longest_window,
        slots=(),
        tolerance=tolerance(candidate.target, dtype=candidate.options.dtype, quant=options.quant),
        lengths=(),
        new_tokens=0,
        first_different=None,
        first_divergence=None,
        kl_unquantized=None,
        kl_unquantized_limit=quantization_limit(options.quant),
        caches=None,
        not_reached=("everything: it could not be run",),
        failures=(f"could not run: {in_a_line(error)}",),
        by_position=(),
        seconds=0.0,
    )


def _positions(plans: Schedule) -> int:
    return sum(plans.prompts) + sum(stop for _, stop in plans.decodes) + plans.continued + plans.new_tokens


def _prefill(
    session: Session,
    oracle: Oracle,
    text: Sequence[int],
    advance: Callable[[int], None],
    unquantized: Reading | None,
    *,
    whole: bool,
) -> Run:
    """Run a prompt; compares every position if `whole`, else those of the last call.

    The earlier calls of a shorter prompt are the very calls of the longest one, so comparing them again tells nothing.
    """
    session.reset()
    first = 0 if whole else (len(text) - 1) // session.chunk * session.chunk
    began = time.perf_counter()
    if first:
        session.prefill(text[:first], on_chunk=advance)
    seconds = time.perf_counter() - began
    parts, distances = [], []
    # Fed a chunk at a time, so that no chunk's logits outlive their comparison.
    for low in range(first, len(text), session.chunk):
        began = time.perf_counter()
        # Of one call, or of two where a ring ends between.
        logits = np.concatenate(list(session.feed(text[low : low + session.chunk], wanted="all")))
        seconds += time.perf_counter() - began
        parts.append(compare(logits, oracle.text.logits, low))
        if unquantized is not None:
            distances.append(divergence(logits, unquantized.logits, low))
        advance(len(logits))
        del logits
    kl = float(np.concatenate(distances).mean()) if distances else None
    return Run("prefill", Differences.join(parts), seconds, kl)


def _decode(
    session: Session, oracle: Oracle, text: Sequence[int], span: tuple[int, int], advance: Callable[[int], None]
) -> Run:
    first, stop = span
    session.reset()
    session.prefill(text[:first])
    advance(first)
    parts, seconds = [], 0.0
    for position in range(first, stop):
        began = time.perf_counter()
        logits = session.decode(text[position])
        seconds += time.perf_counter() - began
        parts.append(compare(logits[None], oracle.text.logits, position))
        advance(1)
    return Run("decode", Differences.join(parts), seconds)


def _continuation(session: Session, prompt: list[int], count: int) -> tuple[list[int], str | None]:
    """New tokens, and why there are fewer than wanted if logits are no numbers."""
    new: list[int] = []
    try:
        for token in session.generate(prompt, max_new_tokens=count, stop_ids=()):
            new.append(token)
    except SamplingError as error:
        return new, str(error)
    return new, None


def _first_divergence(oracle: Oracle, prompt: list[int], new: list[int], tie: float) -> int | None:
    """Where the oracle would have gone another way.

    The oracle reads the target's own continuation: up to the first token that differs, that is its own as well.
    """
    reading = oracle.read([*prompt, *new])
    for index, token in enumerate(new):
        row = reading.logits(len(prompt) - 1 + index, len(prompt) + index)[0]
        if row.max() - row[token] > tie * row.abs().max():
            return index
    return None


def _result(run: Run) -> LengthResult:
    differences = run.differences
    worst = int(np.argmax(differences.relative))
    return LengthResult(
        kind=run.kind,
        first=differences.first,
        length=differences.first + len(differences.kl),
        max_abs=float(differences.max_abs.max()),
        max_rel=float(differences.relative.max()),
        worst=differences.first + worst,
        kl_mean=float(differences.kl.mean()),
        kl_max=float(differences.kl.max()),
        top1_agreement=float((differences.gap == 0).mean()),
        seconds=run.seconds,
    )
