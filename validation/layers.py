"""Where along the depth a target's numbers leave the reference's: every tapped value of one prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from transom.passes.add_taps import AddTaps
from transom.validation.bisection.context import LOGITS, Context
from transom.validation.bisection.recording import steps
from transom.validation.bisection.sources import tapped
from transom.validation.candidates import REFERENCE, Candidate, OnProgress, Opener
from transom.validation.lengths import SPAN
from transom.validation.result import LayerResult

SMALLEST = float(np.finfo(np.float32).tiny)
"""Stands for the largest of values that are all zero."""


def compare_layers(
    candidate: Candidate, opener: Opener, text: Sequence[int], on_progress: OnProgress
) -> tuple[LayerResult, ...]:
    """Compile a target again with taps, and run it beside the reference, call by call, on a prompt of 3W+5.

    Returns:
        One record a tap, in the order of execution.
    """
    options, config = candidate.options, opener.model.config
    length = min(3 * (config.longest_window or SPAN) + 5, options.context, len(text))
    calls = [range(low, min(low + options.chunk, length)) for low in range(0, length, options.chunk)]
    reference = dataclasses.replace(candidate, name=REFERENCE, folder=None, exported=False)
    reference = dataclasses.replace(reference, options=dataclasses.replace(options, target=REFERENCE))
    graph = Context(graph=tapped(opener.model.trace()), tokens=text)
    worst: dict[str, tuple[float, float]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        on_progress(f"{candidate.name} layers: {stage}", done, total)

    with ExitStack() as stack:
        pair = [stack.enter_context(opener.open(part, progress, [AddTaps()])) for part in (reference, candidate)]
        runs = [steps(session, calls, graph) for session in pair]
        for call, expected, actual in zip(calls, *runs, strict=True):
            for name, value in expected.items():
                before, largest = worst.get(name, (0.0, SMALLEST))
                # numpy's maximum keeps a NaN.
                difference = np.maximum(before, np.abs(actual[name] - value).max())
                worst[name] = float(difference), float(np.maximum(largest, np.abs(value).max()))
            progress("positions", call.stop, length)
    return tuple(
        LayerResult(
            name=name.removeprefix("tap."),
            layer=graph.taps[name][0].layer,
            op=graph.taps[name][0].op,
            max_abs=difference,
            max_rel=difference / magnitude,
        )
        for name, (difference, magnitude) in worst.items()
        if name != LOGITS
    )
