"""The second front door to XLA. Runs where torch-xla is installed, which takes an environment with torch 2.9."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.artifacts import CHUNK
from tests.tolerances import FP32_LOGITS
from transom.errors import TargetError
from transom.export.xla import torch_xla
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model


@pytest.fixture(scope="module")
def bounded(traced: Graph) -> Graph:
    return pipeline("xla", chunk=CHUNK, scheme=scheme("none")).run(traced)[0]


def test_chunks_longer_than_the_window(
    bounded: Graph, tiny: Model, text: list[int], text_logits: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    pytest.importorskip("torch_xla", reason="torch-xla is not installed: it needs an environment with torch 2.9")
    program = torch_xla.lower(bounded, tokens=CHUNK, slots=4 * CHUNK, positions=CHUNK)
    assert program.get_stablehlo_bytecode("forward")
    caches = [torch.zeros(state.shape(4 * CHUNK)) for state in bounded.states.values()]
    for start in range(0, 4 * CHUNK, CHUNK):
        tokens = torch.tensor([text[start : start + CHUNK]])
        logits, *caches = (value.cpu() for value in program(tokens, torch.tensor(start), torch.arange(CHUNK), *caches))
        assert np.abs(logits[0].numpy() - text_logits[start : start + CHUNK]).max() < FP32_LOGITS


def test_a_bfloat16_program_is_written_without_weights(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    pytest.importorskip("torch_xla", reason="torch-xla is not installed: it needs an environment with torch 2.9")
    traced = tiny.trace(dtype=torch.bfloat16)
    graph, _ = pipeline("xla", chunk=1, scheme=scheme("none")).run(traced)
    assert b"bf16" in torch_xla.lower(graph, tokens=1, slots=64).get_stablehlo_text("forward").encode()


def test_what_to_install(bounded: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xla.stablehlo", None)
    with pytest.raises(TargetError, match=r"pip install 'transom\[torch-xla\]'"):
        torch_xla.lower(bounded, tokens=1, slots=64)
