"""GatherBlockQuantized always has its zero points: left out, they mean different things to different providers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
import torch
from torch import nn

from tests.case import export
from transom.backends.artifact import MODEL_FILE
from transom.export.onnx import emitter, onnxruntime
from transom.formats.schemes import BITS, Format, QuantSpec, Scheme
from transom.graphs.graph import Graph
from transom.passes.base import Pipeline
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized, dequantized

ROWS, COLUMNS = 70, 96
NAME = "embed_tokens.weight"


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(ROWS, COLUMNS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.embed_tokens(tokens)
        return rows


@pytest.fixture(scope="module")
def plain() -> Graph:
    module = Table()
    module.embed_tokens.weight.data = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) + 0.3
    return Pipeline([Canonicalize()]).run(export(module, torch.arange(ROWS)[None]))[0]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("block", [32, 16])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_rows_are_equal_to_the_bit(plain: Graph, tmp_path: Path, format: Format, block: int, symmetric: bool) -> None:
    """Of an odd number of blocks too, which do not fill whole bytes."""
    scheme = Scheme(name="table", table=QuantSpec(format=format, block=block, symmetric=symmetric))
    graph, _ = Pipeline([ConvertQuantized(scheme)]).run(plain)
    emitter.write(graph, onnxruntime.DIALECT, tmp_path)
    model = onnx.load(tmp_path / MODEL_FILE)
    (lookup,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    assert len(lookup.input) == 4
    (stored,) = (tensor for tensor in model.graph.initializer if tensor.name == lookup.input[3])
    zeros = onnx.numpy_helper.to_array(stored)
    assert zeros.shape == (ROWS, COLUMNS // block, 1) and zeros.dtype == np.uint8
    if symmetric:
        assert (zeros == 2 ** (BITS[format] - 1)).all()
    session = ort.InferenceSession(tmp_path / MODEL_FILE, providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"tokens": np.arange(ROWS)[None]})
    np.testing.assert_array_equal(rows[0], dequantized(NAME, plain.weights[NAME], scheme).numpy())
