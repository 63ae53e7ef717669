"""Final answers of solutions, exactly."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transom.training.rewards.mathematics import Mathematics, final_answer, parse


def value(completion: str, answer: Any, **more: Any) -> float | None:
    return Mathematics().score("", completion, {"answer": answer, **more}).value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "42"), ("+42", "42"), ("-7", "-7"), ("\N{MINUS SIGN}7", "-7"), ("007", "7"), ("12.", "12"),
        (".5", "1/2"), ("0.50", "1/2"), ("1/2", "1/2"), ("2/4", "1/2"), ("-1/2", "-1/2"), ("0.333", "333/1000"),
        (r"\frac{1}{2}", "1/2"), (r"\dfrac12", "1/2"), (r"-\frac{1}{2}", "-1/2"), (r"\frac{-1}{2}", "-1/2"),
        (r"\frac{1.5}{3}", "1/2"), ("1 1/2", "3/2"), ("1 and 1/2", "3/2"), (r"1\frac{1}{2}", "3/2"), ("-2 1/4", "-9/4"),
        ("1,234", "1234"), ("1,234,567.5", "2469135/2"), (r"1{,}234", "1234"), (r"10\,000", "10000"),
        ("50%", "1/2"), (r"12.5\%", "1/8"), ("50 percent", "1/2"), ("1e3", "1000"), (r"3 \times 10^{2}", "300"),
        ("$18", "18"), (r"\$18.50", "37/2"), ("-$5", "-5"), ("$-5", "-5"), ("€ 5", "5"), ("18 dollars", "18"),
        ("$18$", "18"), ("$$18$$", "18"), (r"\(18\)", "18"), ("x = 5", "5"), ("**5**", "5"),
        ("5 km", "5"), (r"5\text{ cm}^2", "5"), ("5 m²", "5"), (r"90^\circ", "90"), ("60 miles per hour", "60"),
    ],
)  # fmt: skip
def test_numbers(text: str, expected: str) -> None:
    number = parse(text)
    assert number is not None and number.value == Fraction(expected)


@pytest.mark.parametrize(
    "text",
    ["", "five", "1,2", "1,23", "1 2", "3 and 4", "3, 4", "5 or 6", "[5]", "{5}", "1/0", "--5", "3 7/2", "5 apples",
     "1e9999", "5 km m", "nan", "inf", "2+3", "x", "9" * 501, "1/2/3", "1.2.3", "$5 km"],
)  # fmt: skip
def test_anything_else_is_no_number(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("  42 \n", "42"),
        ("Tried 3.\nThe answer is 42. It was easy.", "42"),
        ("The final answer is: $42$.", "$42$"),
        ("Answer: 1.5\nDone", "1.5"),
        ("2 + 2 = 4\n#### 4", "4"),
        (r"So \boxed{7}. No: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{5} but the answer is 6", "6"),
        (r"The answer is \boxed{\text{{6}}}", r"\text{{6}}"),
        (r"\boxed{\frac{1}{2}", None),
    ],
)
def test_the_last_marker_counts(completion: str, expected: str | None) -> None:
    assert final_answer(completion) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (r"\boxed{0.5}", "1/2", 1.0),
        ("#### 1,000", 1000, 1.0),
        ("#### 0.333", "1/3", 0.0),
        ("0.1", 0.1, 1.0),
        (r"\boxed{1}\boxed{2}\boxed{3}", "1", 0.0),
        (r"\boxed{1, 2, 3}", "2", 0.0),
        ("The answer is 2 or 3.", "2", 0.0),
        ("1 2 3 4 5", "4", 0.0),
        ("I have worked out 42 with care", "42", 0.0),
        ("5 km", "5", 1.0),
        ("5 km", "5 m", 0.0),
        ("5 kilometers", "5 km", 1.0),
        ("5 m^2", "5 m", 0.0),
        ("", "0", 0.0),
    ],
)
def test_scores(completion: str, answer: Any, expected: float) -> None:
    assert value(completion, answer) == expected


def test_what_the_reference_may_add() -> None:
    assert value("5 apples", "5", unit="apples") == 1.0
    assert value("5 pears", "5", unit="apples") == 0.0
    assert value("50", "50%") == 0.0
    assert value("50", "50%", percent=True) == value("50%", 50, percent=True) == 1.0


@pytest.mark.parametrize("answer", [None, True, "x + 1", "", [1], "1,2"])
def test_a_reference_that_is_no_number_gives_no_score(answer: Any) -> None:
    score = Mathematics().score("", "1", {"answer": answer})
    assert score.value is None and "the reference" in score.reason


@given(st.fractions())
def test_every_fraction_is_itself(fraction: Fraction) -> None:
    assert value(rf"\boxed{{{fraction}}}", str(fraction)) == 1.0
    assert value(str(fraction + 1), str(fraction)) == 0.0


@given(st.text())
def test_no_text_is_an_error(text: str) -> None:
    assert value(text, "1.25") in (0.0, 1.0)


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 20_000, "answer is " * 20_000, "$" * 100_000, "1," * 50_000, "\\frac" * 20_000]
)
def test_long_texts_are_no_work(text: str) -> None:
    """In a time that grew with the square of their length, they would be hours."""
    assert value(text, "1") == 0.0
