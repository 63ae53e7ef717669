"""The second front door to TensorRT. Runs where Torch-TensorRT is installed, which takes a GPU."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.artifacts import CHUNK
from tests.tolerances import FP32_LOGITS, TF32_LOGITS
from transom.errors import TargetError
from transom.export.tensorrt import torch_tensorrt
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model


@pytest.fixture(scope="module")
def bounded(traced: Graph) -> Graph:
    return pipeline("tensorrt", chunk=CHUNK, scheme=scheme("none")).run(traced)[0]


def run(call: Any, bounded: Graph, tiny: Model, text: list[int], device: str = "cpu") -> NDArray[np.float32]:
    """Chunks longer than the window, past the wrap of the ring; logits [T, V]."""
    rows = []
    shapes = [state.shape(4 * CHUNK) for state in bounded.states.values()]
    caches = [torch.zeros(shape, device=device) for shape in shapes]
    for start in range(0, 4 * CHUNK, CHUNK):
        tokens = torch.tensor([text[start : start + CHUNK]])
        given = [value.to(device) for value in (tokens, torch.tensor(start), torch.arange(CHUNK))]
        logits, *caches = call(*given, *caches)
        rows.append(logits[0].cpu().numpy())
    return np.concatenate(rows)


def test_what_it_is_given(
    bounded: Graph, tiny: Model, text: list[int], text_logits: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain program with its weights, that computes the model by itself, and an input of every kind."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def compile_program(program: torch.export.ExportedProgram, **options: Any) -> Any:
        calls.append((program, options))
        return program.module()

    module = types.ModuleType("torch_tensorrt")
    module.dynamo = types.SimpleNamespace(compile=compile_program)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    lowered = torch_tensorrt.lower(bounded, tokens=CHUNK, slots=4 * CHUNK, positions=CHUNK, min_block_size=1)
    ((program, options),) = calls
    assert not [node for node in program.graph.nodes if "transom" in str(node.target)]
    assert options["min_block_size"] == 1 and options["use_explicit_typing"] is True
    shapes = [tuple(value.shape) for value in options["arg_inputs"]]
    assert shapes[:3] == [(1, CHUNK), (), (CHUNK,)] and len(shapes) == 3 + len(bounded.states)
    assert [value.dtype for value in options["arg_inputs"]][:4] == [torch.int64] * 3 + [torch.float32]
    assert np.abs(run(lowered, bounded, tiny, text) - text_logits[: 4 * CHUNK]).max() < FP32_LOGITS


def test_on_a_gpu(bounded: Graph, tiny: Model, text: list[int], text_logits: NDArray[np.float32]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU, without which Torch-TensorRT cannot be imported")
    pytest.importorskip("torch_tensorrt", reason="Torch-TensorRT is not installed")
    lowered = torch_tensorrt.lower(bounded, tokens=CHUNK, slots=4 * CHUNK, positions=CHUNK)
    logits = run(lowered, bounded, tiny, text, "cuda")
    assert np.abs(logits - text_logits[: 4 * CHUNK]).max() < TF32_LOGITS


def test_what_to_install(bounded: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(TargetError, match=r"with an NVIDIA GPU, pip install torch-tensorrt"):
        torch_tensorrt.lower(bounded, tokens=1, slots=64)
