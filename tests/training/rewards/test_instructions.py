"""Instructions that a program verifies."""

from __future__ import annotations

from typing import Any

import pytest

from transom.training.rewards.instructions import KINDS, Instructions

EXAMPLES: list[tuple[dict[str, Any], str, str]] = [
    ({"kind": "words", "at_least": 2, "at_most": 3}, "one two three", "one"),
    ({"kind": "sentences", "at_most": 2}, "It is 3.5 km. Really!?", "A. B. C."),
    ({"kind": "sentences", "at_least": 2}, "\u4f60\u597d\u3002\u518d\u89c1\u3002", "Hello..."),
    ({"kind": "paragraphs", "at_least": 2}, "one\n\n\ntwo", "one\ntwo"),
    ({"kind": "bullets", "at_least": 2, "at_most": 2}, "List:\n- one\n  2. two", "- one\n--\n- two\n* three"),
    ({"kind": "lines", "at_most": 1}, "one", "one\ntwo"),
    ({"kind": "characters", "at_most": 3}, " abc ", "abcd"),
    ({"kind": "contains", "texts": ["Red", "blue"]}, "red and BLUE", "red"),
    ({"kind": "excludes", "texts": ["red", ","]}, "blue", "blue, green"),
    ({"kind": "repeats", "word": "tea", "at_least": 2}, "Tea, tea", "tea steam"),
    ({"kind": "starts_with", "text": "Dear"}, "\nDear me", "dear me"),
    ({"kind": "ends_with", "text": "Yours."}, "I am yours. Yours.\n", "Yours"),
    ({"kind": "lower_case"}, "it is 5.", "It is"),
    ({"kind": "upper_case"}, "IT IS 5.", "IT Is"),
    ({"kind": "json"}, "```json\n[1, 2]\n```", "[1, 2"),
    ({"kind": "json"}, '{"a": 1}', "Here: {}"),
    ({"kind": "json"}, "3", "[" * 100_000),
    ({"kind": "one_of", "texts": ["yes", "no"]}, "yes ", "yes and no"),
]


def test_every_kind_has_an_example() -> None:
    assert {instruction["kind"] for instruction, _, _ in EXAMPLES} == set(KINDS)


@pytest.mark.parametrize(("instruction", "kept", "broken"), EXAMPLES)
def test_kinds(instruction: dict[str, Any], kept: str, broken: str) -> None:
    reference = {"instructions": [instruction]}
    assert Instructions().score("", kept, reference).value == 1.0
    score = Instructions().score("", broken, reference)
    assert score.value == 0.0 and instruction["kind"] in score.reason


def test_the_value_is_the_share_kept() -> None:
    reference = {"instructions": [{"kind": "lower_case"}, {"kind": "json"}, {"kind": "words", "at_most": 9}]}
    assert Instructions().score("", "tea", reference).value == pytest.approx(2 / 3)


def test_nothing_keeps_nothing() -> None:
    reference = {"instructions": [{"kind": "excludes", "texts": ["red"]}, {"kind": "words", "at_most": 9}]}
    assert Instructions().score("", " \n", reference).value == 0.0


@pytest.mark.parametrize(
    "instructions",
    [
        None, [], ["json"], [{"kind": "poem"}], [{"kind": []}], [{"kind": "words"}],
        [{"kind": "words", "at_least": "3"}], [{"kind": "words", "at_least": True}], [{"kind": "words", "least": 3}],
        [{"kind": "contains"}], [{"kind": "contains", "texts": []}], [{"kind": "contains", "texts": [3]}],
        [{"kind": "starts_with", "text": ""}], [{"kind": "json"}, {"kind": "one_of", "texts": "yes"}],
    ],
)  # fmt: skip
def test_a_broken_reference_gives_no_score(instructions: Any) -> None:
    score = Instructions().score("", "text", {"instructions": instructions})
    assert score.value is None and "the reference" in score.reason


@pytest.mark.parametrize(
    "text", ["\n" * 200_000 + "x", " " * 200_000 + "x", ". " * 100_000, "x " * 100_000, "-\n" * 100_000]
)
def test_long_texts_end(text: str) -> None:
    """A squared time would be hours."""
    reference = {"instructions": [instruction for instruction, _, _ in EXAMPLES]}
    assert Instructions().score("", "x" + text, reference).value is not None
