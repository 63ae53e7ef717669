"""One target through its schedule, and its verdict."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from transom.backends.session import Session
from transom.errors import ArtifactError, SamplingError
from transom.formats.schemes import scheme
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.pipelines import pipeline
from transom.validation.candidates import REFERENCE, REFERENCE_PIPELINE, Candidate
from transom.validation.compare import Measurement, counter, measure
from transom.validation.images import ImageOracle, image_cases, validate_images
from transom.validation.judge import judge, weigh
from transom.validation.lengths import schedule
from transom.validation.oracle import Oracle, Reading
from transom.validation.result import LengthResult, TargetResult, length_values
from transom.validation.tolerances import quantization_limit, soft_tolerance, tolerance
from transom.zoo.config import DecoderConfig

MESSAGE_LIMIT = 400
"""Most characters of a runtime's own message in a failure: some write pages."""


def validate_target(
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

    The oracle is of the same quantisation and has read the text, as many ids as the longest prompt takes; so has the
    unquantised one. Progress is (positions done, positions to do).
    """
    if session.vocab_size != config.vocab_size:
        raise ArtifactError(f"{candidate.name} has {session.vocab_size} tokens, {config.name} has {config.vocab_size}")
    bound = tolerance(candidate.target, dtype=candidate.options.dtype, quant=candidate.options.quant)
    plans = schedule(window=config.longest_window, context=session.context, chunk=session.chunk, states=session.states)
    advance = counter(on_progress, plans.positions)
    run = functools.partial(measure, session, expected=oracle.text.logits, on_tokens=advance)
    runs: list[tuple[str, Measurement]] = []
    # The earlier calls of a shorter prompt are the very calls of the longest one: comparing them again tells nothing.
    last_calls = [(length - 1) // session.chunk * session.chunk for length in plans.prompts[:-1]]
    for first, stop in zip([*last_calls, 0], plans.prompts, strict=True):
        beside = unquantized.logits if unquantized is not None and stop == plans.longest else None
        runs.append(("prefill", run(text[:stop], first=first, step=session.chunk, unquantized=beside)))
    runs += [("decode", run(text[:stop], first=first, step=1)) for first, stop in plans.decodes]
    began = time.perf_counter()
    continued = list(text[: plans.continued])
    new, unchosen = _continuation(session, continued, plans.new_tokens)
    seconds = time.perf_counter() - began
    advance(plans.continued + plans.new_tokens)
    different, diverged = (_first_divergence(oracle, continued, new, tie) for tie in (0.0, bound.tie))
    longest = runs[len(plans.prompts) - 1][1].differences
    kl_unquantized = None if unquantized is None else float(longest.kl_unquantized.mean())
    lengths = tuple(LengthResult(**length_values(kind, run)) for kind, run in runs)
    caches, failures = weigh(session, config, plans.longest, _slack(candidate, session))
    failures = [*(line for kind, run in runs for line in judge(kind, run.differences, bound)), *failures]
    if unchosen is not None:
        failures.append(f"the greedy continuation of a prompt of {plans.continued} ends at {len(new)}: {unchosen}")
    if diverged is not None:
        failures.append(
            f"the greedy continuation of a prompt of {plans.continued} leaves the oracle's at new token {diverged}"
        )
    limit = quantization_limit(candidate.options.quant)
    if kl_unquantized is not None and limit is not None and not kl_unquantized <= limit:
        failures.append(
            f"the quantised weights are far from the model's: mean KL from the unquantised model is "
            f"{kl_unquantized:.1e} nats, {limit:.0e} is allowed for {candidate.options.quant}"
        )
    return _result(
        candidate,
        config,
        context=session.context,
        chunk=session.chunk,
        slots=tuple(sorted({s.slots for s in session.states if s.window is not None and s.slots is not None})),
        lengths=lengths,
        new_tokens=plans.new_tokens,
        first_different=different,
        first_divergence=diverged,
        kl_unquantized=kl_unquantized,
        caches=caches,
        not_reached=plans.not_reached,
        failures=tuple(failures),
        by_position=tuple(float(value) for value in longest.relative),
        note=session.note,
        seconds=sum(run.seconds for run in lengths) + seconds,
    )


def add_images(
    result: TargetResult,
    session: Session,
    candidate: Candidate,
    config: DecoderConfig,
    oracle: ImageOracle,
    on_progress: Callable[[str, int, int], None],
) -> TargetResult:
    """The result of a target with that of its images, and its caches weighed again behind them."""
    options = candidate.options
    cases, missed = image_cases(
        oracle.images, window=config.longest_window, rings=result.slots, chunk=session.chunk, context=session.context
    )
    try:
        images, failures = validate_images(
            session,
            oracle,
            cases,
            logit_bound=result.tolerance,
            soft_bound=soft_tolerance(candidate.target, dtype=options.dtype, quant=options.quant),
            on_progress=on_progress,
        )
        longest = max((case.length(oracle.images) for case in cases), default=0)
        weighed = weigh(session, config, longest, _slack(candidate, session))[1]
        failures += [f"behind images, {line}" for line in weighed if not result.failures]
    except Exception as error:
        # Of the text, all is known: it must not be lost.
        failures = [f"could not run images: {in_a_line(error)}"]
        images = None
    return dataclasses.replace(
        result,
        images=images,
        not_reached=(*result.not_reached, *missed),
        failures=(*result.failures, *failures),
        seconds=result.seconds + (images.seconds if images else 0.0),
    )


def _slack(candidate: Candidate, session: Session) -> int:
    """Slots that a local layer may have beside its window, by the passes of its target."""
    name = REFERENCE_PIPELINE if candidate.target == REFERENCE else candidate.target
    listed = pipeline(name, chunk=session.chunk, scheme=scheme(candidate.options.quant)).passes
    whole = any(isinstance(one, BoundLocalCaches) and one.whole_calls for one in listed)
    return (session.chunk - 1) * (2 if whole and session.images is not None else 1)


def in_a_line(error: Exception) -> str:
    """A runtime's own words, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MESSAGE_LIMIT]}"


def failed_target(candidate: Candidate, config: DecoderConfig, error: Exception) -> TargetResult:
    """The result of a target that could not be run."""
    return _result(
        candidate,
        config,
        context=candidate.options.context,
        chunk=candidate.options.chunk,
        not_reached=("everything: it could not be run",),
        failures=(f"could not run: {in_a_line(error)}",),
    )


def _result(candidate: Candidate, config: DecoderConfig, **values: Any) -> TargetResult:
    options = candidate.options
    return TargetResult(
        target=candidate.target,
        folder=str(candidate.folder) if candidate.folder else None,
        quant=options.quant,
        dtype=options.dtype,
        window=config.longest_window,
        tolerance=tolerance(candidate.target, dtype=options.dtype, quant=options.quant),
        kl_unquantized_limit=quantization_limit(options.quant),
        **values,
    )


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
