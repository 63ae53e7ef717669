"""What is RWKV-7's own: a delta rule whose form may not matter, first values, and what it keeps at any length."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import transom
from tests.case import Case
from tests.faults.graph import LINEAR, Spoil, argument, weight
from tests.tolerances import FP32_LOGITS, FP32_SUMS, INT8_ACTIVATIONS
from tests.zoo.tiny_gguf import STORABLE, write_gguf
from transom.backends.reference.session import ReferenceSession
from transom.errors import CheckpointError, ConfigError
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.node import Node
from transom.passes.add_taps import AddTaps
from transom.passes.pipelines import pipeline
from transom.validation.bisection.bisect import bisect
from transom.validation.bisection.context import Context
from transom.validation.bisection.divergence import compare
from transom.validation.bisection.recording import plan_calls, record
from transom.validation.validate import validate_sources
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.gguf import open_gguf
from transom.zoo.checkpoints.gguf_config import read_metadata
from transom.zoo.checkpoints.gguf_header import read_header
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.huggingface import left_out, read_config, write_config
from transom.zoo.model import Model, load
from transom.zoo.plan import parameters, plan
from transom.zoo.rwkv7 import RWKV7Config

CHUNK = 40
KEPT = 4 * (2 * 64 + 4 * 16 * 16)
"""Bytes of a tiny layer's summaries: a row before each half, and the state."""


@pytest.fixture(scope="module")
def model() -> Model:
    return load("rwkv7-tiny")


@pytest.fixture(scope="module")
def words(model: Model) -> list[int]:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (150,), generator=draw).tolist()


