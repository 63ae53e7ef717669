"""The report: one file that loads nothing, and shows every target, verdict and plot."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.validation.conftest import TARGETS
from transom.validation.charts import Series, embed, line_plot, thinned
from transom.validation.report import render
from transom.validation.result import Validation

VOID = {"meta", "line", "polyline", "br"}


LOADS = re.compile(r"https?:|//[a-z]|url\((?!#)|@import|\bsrc=|\bhref=(?!\"#)|<script|<link|<iframe")
"""What would load something; a reference within the page starts with #."""


NO_NUMBER = re.compile(r'"[^"]*\b(nan|inf)\b[^"]*"')
"""A coordinate that is none."""


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
    assert not LOADS.search(html)
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
    lines = [attrs["style"] or "" for tag, attrs in page.tags if tag == "path" and "var(--series-" in str(attrs)]
    colours = [re.findall(r"--series-\d", style) for style in lines]
    # Three targets by position; two by layer, for the reference is what they are held against. Each is in its legend.
    assert [len({*map(tuple, part)}) for part in (colours[:6], colours[6:])] == [3, 2]
    assert {*map(tuple, colours[6:])} < {*map(tuple, colours[:6])}
    dashes = {re.sub(r".*(dasharray: [^;]*).*|.*", r"\1", style) for style in lines[:3]}
    assert len(dashes) == 3, "colour is not the only difference"
    for words in ("window 16", "2W", "ring of 39 wraps", "allowed", *TARGETS):
        assert words in page.text
    pictures = re.findall(r'<svg viewBox="[^"]*" role="img">\s*<title>([^<]+)', html)
    assert [title.split(",")[0] for title in pictures] == ["Difference by position", "Difference by layer"]
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert ids and len(set(ids)) == len(ids)


def test_a_failure_comes_first(good: tuple[Validation, Path]) -> None:
    validation = good[0]
    result = validation.targets["onnx"]
    runs = tuple(dataclasses.replace(run, max_abs=float("nan"), max_rel=float("nan")) for run in result.lengths)
    broken = dataclasses.replace(
        result, lengths=runs, failures=("a prompt of 17: <b>&",), first_divergence=3, by_position=(float("nan"),) * 67
    )
    html = render(
        dataclasses.replace(
            validation, targets={**validation.targets, "onnx": broken}, not_run={"tvm": "pip install <it>"}
        )
    )
    page = Page(html)
    assert "Validation failed" in page.text and "1 failed" in page.text
    assert page.text.index("a prompt of 17: <b>&") < page.text.index("Difference by position")
    assert "not a number" in page.text and "token 3" in page.text and "pip install <it>" in page.text
    assert not NO_NUMBER.search(html)


def test_thinning_keeps_peaks() -> None:
    values = [0.0] * 1000
    values[777] = 5.0
    points = thinned(values, bins=100)
    assert len(points) == 100 and (777.0, 5.0) in points
    values[778] = float("nan")
    assert any(y != y for _, y in thinned(values, bins=100))
    assert thinned([1.0, 2.0]) == [(0.0, 1.0), (1.0, 2.0)]


def test_a_plot_of_zeros_and_of_one_point() -> None:
    for points in ([(0.0, 0.0), (1.0, 0.0)], [(3.0, 1e-5)], [(0.0, math.nan), (1.0, math.inf)], []):
        svg = embed("a <b>", line_plot(x_label="x", y_label="y", series=[Series(name="s & t$", points=points)]))
        assert Page(svg).open == [] and "a &lt;b&gt;" in svg and "s &amp; t$" in svg
        assert not NO_NUMBER.search(svg)


def test_without_matplotlib_a_page_says_how_to_get_the_plots(
    good: tuple[Validation, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(render(good[0]))
    assert page.open == [] and "Validation passed" in page.text
    assert page.text.count("pip install 'transom[plots]'") == 2 and "svg" not in {tag for tag, _ in page.tags}


def test_the_command_writes_it(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli(
        "validate", "gemma3-tiny", "--targets", "reference", "--no-layers", "--html", tmp_path / "v.html"
    )
    assert code == 0, out + err
    assert "Validation passed" in (tmp_path / "v.html").read_text()
