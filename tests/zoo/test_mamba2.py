"""What is Mamba-2's own: a recurrence whose form may not matter, a hybrid, and what it keeps at any length."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

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
from transom.graphs.state import State
from transom.graphs.weight import Weight
from transom.passes.add_taps import AddTaps
from transom.passes.pipelines import pipeline
from transom.validation.bisection.bisect import bisect
from transom.validation.bisection.context import Context
from transom.validation.bisection.divergence import compare
from transom.validation.bisection.recording import plan_calls, record
from transom.validation.validate import validate_sources
from transom.zoo.architectures import preset, tensor_shapes
from transom.zoo.checkpoints.gguf import open_gguf
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.mamba2_config import Mamba2Config
from transom.zoo.model import Model, load
from transom.zoo.plan import parameters, plan

CHUNK = 40
KEPT = 4 * (3 * (128 + 2 * 16) + 8 * 16 * 16)
"""Bytes of a tiny layer's summaries: the convolution's last inputs, and the state."""


@pytest.fixture(scope="module")
def hybrid() -> Model:
    """Four layers, of which one attends."""
    return load("mamba2-hybrid-tiny")


@pytest.fixture(scope="module")
def words(hybrid: Model) -> list[int]:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(0, hybrid.config.vocab_size, (150,), generator=draw).tolist()


@pytest.fixture(scope="module")
def logits(hybrid: Model, words: list[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        rows: np.ndarray[Any, Any] = hybrid.eager()(torch.tensor([words]), torch.tensor(0), None)[0][0].numpy()
    return rows


class _Attention(nn.Module):
    """Attention by torch's own function, in the place of a mixer of transformers."""

    def __init__(self, model: Model, layer: int) -> None:
        super().__init__()
        self.matrices = {
            name: model.weights[f"layers.{layer}.mixer.{name}_proj.weight"].read() for name in ("q", "k", "v", "o")
        }

    def forward(self, x_BTD: torch.Tensor, **ignored: Any) -> torch.Tensor:
        q, k, v = (
            nn.functional.linear(x_BTD, self.matrices[name]).view(*x_BTD.shape[:2], heads, 16).transpose(1, 2)
            for name, heads in (("q", 4), ("k", 2), ("v", 2))
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return nn.functional.linear(attended.transpose(1, 2).flatten(2), self.matrices["o"])


def test_a_hybrid_is_transformers_model_with_one_mixer_that_attends(
    hybrid: Model, words: list[int], logits: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    assert isinstance(hybrid.config, Mamba2Config)
    config = dataclasses.replace(hybrid.config, attention_layers=())
    weights = {name: weight for name, weight in hybrid.weights.items() if ".2.mixer." not in name}
    weights |= {name: hybrid.weights[name.replace(".2.", ".1.")] for name in _mixer_names(config)}
    write_checkpoint(tmp_path, config, weights, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.backbone.layers[2].mixer = _Attention(hybrid, 2)
    with torch.no_grad():
        expected = theirs(torch.tensor([words]), use_cache=False).logits[0].numpy()
    assert np.abs(logits - expected).max() < FP32_LOGITS


def _mixer_names(config: Mamba2Config) -> list[str]:
    return [name for name in tensor_shapes(config) if ".2.mixer." in name]


def test_chunks_one_call_and_single_tokens_agree(hybrid: Model, words: list[int], logits: np.ndarray[Any, Any]) -> None:
    """Whatever the calls, before all passes and after those of a target that fuses most; a reset forgets it all."""
    graph, _ = pipeline("tvm", chunk=CHUNK, scheme=scheme("none")).run(hybrid.trace())
    for stage in (hybrid.trace(), graph):
        session = Case(graph=stage).session(chunk=CHUNK)
        for cuts in ([150], [1] * 30, [3, 37, 1, 80]):
            session.reset()
            rows, first = [], 0
            for count in cuts:
                rows += list(session.feed(words[first : first + count], wanted="all"))
                first += count
            assert np.abs(np.concatenate(rows) - logits[:first]).max() < FP32_LOGITS, cuts
        assert session.cache_bytes() == {"local": 0, "global": 2 * 2 * 16 * 4 * 512, "summary": 3 * KEPT}


def test_an_artifact_of_int8_weights(
    hybrid: Model, words: list[int], logits: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    artifact = transom.compile(hybrid, target="onnxruntime", quant="int8", context=256, chunk=CHUNK, out=tmp_path / "a")
    summaries = [state for state in artifact.manifest.decode.states if not state.is_ring]
    assert sum(4 * state.numbers for state in summaries) == 3 * KEPT
    session = transom.open(tmp_path / "a", threads=1)
    rows = session.logits(words)
    difference = np.sqrt(np.square(rows - logits).mean())
    assert FP32_LOGITS < difference < INT8_ACTIVATIONS * logits.std() / 2.5, "more than rounded weights and activations"
    assert session.cache_bytes()["summary"] == 3 * KEPT
    code = bisect("eager", "onnx@ConvertQuantized", model=hybrid, quant="int8", chunk=CHUNK, length=50, decode=2)
    assert not code.diverged, code


def test_validation_and_bisection(hybrid: Model) -> None:
    assert validate_sources(hybrid, targets=["reference"]).passed
    verdict = bisect("reference", "eager", model=hybrid, chunk=CHUNK, length=50, decode=2)
    assert not verdict.diverged, verdict


def _rates_of_the_next_layer(graph: Graph, node: Node) -> None:
    names = {name: placeholder for placeholder, name in graph.weight_names().items()}
    node.update_arg(2, graph.placeholders()[names["layers.3.mixer.A_log"]])


FAULTS = {
    "another layer's rates": (Spoil(ops.STATE_SPACE, _rates_of_the_next_layer, "layers.1.mixer"), 1, "state_space"),
    "no bias": (Spoil(ops.CAUSAL_CONVOLUTION, argument(4, None), "layers.0.mixer.conv1d"), 0, "convolution"),
    "gates in bfloat16": (
        Spoil(LINEAR, weight(lambda rows: rows.bfloat16().float()), "layers.3.mixer.in_proj"), 3, "quantisation",
    ),
}  # fmt: skip
"""The fault, and the layer and the operation that bisection names."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_placed(hybrid: Model, name: str) -> None:
    fault, layer, op = FAULTS[name]
    graph = Case(graph=hybrid.trace()).run(AddTaps()).graph
    calls = plan_calls(window=8, chunk=CHUNK, decode=2)
    context = Context(graph=graph, tokens=list(range(calls[-1].stop)))
    right, wrong = (
        record(ReferenceSession(one, context=256, chunk=CHUNK), calls, context)
        for one in (graph, Case(graph=graph).run(fault).graph)
    )
    verdict = compare(right, wrong, context)
    assert (verdict.diverged, verdict.layer, verdict.op) == (True, layer, op), verdict


def token_by_token(
    x: torch.Tensor, steps: torch.Tensor, rates: torch.Tensor, keys: torch.Tensor, queries: torch.Tensor, skip: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence as the paper writes it, in float64, from a state of zeros."""
    x, steps, rates, keys, queries, skip = (value.double() for value in (x, steps, rates, keys, queries, skip))
    share = x.shape[2] // keys.shape[2]
    state, rows = torch.zeros(x.shape[0], *x.shape[2:], keys.shape[3], dtype=torch.float64), []
    for token in range(x.shape[1]):
        key, query = (value[:, token].repeat_interleave(share, 1)[:, :, None] for value in (keys, queries))
        decay = (-steps[:, token] * rates.exp())[..., None, None].exp()
        state = decay * state + (steps[:, token, :, None] * x[:, token])[..., None] * key
        rows.append((state * query).sum(-1) + skip[:, None] * x[:, token])
    return torch.stack(rows, 1), state


def operands(tokens: int, *, burst: float) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, keys, queries = (torch.randn(1, tokens, *size, generator=draw) for size in ((4, 8), (2, 16), (2, 16)))
    steps = 0.01 * torch.rand(1, tokens, 4, generator=draw)
    # Whoever subtracts running sums has no digits left for what comes after these.
    steps[:, :20] = burst
    return [x, steps, torch.tensor([-1.0, 0.0, 1.0, 2.5]), keys, queries, torch.randn(4, generator=draw)]


@pytest.mark.parametrize("tokens", [1, ops.PIECE - 1, ops.PIECE, ops.PIECE + 1, 3 * ops.PIECE + 5])
def test_the_state_space_is_the_recurrence(tokens: int) -> None:
    given = operands(tokens, burst=20.0)
    expected, after = token_by_token(*given)
    y, state = ops.STATE_SPACE(*given, None, None)
    assert (y - expected).abs().max() < FP32_SUMS * expected.abs().max()
    assert (state - after).abs().max() < FP32_SUMS * after.abs().max()


def test_the_operations_have_gradients() -> None:
    given = [value.requires_grad_() for value in operands(70, burst=0.1)]
    ours = torch.autograd.grad(ops.STATE_SPACE(*given, None, None)[0].square().sum(), given)
    theirs = torch.autograd.grad(token_by_token(*given)[0].square().sum(), given)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 10 * FP32_SUMS * other.abs().max()
    x, weight = torch.randn(2, 9, 6, requires_grad=True), torch.randn(6, 1, 4, requires_grad=True)
    convolved = nn.functional.conv1d(x.mT, weight, padding=3, groups=6)[..., :9].mT
    ours = torch.autograd.grad(ops.CAUSAL_CONVOLUTION(x, None, None, weight, None)[0].square().sum(), (x, weight))
    theirs = torch.autograd.grad(convolved.square().sum(), (x, weight))
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(ours, theirs, strict=True))


def test_what_pads_a_call_leaves_no_trace() -> None:
    """XLA's programs have fixed sizes: a call of fewer tokens is padded, and says how many count."""
    jax = pytest.importorskip("jax")
    from transom.export.xla import summaries

    x, steps, rates, keys, queries, skip = operands(ops.PIECE + 8, burst=0.1)
    count, state, before = ops.PIECE + 3, torch.randn(1, 4, 8, 16), torch.randn(1, 3, 32)
    weight, start = torch.randn(32, 1, 4), torch.tensor(5)
    cut = [value[:, :count] for value in (x, steps)], [value[:, :count] for value in (keys, queries)]
    expected, after = ops.STATE_SPACE(*cut[0], rates, *cut[1], skip, state, start)
    arrays = [jax.numpy.asarray(value.numpy()) for value in (x, steps, rates, keys, queries, skip, state, start)]
    y, state_after = jax.jit(summaries.state_space)(*arrays, count=jax.numpy.int32(count))
    assert np.abs(np.asarray(y)[:, :count] - expected.numpy()).max() < FP32_SUMS * expected.abs().max()
    assert np.abs(np.asarray(state_after) - after.numpy()).max() < FP32_SUMS * after.abs().max()
    rows = x.flatten(2)
    _, kept = ops.CAUSAL_CONVOLUTION(rows[:, :count], before, start, weight, None)
    arrays = [jax.numpy.asarray(value.numpy()) for value in (rows, before, start, weight)]
    _, kept_after = jax.jit(summaries.causal_convolution)(*arrays, None, count=jax.numpy.int32(count))
    np.testing.assert_array_equal(np.asarray(kept_after), kept.numpy())


@pytest.mark.parametrize(
    ("name", "millions", "kept"),
    [
        ("mamba2-130m", 129, 24 * (4 * 24 * 64 * 128 + 2 * 3 * 1792)),
        ("mamba2-370m", 368, 48 * (4 * 32 * 64 * 128 + 2 * 3 * 2304)),
        ("mamba2-780m", 780, 48 * (4 * 48 * 64 * 128 + 2 * 3 * 3328)),
        ("mamba2-1.3b", 1344, 48 * (4 * 64 * 64 * 128 + 2 * 3 * 4352)),
        ("mamba2-2.7b", 2703, 64 * (4 * 80 * 64 * 128 + 2 * 3 * 5376)),
    ],
)
def test_released_sizes_and_what_they_keep_at_any_length(name: str, millions: int, kept: int) -> None:
    config = preset(name)
    assert round(parameters(config) / 1e6) == millions
    for context in (1, 1000, 1_000_000):
        planned = plan(config, context=context)
        assert planned.cache_bytes_bounded == planned.cache_bytes_global_only == kept
        assert {(layer.kind, layer.slots) for layer in planned.layers} == {("summary", 0)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 6}, "6 heads of 16 are 96 wide, expected 128"),
        ({"taps": 1}, "a convolution of 1 taps keeps nothing"),
        ({"attention_layers": (3,)}, "expected layers from 0 to 2, ascending"),
        ({"attention_heads": 3, "attention_kv_heads": 2}, "3 attention heads cannot share 2 kv heads"),
        ({"state_size": 0}, "state_size is 0, expected a whole number"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(preset("mamba2-tiny"), **changes)


def test_states_are_declared_by_layer(hybrid: Model) -> None:
    states: tuple[State, ...] = hybrid.config.states
    assert [state.name for state in states[:5]] == [
        "cache.0.convolution", "cache.0.state", "cache.1.convolution", "cache.1.state", "cache.2.key",
    ]  # fmt: skip
    assert {state.dtype for state in states if state.name.endswith(".state")} == {"float32"}, "in bfloat16 models too"


@pytest.mark.parametrize("groups", [1, 4])
def test_a_gguf_file_holds_rates_in_the_place_of_their_logarithms(tmp_path: Path, groups: int) -> None:
    """Beside that, a tied head, and one norm a group; rows are the same, one by one and together."""
    config = STORABLE["mamba2"]
    assert isinstance(config, Mamba2Config)
    config = dataclasses.replace(config, name="file", num_kv_heads=groups, tied=True)
    weights = random_weights(config, 1)
    again, checkpoint = open_gguf(write_gguf(tmp_path / "file.gguf", config, weights))
    assert again == config and checkpoint.left_out == ()
    for name, recipe in weights.items():
        rows, whole = checkpoint.weights[name], recipe.read()
        rates = torch.from_numpy(np.exp(whole.numpy())) if name.endswith("A_log") else None
        expected = whole if rates is None else rates.double().log().float()
        assert rows.shape == recipe.shape and torch.equal(rows.read(), expected), name
        assert torch.equal(rows.read_rows(3, 7), expected[3:7]), name


@pytest.mark.parametrize(
    ("metadata", "error", "words"),
    [
        ({"ssm.time_step_rank": 7}, ConfigError, "time_step_rank is 7, so many heads do not share a width of 128"),
        ({"ssm.group_count": None}, ConfigError, "group_count is None, expected a number"),
        ({"ssm.group_count": 4}, CheckpointError, r"ssm_in\.weight has shape \[328, 64\], expected \[392, 64\]"),
        ({"attention.head_count": 8}, ConfigError, "head_count is 8, only 0 is supported"),
        ({"ssm.dt_b_c_rms": True}, ConfigError, "dt_b_c_rms is True, only False is supported"),
    ],
)
def test_gguf_files_that_are_not_read(
    tmp_path: Path, metadata: dict[str, object], error: type[Exception], words: str
) -> None:
    config = STORABLE["mamba2"]
    with pytest.raises(error, match=words):
        open_gguf(write_gguf(tmp_path / "file.gguf", config, random_weights(config, 1), metadata=metadata))


def test_rates_that_grow_are_refused(tmp_path: Path) -> None:
    config, name = STORABLE["mamba2"], "layers.1.mixer.A_log"
    weights = random_weights(config, 1) | {name: Weight.of(torch.full((8,), -200.0))}
    _, checkpoint = open_gguf(write_gguf(tmp_path / "file.gguf", config, weights))
    with pytest.raises(CheckpointError, match=r"blk\.1\.ssm_a holds -?0, expected rates below zero"):
        checkpoint.weights[name].read()
