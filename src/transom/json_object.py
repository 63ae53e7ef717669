"""Reads JSON whose outermost value is an object. Needs no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transom.errors import ConfigError, TransomError


def is_file(path: Path, error: type[TransomError] = ConfigError) -> bool:
    """Whether a file of that name is there. Something else of that name, such as a link to nowhere, raises `error`."""
    if path.is_file():
        return True
    if os.path.lexists(path):
        kind = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "no file"
        raise error(f"{path}: {kind}: fetch it again, or remove it")
    return False


def read_object(
    path: Path, error: type[TransomError] = ConfigError, mend: str = "fetch it again"
) -> dict[str, Any] | None:
    """A file's object; None if there is no such file.

    Args:
        path: The file. A byte order mark at its head is no part of it.
        error: Raised if the file cannot be read, is no JSON, or holds something else than an object.
        mend: What to do about it.
    """
    if not is_file(path, error):
        return None
    try:
        data = path.read_bytes()
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or reason}): {mend}") from reason
    return parse_object(data, str(path), error, mend)


def parse_object(data: bytes, what: str, error: type[TransomError], mend: str) -> dict[str, Any]:
    """The object that stands in some bytes; as `read_object`, with `what` to call them by in errors."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as reason:
        raise error(
            f"{what}: not UTF-8 (byte 0x{data[reason.start]:02x} at {reason.start}): save it as UTF-8"
        ) from reason
    # Brackets alone exhaust the parser.
    except (ValueError, RecursionError) as reason:
        raise error(f"{what}: not readable as JSON ({reason}): {mend}") from reason
    if not isinstance(value, dict):
        raise error(f"{what}: must hold a JSON object, got {type(value).__name__}: {mend}")
    return value
