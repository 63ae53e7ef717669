"""How many threads a runtime may be told to use."""

from __future__ import annotations

import os

from transom.errors import TargetError

PER_CORE = 4
"""More threads a core than this are a slip: they slow everything down, and some runtimes never come back."""


def check_threads(threads: int | None) -> None:
    """Raise `TargetError` for a number of threads that this machine should not be given; None is a runtime's choice."""
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= PER_CORE * cores:
        raise TargetError(
            f"{threads} threads on {cores} cores: choose from 1 to {PER_CORE * cores}, or leave the number out"
        )
