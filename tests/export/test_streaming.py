"""Weights pass through an export in blocks; none of them ever stands in memory whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import resource, sys, tempfile, pathlib
import torch
from torch import nn
from transom.backends.artifact import MODEL_FILE
from transom.export.onnx import emitter, onnxruntime, standard
from transom.export.onnx.data import data_file
from transom.graphs.graph import Graph
from transom.formats.schemes import scheme
from transom.graphs.weight import Weight
from transom.passes.base import Pipeline
from transom.passes.convert_quantized import ConvertQuantized

torch.set_num_threads(1)
ROWS, WIDTH = 300_000, 512
DIALECT = {"onnxruntime": onnxruntime.DIALECT, "onnx": standard.DIALECT}[sys.argv[1]]

class Table(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.table = nn.Embedding(rows, WIDTH)
    def forward(self, tokens):
        return nn.functional.linear(self.table(tokens), self.table.weight)

with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
    program = torch.export.export(Table(ROWS), (torch.zeros(1, 4, dtype=torch.int64),), strict=False)
noise = torch.randn(997, WIDTH)
read = lambda start, stop: noise[torch.arange(start, stop) % 997]
weight = Weight(shape=(ROWS, WIDTH), dtype=torch.float32, read_rows=read, origin="synthetic")
graph = Graph.from_program(program)
graph.weights = {"table.weight": weight}
graph, _ = Pipeline([ConvertQuantized(scheme(sys.argv[2]))]).run(graph)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with tempfile.TemporaryDirectory() as folder:
    emitter.write(graph, DIALECT, pathlib.Path(folder))
    size = (pathlib.Path(folder) / data_file(MODEL_FILE)).stat().st_size
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(size, (after - before) * 1024)
"""


# Weights that are not quantised are written by what dialects share.
@pytest.mark.parametrize(("target", "quant"), [("onnxruntime", "none"), ("onnxruntime", "int8"), ("onnx", "int8")])
def test_a_table_of_600_megabytes(target: str, quant: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, target, quant], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > (600e6 if quant == "none" else 150e6)
    # Two row blocks of 64 MiB: as they are read, and as they are written.
    assert grown < 2 * 2**26 + 50e6, f"memory grew by {grown / 1e6:.0f} MB while {size / 1e6:.0f} MB were written"
