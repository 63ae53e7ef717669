"""Standard streams as a command meets them: of any encoding, closed early, or on a full disk."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO

from rich.console import Console


class StreamConsole(Console):
    """A console that draws with what its stream's encoding has: plain characters where that is not UTF-8."""

    @property
    def encoding(self) -> str:
        """Of the stream that it writes to now."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def on_broken_pipe(self) -> None:
        """Leave it to `main`, where rich would end the process with 1."""
        raise BrokenPipeError


def make_lenient() -> None:
    """Let streams take any character: what output cannot write is replaced, input keeps bytes that it cannot read.

    File names that are no UTF-8 are written as the bytes that they are.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="surrogateescape" if _is_utf8(stream) else "replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # UTF-8 is ASCII where that is all there is.
        encoding = "utf-8" if sys.stdin.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968") else None
        with contextlib.suppress(io.UnsupportedOperation):
            sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def flush() -> None:
    """Write out what is buffered, while an error can still be reported.

    Raises:
        OSError: If it cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def abandon() -> None:
    """Drop what cannot be written, so that the interpreter does not try it again when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            # A stream of a test has no number.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())


def _is_utf8(stream: TextIO) -> bool:
    return stream.encoding.lower().replace("-", "") == "utf8"
