"""Activations of 8-bit floats: measured, rounded alike on every target that takes them, refused by the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import transom
from tests.artifacts import CHUNK
from tests.case import Case
from tests.conftest import WINDOW
from transom.backends.reference.session import ReferenceSession
from transom.errors import TargetError
from transom.export.ranges import activation_scales
from transom.formats.number_format import float_format
from transom.formats.rounding import FLOAT8
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.passes.base import Pipeline
from transom.passes.pipelines import pipeline
from transom.passes.quantize_activations import QuantizeActivations
from transom.zoo.model import Model

QUANT = "fp8_activations"
E4M3 = float_format("float8_e4m3fn")


@pytest.fixture(scope="module")
def graph(traced: Graph) -> Graph:
    lowered, _ = pipeline("onnxruntime", chunk=CHUNK, scheme=scheme(QUANT)).run(traced)
    return lowered


@pytest.fixture(scope="module")
def scales(graph: Graph, text: list[int]) -> dict[str, float]:
    return activation_scales(graph, text, E4M3, context=512, chunk=CHUNK)


def test_the_body_rounds_as_torch_does() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 300
    rounded = ops.round_activations(x, 0.5, "float8_e4m3fn")
    assert torch.equal(rounded, (x / 0.5).clamp(-448, 448).to(FLOAT8).float() * 0.5)
    assert float(rounded.abs().max()) == 224, "clamped, where a bare cast gives NaN"
    with pytest.raises(ValueError, match="int8"):
        ops.round_activations(x, 1.0, "int8")


def test_every_linear_but_the_head_reads_rounded_numbers(graph: Graph, scales: dict[str, float]) -> None:
    case = Case(graph=graph, chunk=CHUNK).run(QuantizeActivations(lambda _: scales))
    linears = case.graph.calls(ops.LINEAR_QUANTIZED)
    assert [node.args[0].target is ops.ROUND_ACTIVATIONS for node in linears] == [True] * 24 + [False]
    case.expect_changes(24).settled()


def test_scales_fit_what_was_seen(scales: dict[str, float], graph: Graph) -> None:
    """None clips more than half of the largest number away, and none wastes more than the format has."""
    assert len(scales) == 25 and all(scale > 0 for scale in scales.values())
    rounded, _ = Pipeline([QuantizeActivations(lambda _: scales)]).run(graph)
    assert {node.args[1] for node in rounded.calls(ops.ROUND_ACTIVATIONS)} <= set(scales.values())


def test_sites_that_were_not_seen_are_reported(graph: Graph) -> None:
    current = QuantizeActivations(lambda _: {"layers.0.mlp.down_proj.input": 0.1, "layers.1.mlp.down_proj.input": 0.0})
    _, (record,) = Pipeline([current]).run(graph)
    assert record.changes == 1 and len(record.skipped) == 23
    assert any("layers.1.mlp.down_proj.input: no numbers" in line for line in record.skipped)


@pytest.mark.parametrize("target", ["onnxruntime", "onnx", "xla"])
def test_targets_round_as_the_reference_does(
    target: str, tiny: Model, traced: Graph, text: list[int], tmp_path: Path
) -> None:
    """Past the window, in chunks. A number between two codes may fall to either, so not to the last digit."""
    if target == "xla":
        pytest.importorskip("jax", reason="the xla extra is not installed")
    artifact = transom.compile(tiny, target=target, quant=QUANT, chunk=CHUNK, out=tmp_path / "a")
    assert artifact.manifest.passes[-1]["name"] == "QuantizeActivations"
    logits = transom.open(tmp_path / "a").logits(text[: 3 * WINDOW + 5])
    graph, _ = pipeline(target, chunk=CHUNK, scheme=scheme(QUANT)).run(traced)
    bare = ReferenceSession(graph, context=512, chunk=CHUNK).logits(text[: 3 * WINDOW + 5])
    measured = activation_scales(graph, _prompt(tiny), E4M3, context=512, chunk=CHUNK)
    rounded, _ = Pipeline([QuantizeActivations(lambda _: measured)]).run(graph)
    expected = ReferenceSession(rounded, context=512, chunk=CHUNK).logits(text[: 3 * WINDOW + 5])
    near, far = (float(np.sqrt(np.square(logits - other).mean())) for other in (expected, bare))
    assert near < 0.35 * far, (near, far)


def _prompt(model: Model) -> tuple[int, ...]:
    from transom.export.ranges import TOKENS
    from transom.zoo.prompt import make_prompt

    return make_prompt(model, min(TOKENS, model.config.context), None).ids


def test_tvm_rounds_none(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"rounds no activations.*choose onnxruntime or onnx or xla"):
        transom.compile(tiny, target="tvm", quant=QUANT, out=tmp_path / "a")
    assert not list(tmp_path.iterdir())
