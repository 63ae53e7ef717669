"""Text that comes from outside, as files and arguments. It is UTF-8, or it is refused. Needs no torch."""

from __future__ import annotations

import codecs
import io
import os
from pathlib import Path

from transom.errors import TokenizerError

_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Encodings by their marks at the head of a file; UTF-32's begins with UTF-16's."""

_HEAD = 64


def read_text(path: Path) -> str:
    """A file's text, with plain line ends and without a byte order mark.

    Raises:
        TokenizerError: If it cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise TokenizerError(f"cannot read the text from {path} ({reason}): name a file in UTF-8") from error
    return decode_text(data, str(path))


def decode_text(data: bytes, source: str) -> str:
    """As `read_text`, from bytes.

    Args:
        data: The text.
        source: What the bytes are, for errors.

    Raises:
        TokenizerError: If they are not UTF-8.
    """
    if encoding := _wide(data):
        raise TokenizerError(f"{source} is {encoding}, not UTF-8: save it as UTF-8")
    try:
        # Python's own way with the mark takes half a mark for an empty text.
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise TokenizerError(f"{source} is not UTF-8 (byte 0x{byte:02x} at {error.start}): save it as UTF-8") from error


def _wide(data: bytes) -> str | None:
    """The encoding of bytes of which every second one is zero, or that say so."""
    for mark, name in _WIDE.items():
        if data.startswith(mark):
            return name
    head = data[:_HEAD]
    wide = len(data) > 2 and len(data) % 2 == 0 and any(head[::2]) != any(head[1::2])
    return "UTF-16 without a mark" if wide else None


def argument_text(text: str, name: str) -> str:
    """An argument of a command as text; where the system's own encoding cannot hold it, it is read as UTF-8.

    Args:
        text: What Python made of it.
        name: Of the argument, for errors.

    Raises:
        TokenizerError: If it is not UTF-8.
    """
    if _is_whole(text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return check_text(text, name)


def check_text(text: str, source: str) -> str:
    """The same text, if it is whole.

    Raises:
        TokenizerError: If it holds bytes that were not UTF-8, as Python keeps them.
    """
    if not _is_whole(text):
        raise TokenizerError(f"{source} is not UTF-8: write it in UTF-8")
    return text


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