@pytest.fixture(scope="module")
def logits(model: Model, words: list[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        rows: np.ndarray[Any, Any] = model.eager()(torch.tensor([words]), torch.tensor(0), None)[0][0].numpy()
    return rows


class Published:
    """The published recurrence, one token after the other, in float64, on tensors by their names in checkpoints.

    Source: RWKV-LM, `RWKV-v7/rwkv_v7_numpy.py`; arXiv 2503.14456, section 4.
    """

    def __init__(self, model: Model) -> None:
        self.tensors = {name: weight.read().double().squeeze() for name, weight in model.weights.items()}
        self.depth, self.heads = model.config.num_layers, model.config.num_heads
        width = model.config.hidden_size
        self.rows = torch.zeros(self.depth, 2, width, dtype=torch.float64)
        self.states = torch.zeros(self.depth, self.heads, *[width // self.heads] * 2, dtype=torch.float64)

    def __call__(self, token: int) -> torch.Tensor:
        x = self.norm(self.tensors["embed_tokens.weight"][token], "layers.0.pre_norm")
        self.first: torch.Tensor | None = None
        for layer in range(self.depth):
            x = x + self.time_mixing(layer, self.norm(x, f"layers.{layer}.attn_norm"))
            x = x + self.channel_mixing(layer, self.norm(x, f"layers.{layer}.ffn_norm"))
        return self.tensors["lm_head.weight"] @ self.norm(x, "norm")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        deviation = (x.var(unbiased=False) + 1e-5).sqrt()
        return (x - x.mean()) / deviation * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def time_mixing(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        def get(name: str) -> torch.Tensor:
            return self.tensors[f"layers.{layer}.attn.{name}"]

        def low_rank(
            name: str, value: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
        ) -> torch.Tensor:
            return get(f"{name}_lora.lora.2.weight") @ activation(get(f"{name}_lora.lora.0.weight") @ value)

        r, w, k, v, a, g = (x + get(f"x_{use}") * (self.rows[layer, 0] - x) for use in "rwkvag")
        self.rows[layer, 0] = x
        decay = low_rank("w", w, torch.tanh) + get("w_lora.lora.2.bias")
        decay = torch.exp(-torch.sigmoid(decay) / np.e**0.5)
        value, key, query = get("v_proj.weight") @ v, get("k_proj.weight") @ k, get("r_proj.weight") @ r
        if self.first is None:
            self.first = value
        else:
            share = torch.sigmoid(low_rank("v", v, lambda x: x) + get("v_lora.lora.2.bias"))
            value = value + (self.first - value) * share
        rate = torch.sigmoid(low_rank("a", a, lambda x: x) + get("a_lora.lora.2.bias"))
        gate = low_rank("g", g, torch.sigmoid)
        removal, key = key * get("k_k"), key * (1 + (rate - 1) * get("k_a"))
        decay, value, key, query, rate, removal = (
            one.view(self.heads, -1, 1) for one in (decay, value, key, query, rate, removal)
        )
        removal = removal / removal.norm(dim=1, keepdim=True)
        state: torch.Tensor = self.states[layer]
        state = state * decay.mT - state @ removal @ (removal * rate).mT + value @ key.mT
        self.states[layer] = state
        y = (state @ query).squeeze(-1)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + y.shape[1] * 1e-5).sqrt()
        y = y.flatten() * get("g_norm.weight") + get("g_norm.bias")
        bonus = (query * key * get("r_k")[..., None]).sum(1, keepdim=True) * value
        out: torch.Tensor = get("o_proj.weight") @ ((y + bonus.flatten()) * gate)
        return out

    def channel_mixing(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        head = f"layers.{layer}.ffn."
        mixed = x + self.tensors[head + "x_k"] * (self.rows[layer, 1] - x)
        self.rows[layer, 1] = x
        return self.tensors[head + "value.weight"] @ (self.tensors[head + "key.weight"] @ mixed).relu() ** 2


def test_logits_are_those_of_the_published_recurrence(
    model: Model, words: list[int], logits: np.ndarray[Any, Any]
) -> None:
    step = Published(model)
    expected = torch.stack([step(word) for word in words]).numpy()
    assert len(words) > 3 * ops.DELTA_PIECE
    assert np.abs(logits - expected).max() < FP32_LOGITS


def test_chunks_one_call_and_single_tokens_agree(model: Model, words: list[int], logits: np.ndarray[Any, Any]) -> None:
    """Whatever the calls, before all passes and after those of a target that fuses most; a reset forgets it all."""
    graph, _ = pipeline("tvm", chunk=CHUNK, scheme=scheme("none")).run(model.trace())
    for stage in (model.trace(), graph):
        session = Case(graph=stage).session(chunk=CHUNK)
        for cuts in ([150], [1] * 30, [3, 15, 16, 17, 1, 33, 40]):
            session.reset()
            rows, first = [], 0
            for count in cuts:
                rows += list(session.feed(words[first : first + count], wanted="all"))
                first += count
            assert np.abs(np.concatenate(rows) - logits[:first]).max() < FP32_LOGITS, cuts
        assert session.cache_bytes() == {"local": 0, "global": 0, "summary": 2 * KEPT}


def test_an_artifact_of_int8_weights(
    model: Model, words: list[int], logits: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    transom.compile(model, target="onnxruntime", quant="int8", context=256, chunk=CHUNK, out=tmp_path / "a")
    session = transom.open(tmp_path / "a", threads=1)
    difference = np.sqrt(np.square(session.logits(words) - logits).mean())
    assert FP32_LOGITS < difference < INT8_ACTIVATIONS * logits.std() / 2.5, "more than rounded weights and activations"
    assert session.cache_bytes()["summary"] == 2 * KEPT
    code = bisect("eager", "onnx@ConvertQuantized", model=model, quant="int8", chunk=CHUNK, length=50, decode=2)
    assert not code.diverged, code


def test_an_artifact_whose_rows_have_no_axis_for_the_batch(
    model: Model, words: list[int], logits: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    """Parameters that mix tokens have one; TVM's values do not."""
    pytest.importorskip("tvm")
    transom.compile(model, target="tvm", context=256, chunk=CHUNK, out=tmp_path / "a")
    session = transom.open(tmp_path / "a")
    rows = [*session.logits(words[:90]), *(session.decode(word) for word in words[90:])]
    assert np.abs(np.stack(rows) - logits).max() < FP32_LOGITS


def test_validation_and_bisection(model: Model) -> None:
    assert validate_sources(model, targets=["reference"]).passed
    verdict = bisect("reference", "eager", model=model, chunk=CHUNK, length=50, decode=2)
    assert not verdict.diverged, verdict


def _no_rates(graph: Graph, node: Node) -> None:
    node.update_arg(5, node.args[4])


FAULTS = {
    "removals in place of rates": (Spoil(ops.DELTA_RULE, _no_rates, "layers.1.attn"), 1, "delta_rule"),
    "gates in bfloat16": (
        Spoil(LINEAR, weight(lambda rows: rows.bfloat16().float()), "layers.1.attn.g_lora.lora.2"), 1, "quantisation",
    ),
    "a forgotten row": (Spoil(ops.TOKEN_SHIFT, argument(1, None), "layers.1.ffn"), 1, "activation"),
}  # fmt: skip
"""The fault, and the layer and the operation that bisection names."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_placed(model: Model, name: str) -> None:
    fault, layer, op = FAULTS[name]
    graph = Case(graph=model.trace()).run(AddTaps()).graph
    calls = plan_calls(window=8, chunk=CHUNK, decode=2)
    context = Context(graph=graph, tokens=list(range(calls[-1].stop)))
    right, wrong = (
        record(ReferenceSession(one, context=256, chunk=CHUNK), calls, context)
        for one in (graph, Case(graph=graph).run(fault).graph)
    )
    verdict = compare(right, wrong, context)
    assert (verdict.diverged, verdict.layer, verdict.op) == (True, layer, op), verdict


def test_every_add_of_the_stream_is_tapped(model: Model) -> None:
    """A norm stands between the embedding and the first add."""
    graph = Case(graph=model.trace()).run(AddTaps()).graph
    assert len([tap for tap in graph.taps if tap.op == "residual"]) == 2 * model.config.num_layers


def token_by_token(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The delta rule as the paper writes it, in float64, from a state of zeros."""
    queries, logs, keys, values, removals, rates = (value.double() for value in operands)
    state = torch.zeros(*values.shape[0::2], values.shape[3], keys.shape[3], dtype=torch.float64)
    rows = []
    for token in range(keys.shape[1]):
        unit = removals[:, token, :, None] / removals[:, token, :, None].norm(dim=-1, keepdim=True)
        change = torch.diag_embed(logs[:, token].exp()) - unit.mT @ (rates[:, token, :, None] * unit)
        state = state @ change + values[:, token, ..., None] @ keys[:, token, :, None]
        rows.append((state @ queries[:, token, ..., None]).squeeze(-1))
    return torch.stack(rows, 1), state


def draw_operands(tokens: int, *, repeated: bool = False) -> list[torch.Tensor]:
    """Decays from none to nearly all; or one token over and over that replaces all that it put there, for ever."""
    draw = torch.Generator().manual_seed(1)
    queries, keys, removals, logs = (torch.randn(1, tokens, 4, 16, generator=draw) for _ in range(4))
    values, rates = torch.randn(1, tokens, 4, 8, generator=draw), torch.rand(1, tokens, 4, 16, generator=draw)
    if repeated:
        keys = removals = keys[:, :1].expand_as(keys)
        return [queries, torch.zeros_like(logs), keys, values, removals, torch.ones_like(rates)]
    return [queries, -(2 * logs - 2).exp(), keys, values, removals, rates]


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("tokens", [1, ops.DELTA_PIECE - 1, ops.DELTA_PIECE, ops.DELTA_PIECE + 1, 200])
def test_the_delta_rule_is_the_recurrence(tokens: int, repeated: bool) -> None:
    given = draw_operands(tokens, repeated=repeated)
    expected, after = token_by_token(*given)
    y, state = ops.DELTA_RULE(*given, None, None)
    assert (y - expected).abs().max() < FP32_SUMS * expected.abs().max()
    assert (state - after).abs().max() < FP32_SUMS * after.abs().max()


def test_the_operations_have_gradients() -> None:
    given = [value.requires_grad_() for value in draw_operands(2 * ops.DELTA_PIECE + 3)]
    ours = torch.autograd.grad(ops.DELTA_RULE(*given, None, None)[0].square().sum(), given)
    theirs = torch.autograd.grad(token_by_token(*given)[0].square().sum(), given)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 10 * FP32_SUMS * other.abs().max()
    x = torch.randn(2, 9, 6, requires_grad=True)
    (slope,) = torch.autograd.grad((ops.TOKEN_SHIFT(x, None, None)[0] * torch.arange(9.0)[:, None]).sum(), x)
    assert torch.equal(slope[0, :, 0], torch.tensor([*range(1, 9), 0]).float()), "the last row comes before none"


def test_what_pads_a_call_leaves_no_trace() -> None:
    """XLA's programs have fixed sizes: a call of fewer tokens is padded, and says how many count."""
    jax = pytest.importorskip("jax")
    from transom.export.xla import summaries

    count, start = ops.DELTA_PIECE + 3, torch.tensor(5)
    given, state, before = draw_operands(count + 5), torch.randn(1, 4, 8, 16), torch.randn(1, 1, 64)
    expected, after = ops.DELTA_RULE(*(value[:, :count] for value in given), state, start)
    arrays = [jax.numpy.asarray(value.numpy()) for value in (*given, state, start)]
    y, state_after = jax.jit(summaries.delta_rule)(*arrays, count=jax.numpy.int32(count))
    assert np.abs(np.asarray(y)[:, :count] - expected.numpy()).max() < FP32_SUMS * expected.abs().max()
    assert np.abs(np.asarray(state_after) - after.numpy()).max() < FP32_SUMS * after.abs().max()
    rows = given[0].flatten(2)
    _, kept = ops.TOKEN_SHIFT(rows[:, :count], before, start)
    arrays = [jax.numpy.asarray(value.numpy()) for value in (rows, before, start)]
    _, kept_after = jax.jit(summaries.token_shift)(*arrays, count=jax.numpy.int32(count))
    np.testing.assert_array_equal(np.asarray(kept_after), kept.numpy())


@pytest.mark.parametrize(
    ("name", "numbers", "width", "depth"),
    [
        ("rwkv7-world-0.1b", 191_034_624, 768, 12),
        ("rwkv7-world-0.4b", 450_767_872, 1024, 24),
        ("rwkv7-world-1.5b", 1_527_404_544, 2048, 24),
        ("rwkv7-world-2.9b", 2_947_735_040, 2560, 32),
    ],
)
def test_released_sizes_and_what_they_keep_at_any_length(name: str, numbers: int, width: int, depth: int) -> None:
    """Sizes as the paper's table of models has them."""
    config = preset(name)
    assert parameters(config) == numbers
    for context in (1, 1000, 1_000_000):
        planned = plan(config, context=context)
        kept = depth * (4 * width * 64 + 2 * 2 * width)
        assert planned.cache_bytes_bounded == planned.cache_bytes_global_only == kept
        assert {(layer.kind, layer.slots) for layer in planned.layers} == {("summary", 0)}


PUBLISHED = {
    "architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "auto_map": {"AutoModel": "modeling.RWKV7Model"},
    "attn": None, "attn_mode": "chunk", "a_low_rank_dim": 96, "decay_low_rank_dim": 96, "gate_low_rank_dim": 256,
    "v_low_rank_dim": 64, "fuse_cross_entropy": True, "fuse_norm": False, "head_dim": 64, "hidden_act": "sqrelu",
    "hidden_ratio": 4.0, "hidden_size": 2048, "initializer_range": 0.006, "intermediate_size": 8192, "norm_bias": True,
    "norm_eps": 1e-5, "norm_first": True, "num_heads": 32, "num_hidden_layers": 24, "tie_word_embeddings": False,
    "max_position_embeddings": 2048, "use_cache": True, "value_dim": [2048] * 24, "vocab_size": 65_536,
    "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16",
}  # fmt: skip
"""A `config.json` as flash-linear-attention writes it."""


def test_a_published_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    expected = preset("rwkv7-world-1.5b")
    assert dataclasses.replace(read_config(tmp_path), name=expected.name, context=expected.context) == expected
    assert left_out(tmp_path) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn": {"layers": [1], "num_heads": 4}}, "attn is .*: only null is supported"),
        ({"value_dim": [2048, 1024]}, "only values as wide as the model, 2048, are supported"),
        ({"value_dim": [[2048]]}, "only values as wide as the model, 2048, are supported"),
        ({"value_dim": []}, "only values as wide as the model, 2048, are supported"),
        ({"decay_low_rank_dim": None}, "decay_low_rank_dim is null: expected a whole number"),
        ({"head_dim": 60}, "hidden_size is 2048: expected a multiple of head_dim, 60"),
        ({"hidden_act": "silu"}, 'hidden_act is "silu": only "sqrelu" is supported'),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **changes}))
    with pytest.raises(ConfigError, match=words):
        read_config(tmp_path)


def test_heads_as_wide_as_the_model(model: Model, tmp_path: Path) -> None:
    assert isinstance(model.config, RWKV7Config)
    write_config(model.config, tmp_path)
    with pytest.raises(ConfigError, match="2 heads of 16 are 32 wide, expected the model's 64"):
        dataclasses.replace(model.config, num_heads=2, num_kv_heads=2)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = STORABLE["rwkv7"]
    return write_gguf(tmp_path_factory.mktemp("gguf") / "stored.gguf", config, random_weights(config, 5))


def test_a_gguf_file_is_a_model_without_a_tokenizer(stored: Path) -> None:
    """Its mixes keep their order, and it says what is not read."""
    read, weights = load(stored), random_weights(STORABLE["rwkv7"], 5)
    mixes = [read.weights[f"layers.1.attn.x_{use}"].read() for use in "rwkvag"]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(mixes, 2))
    assert all(torch.equal(mixes[at], weights[f"layers.1.attn.x_{use}"].read()) for at, use in enumerate("rwkvag"))
    assert read.tokenizer is None and read.generation.stop_ids == (0, 259)
    ranks, tokenizer = read.left_out
    assert "no layer reads" in ranks and all(f"blk.0.time_mix_v{part}.weight" in ranks for part in range(3))
    assert "'rwkv', a kind of tokenizer that is not read: give token ids" in tokenizer


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("wkv.head_size", 32, "heads of 32 are normalised with 0.00032, but llama.cpp takes 0.00064"),
        ("wkv.head_size", 48, "wkv.head_size is 48, which does not divide a width of 128"),
        ("attention.layer_norm_epsilon", 1e-6, "heads of 64 are normalised with 6.4e-05"),
        ("attention.layer_norm_epsilon", None, "layer_norm_epsilon is None, expected a number"),
        ("attention.gate_lora_rank", None, "gate_lora_rank is None, expected a number"),
        ("attention.head_count", 7, "head_count is 7, only 0 or 2 is supported"),
        ("token_shift_count", 1, "token_shift_count is 1, only 2 is supported"),
        ("rescale_every_n_layers", 6, "rescale_every_n_layers is 6, only 0 is supported"),
        ("rope.freq_base", 1e4, r"rwkv7\.rope\.freq_base"),
    ],
)
def test_gguf_metadata_that_is_refused(stored: Path, key: str, value: object, words: str) -> None:
    header = read_header(stored)
    header.metadata[f"rwkv7.{key}"] = value
    with pytest.raises(ConfigError, match=words):
        read_metadata(header)


def test_gguf_tensors_that_are_refused(stored: Path, tmp_path: Path) -> None:
    header = read_header(stored)
    fused = "blk.1.time_mix_lerp_fused.weight"
    # llama.cpp's ARWKV has five mixes, as it has no gate.
    header.tensors[fused] = dataclasses.replace(header.tensors[fused], shape=(5, 1, 1, 128))
    with pytest.raises(
        CheckpointError, match=r"lerp_fused.weight has shape \[5, 1, 1, 128\], expected \[6, 1, 1, 128\]"
    ):
        open_gguf(header)
    config = STORABLE["rwkv7"]
    path = write_gguf(tmp_path / "less.gguf", config, random_weights(config, 5), skip=(fused,))
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors are missing: blk\.1\.time_mix_lerp_fused\.weight"):
        open_gguf(path)
