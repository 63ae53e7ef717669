r"""Whether the final answer of a solution is the right number, exactly.

The final answer follows the last of `\boxed{`, `####` and "answer is" or "answer:"; without any, it is the whole
completion. Numbers are compared as fractions: 0.5, 1/2, \frac{1}{2} and 50% are equal, 0.333 and 1/3 are not. There is
no symbolic algebra: an answer that is not one number scores 0, and a reference that is not has no score.

Reference: `answer`, a number or its text. `unit` is a further word that may follow the number, such as "apples".
`percent`: true says that a number without a sign is a percentage too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from transom.training.rewards.reward import Score
from transom.wording import shortened

UNITS = {
    "mm": ("millimeter", "millimeters", "millimetre", "millimetres"),
    "cm": ("centimeter", "centimeters", "centimetre", "centimetres"),
    "m": ("meter", "meters", "metre", "metres"),
    "km": ("kilometer", "kilometers", "kilometre", "kilometres"),
    "inch": ("in", "inches"),
    "ft": ("foot", "feet"),
    "yd": ("yard", "yards"),
    "mi": ("mile", "miles"),
    "mg": ("milligram", "milligrams"),
    "g": ("gram", "grams"),
    "kg": ("kilogram", "kilograms"),
    "lb": ("lbs", "pound", "pounds"),
    "oz": ("ounce", "ounces"),
    "ml": ("milliliter", "milliliters", "millilitre", "millilitres"),
    "l": ("liter", "liters", "litre", "litres"),
    "s": ("sec", "second", "seconds"),
    "min": ("minute", "minutes"),
    "h": ("hr", "hrs", "hour", "hours"),
    "day": ("days",),
    "week": ("weeks",),
    "month": ("months",),
    "year": ("years",),
    "°": ("degree", "degrees"),
    "rad": ("radian", "radians"),
    "km/h": ("kph", "kmh"),
    "mph": ("miles per hour",),
    "m/s": ("meters per second", "metres per second"),
    "unit": ("units",),
    "$": ("dollar", "dollars", "usd"),
    "€": ("euro", "euros", "eur"),
    "£": ("gbp",),
    "¥": ("yen", "jpy"),
    "₹": ("rupee", "rupees", "inr"),
    "¢": ("cent", "cents"),
}
"""Units that may stand beside a number, with other spellings; each may carry an exponent 2 or 3."""

_LONGEST = 500
"""Characters of an answer. Digits and exponents are bounded too: a fraction of 10 ** 999999999 would fill memory."""

_SPELLINGS = {spelling: unit for unit, others in UNITS.items() for spelling in (unit, *others)}
_MARKER = re.compile(r"\\boxed\s*\{|\\fbox\s*\{|####|\banswer\s*(?:is\b|[:=])\s*[:=]?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!](?=\s|$)")
_DROPPED = re.compile(r"\\[,!;: ()\[\]]|\\(?:left|right|displaystyle)(?![a-z])|\*\*|`|\\$")
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?:(?P<whole>{_INTEGER})(?:\s*(?=\\frac)|\s+(?:and\s+)?))?"
    rf"(?:\\frac\s*(?:\{{\s*(?P<top>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>-?{_DECIMAL})\s*\}}|(?P<t>\d)\s*(?P<b>\d))"
    rf"|(?P<over>{_DECIMAL})\s*/\s*(?P<under>-?{_DECIMAL}))"
    rf"|(?P<decimal>{_DECIMAL})(?:(?:e|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*)\{{?(?P<exponent>[+-]?\d{{1,3}})\}}?)?",
    re.IGNORECASE,
)
_EXPONENT = re.compile(r"\s*(?:\^\s*\{?\s*([23])\s*\}?|([²³]))$")


class Number(NamedTuple):
    """A number and the canonical unit beside it, with its exponent; None without one."""

    value: Fraction
    unit: str | None
    percent: bool


def final_answer(completion: str) -> str | None:
    """The text after the last marker, or all of it; None if a box is not closed."""
    markers = list(_MARKER.finditer(completion))
    if not markers:
        return completion.strip()
    marker = markers[-1]
    rest = completion[marker.end() :]
    if not marker[0].endswith("{"):
        return _SENTENCE_END.split(rest.strip(), maxsplit=1)[0].strip()
    depth = 1
    for index, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:index].strip()
    return None


def parse(text: str, unit: str | None = None) -> Number | None:
    """The one number that a text is; None if it is anything else, or longer than any number need be.

    Args:
        text: With or without LaTeX, a unit, a currency, a percent sign.
        unit: A further word that may follow.
    """
    if len(text) > _LONGEST:
        return None
    text = (
        text.replace("\N{MINUS SIGN}", "-")
        .replace("\N{EN DASH}", "-")
        .replace("\N{MULTIPLICATION SIGN}", "\\times ")
        .replace("\N{NO-BREAK SPACE}", " ")
        .replace("{,}", ",")
    )
    text = text.replace("\\%", "%").replace("\\$", "$").replace("~", " ")
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text))
    text = _WRAPPED.sub(r" \1", _DROPPED.sub("", text)).strip().rstrip(".").strip()
    # A formula's dollars stand on both sides; a currency's on one.
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    text = re.sub(r"^[A-Za-z]\s*=\s*", "", text)
    units = []
    negative = text.startswith("-")
    text = text[1:].lstrip() if negative or text.startswith("+") else text
    if text[:1] in ("$", "€", "£", "¥", "₹"):
        units.append(text[0])
        text = text[1:].lstrip()
        if text.startswith("-") and not negative:
            negative, text = True, text[1:].lstrip()
    match = _NUMBER.match(text)
    if match is None:
        return None
    value = _fraction(match)
    if value is None:
        return None
    rest = text[match.end() :].strip()
    percent = rest == "%" or rest.lower() in ("percent", "per cent")
    if rest and not percent and not (unit is not None and rest.lower() == unit.lower()):
        power = _EXPONENT.search(rest)
        name = rest[: power.start()] if power is not None else rest
        known = _SPELLINGS.get(name.strip().lower())
        if known is None:
            return None
        exponent = "" if power is None else {"²": "2", "³": "3"}.get(power[2], power[1])
        units.append(known + exponent)
    if len(set(units)) > 1:
        return None
    value = value / 100 if percent else value
    return Number(-value if negative else value, units[0] if units else None, percent)


def _fraction(match: re.Match[str]) -> Fraction | None:
    if match["decimal"] is not None:
        return Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    top, bottom = (
        Fraction(part.replace(",", ""))
        for part in (match["top"] or match["over"] or match["t"], match["bottom"] or match["under"] or match["b"])
    )
    if bottom == 0:
        return None
    value = top / bottom
    if match["whole"] is None:
        return value
    # 3 7/2 is no mixed number, but two numbers side by side.
    return Fraction(match["whole"].replace(",", "")) + value if 0 <= value < 1 else None


class Mathematics:
    """1 for the right final answer, 0 for any other."""

    def score(self, prompt: str, completion: str, reference: Mapping[str, Any]) -> Score:
        answer, unit = reference.get("answer"), reference.get("unit")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            return Score(None, "the reference has no 'answer' that is a number or a text")
        expected = parse(str(answer), unit)
        if expected is None:
            return Score(None, f"the reference's answer {shortened(str(answer))!r} is not one number")
        text = final_answer(completion)
        if text is None:
            return Score(0.0, "the last box is not closed")
        actual = parse(text, unit)
        if actual is None:
            return Score(0.0, f"the final answer {shortened(text)!r} is not one number")
        if None not in (actual.unit, expected.unit) and actual.unit != expected.unit:
            return Score(0.0, f"the unit is {actual.unit}, not {expected.unit}")
        in_percent = reference.get("percent") is True
        left, right = (
            number.value / 100 if in_percent and not number.percent else number.value for number in (actual, expected)
        )
        equal = left == right
        return Score(float(equal), "right" if equal else f"{shortened(text)!r} is not {shortened(str(answer))!r}")


REWARD = Mathematics
