"""Whether a completion keeps instructions that a program can verify, after IFEval (arXiv 2311.07911).

Reference: `instructions`, a list of objects with a `kind` of `KINDS` and its arguments, such as
`{"kind": "words", "at_least": 50}`. The value is the share that is kept, and 0 for an empty completion, which would
keep every instruction to leave something out. No kind depends on a language.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from transom.training.rewards.reward import Score
from transom.wording import listed

_SENTENCE_END = re.compile("[.!?\\u2026]+(?=\\s|$)|[\\u3002\\uff01\\uff1f]+")
"""The second half is Chinese and Japanese, where no space follows."""

_BULLET = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+\S", re.MULTILINE)
_FENCED = re.compile(r"```[^\n`]*\n(.*)```", re.DOTALL)

Argument = tuple[type, bool]
"""What an argument must be, and whether it must be there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of instruction.

    Attributes:
        keeps: Whether a text keeps one; called with its arguments by name.
        arguments: By name.
    """

    keeps: Callable[..., bool]
    arguments: Mapping[str, Argument]


def _count(count: Callable[[str], int]) -> Kind:
    """At least, at most, or both."""

    def keeps(text: str, at_least: int = 0, at_most: float = float("inf")) -> bool:
        return at_least <= count(text) <= at_most

    return Kind(keeps=keeps, arguments={"at_least": (int, False), "at_most": (int, False)})


def _sentences(text: str) -> int:
    return sum(re.search(r"\w", part) is not None for part in _SENTENCE_END.split(text))


def _paragraphs(text: str) -> int:
    return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))


def _contains(text: str, texts: list[str]) -> bool:
    return all(part.casefold() in text.casefold() for part in texts)


def _excludes(text: str, texts: list[str]) -> bool:
    return not any(part.casefold() in text.casefold() for part in texts)


def _repeats(text: str, word: str, at_least: int = 0, at_most: float = float("inf")) -> bool:
    return at_least <= len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)) <= at_most


def _is_json(text: str) -> bool:
    """Alone, or as one fenced block."""
    fenced = _FENCED.fullmatch(text)
    try:
        json.loads(fenced[1] if fenced else text)
    # Brackets alone exhaust the parser.
    except (ValueError, RecursionError):
        return False
    return True


_TEXTS: Mapping[str, Argument] = {"texts": (list, True)}
_TEXT: Mapping[str, Argument] = {"text": (str, True)}

KINDS: Mapping[str, Kind] = {
    "words": _count(lambda text: len(text.split())),
    "sentences": _count(_sentences),
    "paragraphs": _count(_paragraphs),
    "bullets": _count(lambda text: len(_BULLET.findall(text))),
    "lines": _count(lambda text: sum(bool(line.strip()) for line in text.splitlines())),
    "characters": _count(len),
    "contains": Kind(keeps=_contains, arguments=_TEXTS),
    "excludes": Kind(keeps=_excludes, arguments=_TEXTS),
    "repeats": Kind(keeps=_repeats, arguments={"word": (str, True), "at_least": (int, False), "at_most": (int, False)}),
    "starts_with": Kind(keeps=lambda completion, text: completion.startswith(text), arguments=_TEXT),
    "ends_with": Kind(keeps=lambda completion, text: completion.endswith(text), arguments=_TEXT),
    "lower_case": Kind(keeps=str.islower, arguments={}),
    "upper_case": Kind(keeps=str.isupper, arguments={}),
    "json": Kind(keeps=_is_json, arguments={}),
    "one_of": Kind(keeps=lambda completion, texts: completion in texts, arguments=_TEXTS),
}
"""By name. Space at the ends of a completion counts for none of them."""


class Instructions:
    """The share of the instructions that a completion keeps."""

    def score(self, prompt: str, completion: str, reference: Mapping[str, Any]) -> Score:
        instructions = reference.get("instructions")
        if not isinstance(instructions, list) or not instructions:
            return Score(None, "the reference has no 'instructions', a list")
        for index, instruction in enumerate(instructions):
            if (broken := _broken(instruction)) is not None:
                return Score(None, f"the reference's instruction {index} {broken}")
        text = completion.strip()
        if not text:
            return Score(0.0, "the completion is empty")
        not_kept = []
        for instruction in instructions:
            arguments = {key: value for key, value in instruction.items() if key != "kind"}
            if not KINDS[instruction["kind"]].keeps(text, **arguments):
                not_kept.append(json.dumps(instruction, ensure_ascii=False))
        value = 1 - len(not_kept) / len(instructions)
        return Score(value, f"not kept: {listed(not_kept)}" if not_kept else "all are kept")


def _broken(instruction: Any) -> str | None:
    """What is wrong with an instruction; None if nothing is."""
    if not isinstance(instruction, dict) or instruction.get("kind") not in tuple(KINDS):
        return f"has no 'kind' of {', '.join(KINDS)}"
    kind = KINDS[instruction["kind"]]
    if unknown := sorted(instruction.keys() - kind.arguments.keys() - {"kind"}):
        return f"has arguments that its kind does not take: {listed(unknown)}"
    for name, (type_, needed) in kind.arguments.items():
        value = instruction.get(name)
        if value is None and not needed:
            continue
        if not isinstance(value, type_) or isinstance(value, bool) or (not value and type_ is not int):
            return f"has a {name!r} that is empty or of a wrong type"
        if isinstance(value, list) and not all(isinstance(item, str) and item for item in value):
            return f"has a {name!r} that holds something else than texts"
    if "at_least" in kind.arguments and not instruction.keys() & {"at_least", "at_most"}:
        return "needs 'at_least' or 'at_most'"
    return None


REWARD = Instructions
