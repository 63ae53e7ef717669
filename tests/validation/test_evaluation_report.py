"""The plots and the page of an evaluation: every scheme is there, names stand apart, the front is the known one."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tests.validation.test_report import Page
from transom.validation.evaluation.axis import Axis
from transom.validation.evaluation.report import render, render_plot, scatters
from transom.validation.evaluation.result import Estimate, Evaluation, Row

SVG = "{http://www.w3.org/2000/svg}"


def row(name: str, target: str, size: int, loss: float, decode: float | None) -> Row:
    return Row(
        name=name,
        target=target,
        scheme=name.split()[-1],
        dtype="float32",
        folder=None,
        weights={"name": "a", "revision": "b"},
        bytes=size,
        bytes_per_weight=size / 1e6,
        loss=Estimate(mean=loss, error=0.05),
        loss_difference=Estimate(mean=loss - 2.5, error=0.005),
        kl=Estimate(mean=0.01, error=0.001),
        top1_agreement=0.9,
        prefill=decode and decode * 9,
        decode=decode,
        seconds=1.0,
    )


@pytest.fixture
def found() -> Evaluation:
    """Two targets; int8 and int4 of ort close together, wild of xla far off, and one that gave no number."""
    return Evaluation(
        model="m <1>",
        parameters=10**6,
        source={"name": "a", "revision": "b"},
        oracle="the model",
        text={"source": "t & u", "tokens": 9, "sequences": 2, "length": 4, "scored": 6, "sha256": "00"},
        speed={"prefill_tokens": 3, "decode_tokens": 1, "repeats": 3, "threads": 2, "machine": "a CPU"},
        rows=(
            row("plain module", "plain module", 4_000_000, 2.5, None),
            row("ort none", "ort", 4_000_000, 2.5, 20.0),
            row("ort int8", "ort", 1_000_000, 2.51, 70.0),
            row("ort int4", "ort", 990_000, 2.512, 70.5),
            row("xla wild", "xla", 900_000, 6.0, 10.0),
            row("xla broken", "xla", 800_000, math.nan, 90.0),
        ),
        not_run={"tvm int8": "pip install <it>"},
        versions={"python": "3"},
        date="2030-01-01T00:00:00+00:00",
    )


def test_the_page(found: Evaluation) -> None:
    html = render(found)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=|\bhref=|<script|<link|<iframe", html)
    page = Page(re.sub(r"<(circle|path|polyline|line)\b[^>]*/>", "", html))
    assert page.open == [] and "pip install <it>" in page.text and "m <1>" in page.text
    for measured in found.rows:
        assert f'<th scope="row">{measured.name}</th>' in html
    # Of the artifact that gave no number, the KL of `row` is one all the same.
    assert page.text.count("nan ± nan") == 1
    assert sum(attrs.get("role") == "img" for tag, attrs in page.tags if tag == "svg") == 2


def test_the_file_stands_alone(found: Evaluation) -> None:
    svg = render_plot(found)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and "var(" not in svg and not re.search(r'="[^"]*\b(nan|inf)\b', svg)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for name in ("none", "int8", "int4", "wild"):
        assert texts.count(name) == 2
    assert "broken" not in texts and texts.count("unquantised, plain module: 12.182") == 2
    # Four points each, and two of a legend that tells the targets' colours.
    assert len(list(root.iter(f"{SVG}circle"))) == 2 * (4 + 2)


def test_fronts_are_steps(found: Evaluation) -> None:
    size, speed = scatters(found)
    assert [point.name for point in size.points if point.on_front] == ["none", "int8", "int4", "wild"]
    assert [point.name for point in speed.points if point.on_front] == ["none", "int8", "int4"]
    lines = ElementTree.fromstring(render_plot(found)).iter(f"{SVG}polyline")
    for line, steps in zip(lines, (3, 2), strict=True):
        corners = [tuple(map(float, corner.split(","))) for corner in line.attrib["points"].split()]
        assert len(corners) == 2 * steps + 1
        for (x1, y1), (x2, y2) in itertools.pairwise(corners):
            assert x1 == x2 or y1 == y2


def test_an_axis_holds_its_values_and_has_round_ticks() -> None:
    for values in ([12.1, 12.2, 13.0], [12.0, 40.0, 90_000.0], [5.0], [], [0.0, 0.0], [math.nan, 3.0, 4.0]):
        axis = Axis.of(values)
        for value in values:
            if math.isfinite(value):
                assert 0 <= axis.share(value) <= 1
        ticks = axis.ticks()
        assert len(ticks) >= 2
        for value, label in ticks:
            assert axis.low <= value <= axis.high and float(label.replace(",", "")) == pytest.approx(value, abs=1e-9)
    assert Axis.of([1.0, 5.0]).logarithmic and not Axis.of([1.0, 3.0]).logarithmic
