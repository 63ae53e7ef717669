"""A traced graph is the module: same numbers, any sizes, no weights in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tests.artifacts import CHUNK
from tests.case import run_graph
from tests.conftest import WINDOW
from tests.gemma import gemma_config
from tests.tolerances import FP32_LOGITS
from transom.backends.reference.session import ReferenceSession
from transom.errors import TraceError
from transom.graphs.check import check
from transom.graphs.graph import Graph
from transom.graphs.trace import trace
from transom.graphs.weight import Weight
from transom.zoo.gemma3 import Gemma3
from transom.zoo.model import Model


def test_decode_graph_is_the_module(traced: Graph, tiny: Model, text: list[int]) -> None:
    """Two rows, a chunk at a position past the window: logits and all caches are those of the module."""
    check(traced)
    module, config = tiny.eager(), tiny.config
    shape = (2, config.num_kv_heads, 61, config.head_dim)
    noise = torch.Generator().manual_seed(0)
    caches = [(torch.randn(shape, generator=noise), torch.randn(shape, generator=noise)) for _ in config.layers]
    tokens_BT, start = torch.tensor([text[:9], text[9:18]]), torch.tensor(47)
    positions = torch.tensor([0, 8])
    logits, *written = run_graph(traced, tokens_BT, start, positions, *(tensor for pair in caches for tensor in pair))
    with torch.no_grad():
        expected, expected_caches = module(tokens_BT, start, caches)
    assert (logits - expected[:, positions]).abs().max() < FP32_LOGITS
    for cache, expected_cache in zip(written, (tensor for pair in expected_caches for tensor in pair), strict=True):
        assert (cache - expected_cache).abs().max() < FP32_LOGITS


def test_score_graph_is_the_module(scored: Graph, text: list[int], text_logits: NDArray[np.float32]) -> None:
    check(scored)
    for length in (1, WINDOW, len(text)):
        (logits,) = run_graph(scored, torch.tensor([text[:length]]))
        assert np.abs(logits[0].numpy() - text_logits[:length]).max() < FP32_LOGITS


def test_decoding_with_growing_caches(traced: Graph, text: list[int], text_logits: NDArray[np.float32]) -> None:
    session = ReferenceSession(traced, context=512, chunk=CHUNK)
    assert np.abs(session.logits(text[:60]) - text_logits[:60]).max() < FP32_LOGITS
    assert np.abs(session.decode(text[60]) - text_logits[60]).max() < FP32_LOGITS


def test_as_traced_every_cache_grows(traced: Graph, tiny: Model) -> None:
    nodes = traced.inputs
    assert [state.layer for state in traced.states.values()] == [layer for layer in range(6) for _ in range(2)]
    assert {(state.window, state.slots) for state in traced.states.values()} == {(None, None)}
    assert len({str(nodes[name].meta["val"].shape[2]) for name in traced.states}) == 1
    assert not any(isinstance(nodes[name].meta["val"].shape[2], int) for name in traced.states)


def test_weights_keep_the_checkpoints_names_and_stay_unread(tiny: Model) -> None:
    def refuse(start: int, stop: int) -> torch.Tensor:
        raise AssertionError("tracing read a weight")

    blind = {
        name: Weight(shape=weight.shape, dtype=weight.dtype, read_rows=refuse, origin="nowhere")
        for name, weight in tiny.weights.items()
    }
    graph = trace(lambda: Gemma3(gemma_config(tiny.config)), blind, context=512, task="score")
    assert set(graph.weights) == set(tiny.weights)
    assert all(type(tensor).__name__ == "FakeTensor" for tensor in graph.program.state_dict.values())


def test_a_missing_weight_is_named(tiny: Model) -> None:
    weights = {name: weight for name, weight in tiny.weights.items() if name != "layers.2.mlp.up_proj.weight"}
    with pytest.raises(TraceError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        trace(lambda: Gemma3(gemma_config(tiny.config)), weights, context=512, task="score")


def test_a_module_that_cannot_be_exported_is_named(tiny: Model) -> None:
    class Branching(nn.Module):
        def forward(self, tokens: torch.Tensor, start: torch.Tensor, caches: None) -> tuple[torch.Tensor, None]:
            return (tokens.float() if bool(tokens.sum() > 3) else tokens.double()), caches

    with pytest.raises(TraceError, match="Branching for 'score'"):
        trace(Branching, {}, context=512, task="score")


def test_a_module_that_is_right_for_some_sizes_only_is_refused() -> None:
    class Sevens(nn.Module):
        def forward(self, tokens: torch.Tensor, start: torch.Tensor, caches: None) -> tuple[torch.Tensor, None]:
            torch._check(tokens.shape[1] % 7 == 0)  # type: ignore[no-untyped-call]  # true of the traced size
            return tokens.float()[..., None], caches

    with pytest.raises(TraceError, match=r"Sevens for 'score': the model works only where Eq\(Mod\(.*, 7\), 0\)"):
        trace(Sevens, {}, context=512, task="score")
