"""The target `xla`: one program for CPUs, GPUs and TPUs, in every scheme. Programs are only lowered: no device runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from transom.export.exporter import Progress
from transom.export.options import Options
from transom.formats.schemes import SCHEMES, scheme
from transom.graphs.graph import Graph
from transom.passes.pipelines import pipeline

jax = pytest.importorskip("jax", reason="the xla extra is not installed")
from transom.export.xla import export as xla  # noqa: E402

CHUNK = 9

SHAPES = {"shape_assertion"}
"""Checks of the number of logit positions, which jax takes out again when it compiles."""


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_for_every_platform_without_custom_calls(name: str, traced: Graph, tmp_path: Path) -> None:
    graph, _ = pipeline("xla", chunk=CHUNK, scheme=scheme(name)).run(traced)
    lowered = xla.export(graph, tmp_path, Options(target="xla", context=64, chunk=CHUNK, quant=name), Progress())
    assert lowered.details["platforms"] == ["cpu", "tpu", "cuda", "rocm"]
    for program, calls in (("decode", set()), (f"prefill_{CHUNK}", SHAPES)):
        exported = jax.export.deserialize(bytearray((tmp_path / f"{program}.jaxexport").read_bytes()))
        assert list(exported.platforms) == lowered.details["platforms"]
        text = exported.mlir_module()
        assert "stablehlo.dot_general" in text
        assert {call.strip('"') for call in re.findall(r"custom_call @([\w.]+)", text)} == calls
