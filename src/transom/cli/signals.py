"""Signals that end a command in order: drafts are removed on the way out, as after an error."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

ENDING = ("SIGTERM", "SIGHUP")
"""Asked to end, and the terminal is gone; systems that lack one skip it."""

AGAIN = 0.05
"""Seconds until a signal is repeated whose exception was lost."""


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """In the block, the first such signal raises `SystemExit` with 128 and its number; a second one ends at once.

    Python drops an exception that comes up in a finaliser or in a callback of C; then the signal, or the interrupt from
    the keyboard, is repeated.
    """
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    # Only the main thread may; and what is ignored, as under nohup, stays so.
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    for number in [number for number in numbers if before[number] == signal.SIG_DFL]:
        signal.signal(number, _end)
    timers, hook = list[threading.Timer](), sys.unraisablehook

    def repeat(lost: Any) -> None:
        error = lost.exc_value
        number = error.code - 128 if isinstance(error, SystemExit) and isinstance(error.code, int) else None
        if isinstance(error, KeyboardInterrupt):
            number = signal.SIGINT
        elif number in numbers and number is not None:
            signal.signal(number, _end)
        else:
            hook(lost)
            return
        timers.append(threading.Timer(AGAIN, _send, (number,)))
        timers[-1].start()

    if threading.current_thread() is threading.main_thread():
        sys.unraisablehook = repeat
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = hook
        for number, handler in before.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, handler)


def _send(number: int) -> None:
    """To the main thread, which may wait in a call that only a signal of its own interrupts."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)
