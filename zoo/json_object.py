"""Reads a file that holds one JSON object. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transom.errors import ConfigError, TransomError


def read_object(path: Path, error: type[TransomError] = ConfigError) -> dict[str, Any] | None:
    """A file's object; None if there is no such file.

    Args:
        path: The file. A byte order mark at its head is no part of it.
        error: Raised if the file cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    # A file of brackets alone exhausts the parser.
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path}: not readable as JSON ({reason}): fetch it again") from reason
    if not isinstance(data, dict):
        raise error(f"{path}: must hold a JSON object, got {type(data).__name__}: fetch it again")
    return data
