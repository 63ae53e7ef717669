"""The plots and the page of an evaluation: every scheme is there, names stand apart, the front is the known one."""

from __future__ import annotations

import dataclasses
import math
import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.conftest import Cli
from tests.validation.test_report import LOADS, NO_NUMBER, Page
from transom.errors import PlotError
from transom.validation.charts import Point, embed, scatter_plot
from transom.validation.evaluation.report import points, position_table, render, render_plot
from transom.validation.evaluation.result import Bucket, Estimate, Evaluation, Row, buckets

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
        by_position=(
            Bucket(start=0, stop=512, tokens=5, loss=Estimate(mean=loss + 0.5, error=0.1)),
            Bucket(start=512, stop=1024, tokens=1, loss=Estimate(mean=loss - 0.5, error=math.nan)),
        ),
        loss_difference=Estimate(mean=loss - 2.5, error=0.005),
        kl=Estimate(mean=0.01, error=0.001),
        top1_agreement=0.9,
        prefill=decode and decode * 9,
        decode=decode,
        seconds=1.0,
    )


@pytest.fixture
def evaluation() -> Evaluation:
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


def test_buckets_double() -> None:
    """A loss stands in the bucket of the token that it is of; the first token has none."""
    long, short = np.arange(1, 2049, dtype=np.float64), np.arange(1, 513, dtype=np.float64)
    parts = buckets([long, short])
    assert [(part.start, part.stop, part.tokens) for part in parts] == [
        (0, 512, 1022), (512, 1024, 513), (1024, 2048, 1024), (2048, 4096, 1),
    ]  # fmt: skip
    assert parts[0].loss.mean == 256 and parts[2].loss.mean == (1024 + 2047) / 2 and parts[3].loss.mean == 2048
    assert math.isnan(parts[3].loss.error) and parts[2].title == "1,024-2,048"
    assert [part.tokens for part in buckets([short[:511]])] == [511]


def test_perplexity_by_position(evaluation: Evaluation) -> None:
    header, rows = position_table(evaluation)
    assert header == ("scheme", "0-512", "512-1,024") and len(rows) == len(evaluation.rows)
    assert rows[1] == ("ort none", f"{math.exp(3.0):.3f}", f"{math.exp(2.0):.3f}")
    assert "Perplexity by position" in render(evaluation)
    data = evaluation.to_json()["rows"][0]["by_position"]
    assert data[1] == {
        "start": 512, "stop": 1024, "tokens": 1, "perplexity": math.exp(2.0), "loss": 2.0, "loss_error": None,
    }  # fmt: skip
    one = [dataclasses.replace(row, by_position=row.by_position[:1]) for row in evaluation.rows]
    assert "Perplexity by position" not in render(dataclasses.replace(evaluation, rows=tuple(one)))


def test_the_page(evaluation: Evaluation) -> None:
    html = render(evaluation)
    assert not LOADS.search(html)
    page = Page(html)
    assert page.open == [] and "pip install <it>" in page.text and "m <1>" in page.text
    for measured in evaluation.rows:
        assert f'<th scope="row">{measured.name}</th>' in html
    # Of the artifact that gave no number, the KL of `row` is one all the same.
    assert page.text.count("nan ± nan") == 1
    assert sum(attrs.get("role") == "img" for tag, attrs in page.tags if tag == "svg") == 2


def test_the_file_stands_alone(evaluation: Evaluation) -> None:
    svg = render_plot(evaluation, "svg").decode()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and "var(" not in svg and not NO_NUMBER.search(svg)
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    for name in ("none", "int8", "int4", "wild", "ort", "xla"):
        assert texts.count(name) == 2
    assert "broken" not in texts and texts.count("unquantised, plain module: 12.182") == 2
    assert "MB on disk, ← better" in texts and "tokens decoded a second, better →" in texts
    assert svg == render_plot(evaluation, "svg").decode(), "the same data give the same bytes"


def test_a_file_of_pixels(evaluation: Evaluation) -> None:
    png = render_plot(evaluation, "png")
    assert png.startswith(b"\x89PNG") and min(struct.unpack(">II", png[16:24])) > 1000
    assert png == render_plot(evaluation, "png")


def test_fronts(evaluation: Evaluation) -> None:
    on_front = [[point.name for point in points(evaluation, axis) if point.on_front] for axis in ("bytes", "decode")]
    assert on_front == [["none", "int8", "int4", "wild"], ["none", "int8", "int4"]]


@pytest.mark.parametrize("better", ["less", "more"])
def test_a_front_goes_in_steps(better: Literal["less", "more"]) -> None:
    """Between two schemes nothing can be had: the corner is the worse of both in each respect."""
    front_points = [
        Point(name="a", x=1.0, y=3.0 if better == "less" else 2.0, error=0.1, style=0, on_front=True),
        Point(name="b", x=2.0, y=2.0 if better == "less" else 3.0, error=0.1, style=0, on_front=True),
    ]
    axes = Figure().subplots()
    scatter_plot(title="t", x_label="x", better=better, points=front_points, level=(math.nan, ""))(axes)
    (front,) = [line for line in axes.lines if line.get_drawstyle() != "default"]
    corners = front.get_transform().transform_path(front.get_path())
    xs, ys = zip(*axes.transData.inverted().transform(corners.vertices), strict=True)
    assert front.get_drawstyle() == ("steps-post" if better == "less" else "steps-pre")
    assert {round(x, 6) for x in xs} == {1, 2} and {round(y, 6) for y in ys} == {2, 3}


def test_names_stand_apart() -> None:
    """Eight schemes that are nearly one."""
    names = [f"scheme {index}" for index in range(8)]
    close = [
        Point(name=name, x=5 + index / 100, y=7 + index / 1e3, error=0.0, style=0, on_front=False)
        for index, name in enumerate(names)
    ]
    axes = Figure().subplots()
    scatter_plot(title="t", x_label="x", better="less", points=close, level=(7.0, "level"))(axes)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 9
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])


def test_a_plot_of_no_points() -> None:
    svg = embed("t", scatter_plot(title="t", x_label="x", better="less", points=[], level=(math.nan, "level")))
    assert Page(svg).open == [] and not NO_NUMBER.search(svg) and "level" not in svg


def test_without_matplotlib(evaluation: Evaluation, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says it before it measures anything; a page says it in the place of its plots."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'transom\[plots\]'"):
        render_plot(evaluation, "svg")
    assert Page(render(evaluation)).text.count("pip install 'transom[plots]'") == 2
    (tmp_path / "t.txt").write_text("Some text.")
    plot = tmp_path / "e.svg"
    code, out, err = cli("evaluate", "gemma3-tiny", "--text", tmp_path / "t.txt", "--plot", plot)
    assert code == 2 and out == "" and "transom[plots]" in err and err.count("\n") == 1 and not plot.exists()
