"""Signals that end a command in order: drafts are removed on the way out, as after an error."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = ("SIGTERM", "SIGHUP")
"""Asked to end, and the terminal is gone; systems that lack one skip it."""


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """In the block, the first such signal raises `SystemExit` with 128 and its number; a second one ends at once."""
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    # Only the main thread may; and what is ignored, as under nohup, stays so.
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    for number in [number for number in numbers if before[number] == signal.SIG_DFL]:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)
