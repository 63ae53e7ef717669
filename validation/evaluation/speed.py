"""How fast a session is, measured on the text itself."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transom.backends.session import Session

REPEATS = 3
"""Runs, of which the middle one counts."""


class Speed(NamedTuple):
    """Tokens a second: of a prompt with the logits of its last token alone, and one by one after it."""

    prefill: float
    decode: float


def split(length: int, decode_tokens: int) -> tuple[int, int]:
    """How many tokens of a sequence are read at once, and how many one by one after them: at most a half."""
    alone = min(decode_tokens, length // 2)
    return length - alone, alone


def measure_speed(session: Session, tokens: Sequence[int], decode_tokens: int) -> Speed:
    """Time a session that is warm already on a sequence whose last tokens are decoded."""
    first, _ = split(len(tokens), decode_tokens)
    prefills, decodes = [], []
    for _ in range(REPEATS):
        session.reset()
        began = time.perf_counter()
        session.prefill(tokens[:first])
        middle = time.perf_counter()
        for token in tokens[first:]:
            session.decode(token)
        ended = time.perf_counter()
        prefills.append(first / (middle - began))
        decodes.append((len(tokens) - first) / (ended - middle))
    return Speed(statistics.median(prefills), statistics.median(decodes))


def processor() -> str:
    """The CPU by its maker's name, if the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
