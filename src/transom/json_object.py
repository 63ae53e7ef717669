"""Reads JSON whose outermost value is an object. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transom.errors import ConfigError, TransomError


def read_object(
    path: Path, error: type[TransomError] = ConfigError, mend: str = "fetch it again"
) -> dict[str, Any] | None:
    """A file's object; None if there is no such file.

    Args:
        path: The file. A byte order mark at its head is no part of it.
        error: Raised if the file cannot be read, is no JSON, or holds something else than an object.
        mend: What to do about it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or reason}): {mend}") from reason
    return parse_object(data, str(path), error, mend)


def parse_object(data: bytes, what: str, error: type[TransomError], mend: str) -> dict[str, Any]:
    """The object that stands in some bytes; as `read_object`, with `what` to call them by in errors."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    # Brackets alone exhaust the parser.
    except (ValueError, RecursionError) as reason:
        raise error(f"{what}: not readable as JSON ({reason}): {mend}") from reason
    if not isinstance(value, dict):
        raise error(f"{what}: must hold a JSON object, got {type(value).__name__}: {mend}")
    return value
