"""The report: one file that loads nothing, and shows every target, verdict and plot."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.validation.conftest import TARGETS
from transom.validation.charts import Chart, Series, draw, thinned
from transom.validation.report import render
from transom.validation.result import Validation

VOID = {"meta", "line", "polyline", "br"}


class Page(HTMLParser):
    """Tags in order, the text, and whether tags close in the order in which they opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(good: tuple[Validation, Path]) -> str:
    return render(good[0])


def test_it_loads_nothing(html: str) -> None:
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=|\bhref=|<script|<link|<iframe", html)
    page = Page(html)
    assert page.open == []
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed"} == set()


def test_it_holds_every_target_and_length(html: str, good: tuple[Validation, Path]) -> None:
    page = Page(html)
    assert "Validation passed" in page.text
    sections = re.split(r"<h2>", html)
    for name in TARGETS:
        (section,) = [part for part in sections if part.startswith(f"{name}</h2>")]
        for run in good[0].targets[name].prefills:
            assert f'<th scope="row">{run.length}</th>' in section
        assert "12 to 19, one by one" in section and "rounding" not in section.split("Reason")[0]
        caches = good[0].targets[name].caches
        assert caches is not None and f"{caches.local:,}" in section


def test_the_plots(html: str) -> None:
    page = Page(html)
    lines = [attrs for tag, attrs in page.tags if tag == "polyline"]
    # Three targets by position; two by layer, for the reference is what they are held against.
    assert [len((line["points"] or "").split()) for line in lines] == [67, 67, 67, 8, 8]
    assert len({line["class"] for line in lines[:3]}) == 3
    assert [line["class"] for line in lines[3:]] == [line["class"] for line in lines[1:3]]
    assert len({line.get("stroke-dasharray") for line in lines[:3]}) == 3, "colour is not the only difference"
    for words in ("window 16", "2W", "ring of 39 wraps", "allowed"):
        assert words in page.text
    pictures = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(pictures) == 2
    assert all(f'id="{picture["aria-labelledby"]}"' in html for picture in pictures)
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_a_failure_comes_first(good: tuple[Validation, Path]) -> None:
    found = good[0]
    result = found.targets["onnx"]
    runs = tuple(dataclasses.replace(run, max_abs=float("nan"), max_rel=float("nan")) for run in result.lengths)
    broken = dataclasses.replace(
        result, lengths=runs, failures=("a prompt of 17: <b>&",), first_divergence=3, by_position=(float("nan"),) * 67
    )
    html = render(
        dataclasses.replace(found, targets={**found.targets, "onnx": broken}, not_run={"tvm": "pip install <it>"})
    )
    page = Page(html)
    assert "Validation failed" in page.text and "1 failed" in page.text
    assert page.text.index("a prompt of 17: <b>&") < page.text.index("Difference by position")
    assert "not a number" in page.text and "token 3" in page.text and "pip install <it>" in page.text
    assert not re.search(r'points="[^"]*(nan|inf)', html)


def test_thinning_keeps_peaks() -> None:
    values = [0.0] * 1000
    values[777] = 5.0
    points = thinned(values, bins=100)
    assert len(points) == 100 and (777.0, 5.0) in points
    values[778] = float("nan")
    assert any(y != y for _, y in thinned(values, bins=100))
    assert thinned([1.0, 2.0]) == [(0.0, 1.0), (1.0, 2.0)]


def test_a_chart_of_zeros_and_of_one_point() -> None:
    for points in ([(0.0, 0.0), (1.0, 0.0)], [(3.0, 1e-5)], []):
        svg = draw(
            Chart(key="k", title="a <b>", x_label="x", y_label="y", series=[Series(name="s & t", points=points)])
        )
        assert Page(svg).open == [] and "a &lt;b&gt;" in svg and "s &amp; t" in svg
        assert "nan" not in svg and "inf" not in svg


def test_the_command_writes_it(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli(
        "validate", "gemma3-tiny", "--targets", "reference", "--no-layers", "--html", tmp_path / "v.html"
    )
    assert code == 0, out + err
    assert "Validation passed" in (tmp_path / "v.html").read_text()
