"""Verdicts, in plain words: what is wrong, where, and by how much."""

from __future__ import annotations

import numpy as np

from transom.backends.session import Session
from transom.graphs.state import State
from transom.validation.compare import Array, Differences
from transom.validation.result import CacheResult
from transom.validation.tolerances import Tolerance
from transom.zoo.config import DecoderConfig
from transom.zoo.plan import CACHE_DTYPES, plan

PLAN_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}
"""The plan's names of what caches hold."""


def judge(kind: str, differences: Differences, bound: Tolerance, where: str = "") -> list[str]:
    """Why a run ("prefill" or "decode") fails; empty if it passes. What is not a number fails.

    `where` names the run, if it is not one of text alone.
    """
    length = differences.first + len(differences.kl)
    where = where or (f"a prompt of {length}" if kind == "prefill" else f"decoding {differences.first} to {length - 1}")
    failures = []
    bad = beyond(differences.relative, bound.relative, differences.first)
    if bad and not (bad[2] <= bound.outliers * len(differences.kl) and bad[1] <= bound.outlier * bound.relative):
        position, value, count = bad
        failures.append(
            f"{where}: logits differ from position {position} on, by {value:.1e} of the largest; "
            f"{bound.relative:.0e} is allowed, {count} of {len(differences.kl)} positions are beyond it"
        )
    if bad := beyond(differences.kl, bound.kl_max, differences.first):
        position, value, _ = bad
        failures.append(f"{where}: KL is {value:.1e} nats at position {position}, {bound.kl_max:.0e} is allowed")
    if not (mean := differences.kl.mean()) <= bound.kl_mean:
        failures.append(f"{where}: mean KL is {mean:.1e} nats, {bound.kl_mean:.0e} is allowed")
    if bad := beyond(differences.gap / np.maximum(differences.magnitude, 1e-30), bound.tie, differences.first):
        position, _, count = bad
        failures.append(
            f"{where}: another token is the likeliest from position {position} on, at {count} of {len(differences.kl)} "
            "positions; these are no ties"
        )
    share = differences.top1_agreement
    # Of a few decoded positions, one tie would be a large share.
    if kind == "prefill" and not share >= bound.top1 - 1 / len(differences.gap):
        failures.append(f"{where}: top-1 agreement is {share:.1%}, {bound.top1:.0%} is required")
    return failures


def beyond(values: Array, limit: float, first: int) -> tuple[int, float, int] | None:
    """Position of the first value beyond a limit, the largest value, and how many are; None if all are within."""
    bad = ~(values <= limit)
    return (first + int(bad.argmax()), float(values.max()), int(bad.sum())) if bad.any() else None


def weigh(session: Session, config: DecoderConfig, tokens: int, slack: int) -> tuple[CacheResult, list[str]]:
    """Bytes of the caches as allocated against the slots that the artifact promises and those that a window needs.

    The session has `tokens` tokens in its caches, the longest prompt, or has had more. A local layer may have `slack`
    slots beside its window.
    """
    cache_bytes, failures = session.cache_bytes(), []
    windows = [layer.window for layer in config.layers]
    local = [(state, window) for state in session.states if (window := windows[state.layer]) is not None]
    for state, window in local:
        most = window + slack
        if state.window is None or state.slots is None:
            failures.append(f"{state.name}: layer {state.layer} is local, but its cache grows with the context")
        elif state.slots > most:
            failures.append(
                f"{state.name}: {state.slots} slots, a window of {window} and chunks of {session.chunk} need "
                f"{most} at most"
            )
    expected = sum(_slot_bytes(state) * (state.slots or 0) for state, _ in local)
    per_token = sum(_slot_bytes(state) for state in session.states if state.is_ring and windows[state.layer] is None)
    # A session counts a cache without a window as global; that is a failure above.
    if all(state.window is not None for state, _ in local):
        if cache_bytes["local"] != expected:
            failures.append(
                f"caches of local layers take {cache_bytes['local']:,} bytes after {tokens} tokens, the manifest's "
                f"slots come to {expected:,}"
            )
        if not per_token * tokens <= cache_bytes["global"] <= per_token * session.context:
            failures.append(
                f"caches of global layers take {cache_bytes['global']:,} bytes after {tokens} tokens, at {per_token:,} "
                f"a token and a context of {session.context:,}"
            )
    summaries = sum(_slot_bytes(state) for state in session.states if not state.is_ring)
    # Where a summary is not changed in place, two take turns.
    if cache_bytes.get("summary", 0) not in (summaries, 2 * summaries):
        failures.append(
            f"summaries take {cache_bytes.get('summary', 0):,} bytes after {tokens} tokens, they have {summaries:,} at "
            "any length"
        )
    dtype = PLAN_NAMES[session.states[0].dtype]
    bare = plan(config, context=session.context, cache_dtype=dtype).layers
    return CacheResult(
        local=cache_bytes["local"],
        global_=cache_bytes["global"],
        local_manifest=expected,
        local_window=sum(layer.bytes for layer in bare if layer.kind == "local"),
        unbounded=sum(_slot_bytes(state) for state, _ in local) * session.context,
    ), failures


def _slot_bytes(state: State) -> int:
    return state.numbers * CACHE_DTYPES[PLAN_NAMES[state.dtype]]
