"""The passes on graphs that this project did not write: Hugging Face's own modules, traced with torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim

from tests.case import Case, export, run_graph
from tests.tolerances import FP32_LOGITS
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.ops import ATTENTION
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_norms import FuseNorms
from transom.passes.share_embedding import ShareEmbedding

WINDOW, STATIC_LENGTH = 16, 67


class Scorer(nn.Module):
    """The module with one input and one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=tokens_BT, use_cache=False).logits
        return logits


def build(implementation: str) -> Scorer:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=WINDOW,
        max_position_embeddings=512,
        attn_implementation=implementation,
        use_cache=False,
    )
    return Scorer(transformers.Gemma3ForCausalLM(config).eval())


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_of_hugging_faces_module_is_fused(implementation: str, dynamic: bool) -> None:
    module = build(implementation)
    sizes = ({0: Dim("B", max=8), 1: Dim("T", max=512)},) if dynamic else None
    graph: Graph = export(module, torch.zeros(2, STATIC_LENGTH, dtype=torch.int64), dynamic_shapes=sizes)
    case = Case(graph=graph).run(ShareEmbedding(), Canonicalize(), FuseNorms(), FuseAttention())
    case.expect({ATTENTION: 6, aten.softmax.int: 0, aten.scaled_dot_product_attention.default: 0}).expect_skipped()
    assert [node.kwargs["window"] for node in case.graph.calls(ATTENTION)] == [WINDOW] * 5 + [0]
    assert {node.args[1].meta["val"].shape[1] for node in case.graph.calls(ATTENTION)} == {2}
    assert case.records[0].changes == 1, "head and embedding are tied"
    case.settled()
    for length in (WINDOW - 1, WINDOW + 1, STATIC_LENGTH) if dynamic else (STATIC_LENGTH,):
        tokens_BT = torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = module(tokens_BT)
        assert (run_graph(case.graph, tokens_BT)[0] - expected).abs().max() < FP32_LOGITS


SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": WINDOW,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
    "use_cache": False,
}


def gemma2() -> Any:
    """Scores are bounded."""
    config = transformers.Gemma2Config(**SIZES, head_dim=16, attn_logit_softcapping=0.5, query_pre_attn_scalar=4)
    return transformers.Gemma2ForCausalLM(config)


class Projection(nn.Linear):
    """Stands for experts, which come with their scores."""

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x_BTD), None


def gpt_oss() -> Any:
    """Sinks are a column that is cut off."""
    config = transformers.GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = Projection(32, 32)
    return model


def granite_swa() -> Any:
    """Sinks are a factor on the result."""
    types = ["full_attention", "sliding_attention"]
    config = transformers.GraniteSWAConfig(**SIZES, layer_types=types, layer_rope_theta=[0.0, 1e4])
    return transformers.GraniteSWAForCausalLM(config)


@pytest.mark.parametrize("make", [gemma2, gpt_oss, granite_swa], ids=lambda make: make.__name__)
def test_caps_and_sinks_of_hugging_faces_modules_are_read(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    module = Scorer(make().eval())
    for name, parameter in module.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter, 1.0)
    sizes = ({0: Dim("B", max=8), 1: Dim("T", max=512)},)
    graph: Graph = export(module, torch.zeros(2, STATIC_LENGTH, dtype=torch.int64), dynamic_shapes=sizes)
    case = Case(graph=graph).run(Canonicalize(), FuseAttention())
    case.expect({ATTENTION: 2, aten.softmax.int: 0, aten.logsumexp.default: 0}).expect_skipped()
    first, second = case.graph.calls(ATTENTION)
    assert {first.kwargs["window"], second.kwargs["window"]} == {WINDOW, 0}
    for node in (first, second):
        assert node.kwargs["softcap"] == (0.5 if make is gemma2 else 0)
        named_weight = case.graph.weight_of(node.args[5])
        assert (named_weight is None) if make is gemma2 else (named_weight and named_weight[0].endswith("sinks"))
    for length in (WINDOW - 1, WINDOW + 1, STATIC_LENGTH):
        tokens_BT = torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = module(tokens_BT)
        assert (run_graph(case.graph, tokens_BT)[0] - expected).abs().max() < FP32_LOGITS


def test_layers_of_hugging_faces_gemma_4_that_share_keys_and_values() -> None:
    """Windows come from the masks, widths of heads from the shapes; two tables; norms without a weight."""
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        num_hidden_layers=6,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
        num_kv_shared_layers=3,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=99,
        sliding_window=WINDOW,
        max_position_embeddings=512,
        attn_implementation="eager",
        use_cache=False,
    )
    module = Scorer(transformers.Gemma4ForCausalLM(config).eval())
    sizes = ({0: Dim("B", max=8), 1: Dim("T", max=512)},)
    graph = export(module, torch.zeros(2, STATIC_LENGTH, dtype=torch.int64), dynamic_shapes=sizes)
    case = Case(graph=graph).run(ShareEmbedding(), Canonicalize(), FuseNorms(), FuseAttention())
    case.expect({ATTENTION: 6, aten.softmax.int: 0, aten.rsqrt.default: 0, aten.embedding.default: 2}).expect_skipped()
    calls = case.graph.calls(ATTENTION)
    assert [node.kwargs["window"] for node in calls] == [WINDOW, WINDOW, 0] * 2
    assert [node.args[1].meta["val"].shape[3] for node in calls] == [16, 16, 32] * 2
    assert calls[3].args[1:3] == calls[4].args[1:3] == calls[1].args[1:3]
    assert calls[5].args[1:3] == calls[2].args[1:3]
    tokens_BT = torch.randint(0, 99, (2, STATIC_LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(tokens_BT)
    assert (run_graph(case.graph, tokens_BT)[0] - expected).abs().max() < FP32_LOGITS
