"""Range tracing over a text, and `transom ranges`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import transom
from transom.cli import app
from transom.errors import ConfigError, ContextLengthError, TokenizerError
from transom.export.ranges import Ranges
from transom.formats.number_format import FORMATS
from transom.validation import ranges as module
from transom.zoo.model import Model


@pytest.fixture(scope="module")
def tiny_ranges(tiny: Model) -> Ranges:
    return transom.ranges(tiny, tokens=50)


def test_every_value_is_named_with_its_layer(tiny_ranges: Ranges) -> None:
    values = {value.name: value for value in tiny_ranges.values}
    assert len(values) == len(tiny_ranges.values)
    assert (values["layers.3.mlp.mul"].layer, values["layers.3.mlp.mul"].op) == (3, "mul")
    assert (values["layers.3.add.2"].op, values["linear"].layer) == ("add", None)
    assert values["layers.3.mlp.mul"].observation.count == 50 * 96
    assert values["linear"].observation.count == 50 * 512
    weight = values["layers.0.mlp.up_proj.weight"]
    assert (weight.op, weight.observation.count) == ("weight", 64 * 96)


def test_headroom_and_underflow(tiny_ranges: Ranges, tiny: Model) -> None:
    values = {value.name: value for value in tiny_ranges.values}
    largest = float(tiny.weights["layers.0.mlp.up_proj.weight"].read().abs().max())
    weight = values["layers.0.mlp.up_proj.weight"]
    assert 2 ** weight.headroom(FORMATS["float16"]) == pytest.approx(65_504 / largest)
    data = tiny_ranges.to_json(FORMATS["float8_e4m3fn"])
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["in_range"] and data["overflowing"] == []
    shares = {row["name"]: row["underflow_share"] for row in data["values"]}
    exact = float((tiny.weights["layers.0.mlp.up_proj.weight"].read().float().abs() < 2.0**-10).float().mean())
    assert shares["layers.0.mlp.up_proj.weight"] == pytest.approx(exact, abs=1e-6)


def test_bad_input(tiny: Model, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(TokenizerError, match="holds no text"):
        transom.ranges(tiny, text=empty)
    with pytest.raises(ContextLengthError, match="513 tokens do not fit"):
        transom.ranges(tiny, tokens=513)


def test_the_command(tiny_ranges: Ranges, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 in range, 1 out of it; one traced model serves all."""
    traced = {"ranges": tiny_ranges}
    monkeypatch.setattr(module, "ranges_of", lambda model, **options: traced["ranges"])
    run = CliRunner().invoke
    inside = run(app, ["ranges", "gemma3-tiny"])
    assert inside.exit_code == 0 and "everything is in the range of float16" in inside.stdout
    largest = next(value for value in tiny_ranges.values if value.name == "layers.2.add.2")
    moved = dataclasses.replace(largest.observation, maximum=70_000.0)
    values = tuple(dataclasses.replace(v, observation=moved) if v is largest else v for v in tiny_ranges.values)
    traced["ranges"] = dataclasses.replace(tiny_ranges, values=values)
    outside = run(app, ["ranges", "gemma3-tiny"])
    assert outside.exit_code == 1 and "layers.2.add.2 reaches 7e+04" in outside.stdout
    data = run(app, ["ranges", "gemma3-tiny", "--json"])
    assert data.exit_code == 1 and json.loads(data.stdout)["overflowing"] == ["layers.2.add.2"]
    assert run(app, ["ranges", "gemma3-tiny", "--dtype", "bfloat16"]).exit_code == 0


def test_the_command_traces(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words")
    result = CliRunner().invoke(app, ["ranges", "gemma3-tiny", "--text", str(text), "--tokens", "20", "--json"])
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert (data["model"], data["format"], data["tokens"]) == ("gemma3-tiny", "float16", 20)


def test_an_unknown_format_is_refused_at_once() -> None:
    result = CliRunner().invoke(app, ["ranges", "gemma3-tiny", "--dtype", "float12"])
    assert isinstance(result.exception, ConfigError)


def test_what_float32_cannot_hold_is_out_of_every_range(tiny_ranges: Ranges) -> None:
    value = tiny_ranges.values[0]
    counts = value.observation.counts.copy()
    counts[-1] = 1  # a negative NaN
    broken = dataclasses.replace(value, observation=dataclasses.replace(value.observation, counts=counts))
    assert broken.overflows(FORMATS["bfloat16"]) and not value.overflows(FORMATS["bfloat16"])
    infinite = dataclasses.replace(tiny_ranges, values=(broken,))
    assert infinite.largest() == {value.name: float("inf")}
