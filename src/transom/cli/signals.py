"""Signals that end a command in order: drafts are removed on the way out, as after an error."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

ENDING = ("SIGTERM", "SIGHUP", "SIGINT")
"""Asked to end, the terminal is gone, the keyboard's interrupt; systems that lack one skip it."""

AGAIN = 0.05
"""Seconds until a signal is repeated that could not end the command."""

DISPATCH = "__torch_dispatch__"
"""Functions that PyTorch calls from C++: an exception that leaves one with a mode still set aborts the process."""


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """In the block, the first such signal raises `SystemExit` with 128 and its number; a second one ends at once.

    The keyboard's interrupt raises `KeyboardInterrupt`, each time. A signal that comes within PyTorch's dispatch is
    repeated a little later; so is one whose exception Python drops, in a finaliser or in a callback of C.
    """
    # Only the main thread may.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    # What is ignored, as under nohup, stays so.
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) in defaults}
    timers, hook = list[threading.Timer](), sys.unraisablehook

    def end(number: int, frame: FrameType | None) -> None:
        if any(caller.f_code.co_name == DISPATCH for caller, _ in traceback.walk_stack(frame)):
            repeat(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            raise SystemExit(128 + number)

    def repeat(number: int) -> None:
        signal.signal(number, end)
        timers.append(threading.Timer(AGAIN, _send, (number,)))
        timers[-1].start()

    def dropped(exception: Any) -> None:
        error = exception.exc_value
        number: int | None = signal.SIGINT if isinstance(error, KeyboardInterrupt) else None
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            number = error.code - 128
        if number is not None and number in before:
            repeat(number)
        else:
            hook(exception)

    for number in before:
        signal.signal(number, end)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(number: int) -> None:
    """To the main thread, which may wait in a call that only a signal of its own interrupts."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)
