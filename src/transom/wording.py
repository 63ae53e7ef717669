"""How errors show values and lists. Needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Collection

_WIDTH = 80


def listed(names: Collection[object], limit: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(map(str, itertools.islice(names, limit))) + more


def shortened(text: str, width: int = _WIDTH) -> str:
    """A text of at most `width` characters, with dots where it was cut."""
    return text if len(text) <= width else f"{text[: width - 3]}..."
