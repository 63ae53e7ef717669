"""What is Gemma 4's own: its configs, values that are keys, layers that share keys and values, its sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import transom
from tests.case import Case
from tests.tolerances import FLOAT16_LOGITS, FP32_LOGITS
from tests.zoo.tiny_gguf import STORABLE, write_gguf
from transom.errors import CheckpointError, ConfigError
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.passes.pipelines import PIPELINES, pipeline
from transom.zoo.architectures import architecture, build_empty, preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.config import DecoderConfig
from transom.zoo.gemma4_config import Gemma4Config
from transom.zoo.huggingface import left_out, read_config, write_config
from transom.zoo.model import Model, load
from transom.zoo.plan import plan

ROPES = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "bos_token_id": 2,
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1536,
    "hidden_size_per_layer_input": 256,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_text",
    "moe_intermediate_size": None,
    "num_attention_heads": 8,
    "num_experts": None,
    "num_global_key_value_heads": None,
    "num_hidden_layers": 35,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": ROPES,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": True,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}
"""The text part of E2B's config.json, as released."""

OF_12B = {
    "attention_k_eq_v": True,
    "hidden_size": 3840,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 15360,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8,
    "max_position_embeddings": 262144,
    "model_type": "gemma4_unified_text",
    "num_attention_heads": 16,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_kv_shared_layers": 0,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
    "use_double_wide_mlp": False,
}
"""What the 12B says besides."""

OF_26B = {
    **OF_12B,
    "enable_moe_block": True,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
    "model_type": "gemma4_text",
    "moe_intermediate_size": 704,
    "num_experts": 128,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 30,
    "top_k_experts": 8,
}
"""What 26B-A4B says besides."""

E2B = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": {"model_type": "gemma4_audio"},
    "boa_token_id": 256000,
    "image_token_id": 258880,
    "model_type": "gemma4",
    "text_config": TEXT,
    "tie_word_embeddings": True,
    "vision_config": {"model_type": "gemma4_vision"},
}
UNIFIED = {
    **E2B,
    "architectures": ["Gemma4UnifiedForConditionalGeneration"],
    "model_type": "gemma4_unified",
    "text_config": {**TEXT, **OF_12B},
}


STORED = STORABLE["gemma4"]


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("gemma4-tiny")


@pytest.fixture(scope="module")
def experts() -> Model:
    return load("gemma4-experts-tiny")


def read(folder: Path, data: dict[str, Any]) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(data))
    return read_config(folder)


@pytest.mark.parametrize(
    ("data", "name"),
    [(TEXT, "gemma4-e2b"), (E2B, "gemma4-e2b"), (UNIFIED, "gemma4-12b"), ({**TEXT, **OF_26B}, "gemma4-26b-a4b")],
    ids=["text", "e2b", "12b", "26b"],
)
def test_released_forms(tmp_path: Path, data: dict[str, Any], name: str) -> None:
    assert dataclasses.replace(read(tmp_path, data), name=name) == preset(name)
    assert left_out(tmp_path) == ()


@pytest.mark.parametrize("kind", ["Gemma4TextConfig", "Gemma4UnifiedTextConfig"])
def test_what_is_absent_is_the_default_of_the_class(tmp_path: Path, kind: str) -> None:
    theirs = getattr(transformers, kind)()
    sparse = read(tmp_path, {"model_type": theirs.model_type})
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path) == sparse


def test_the_last_layer_is_global_whatever_the_config_says(tmp_path: Path) -> None:
    config = read(
        tmp_path, {**TEXT, "layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 30 + TEXT["layer_types"][:1]}
    )
    assert config.layers[-1].window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "silu"}, 'hidden_activation is "silu"'),
        ({"use_bidirectional_attention": "all"}, 'use_bidirectional_attention is "all": only null is supported'),
        ({"sliding_window_pattern": 5}, "sliding_window_pattern is 5: only 6 is supported"),
        ({"enable_moe_block": 1}, "enable_moe_block is 1: expected true or false"),
        ({"enable_moe_block": True}, "num_experts is null: expected a whole number"),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8},
            "5 of 4 experts are chosen",
        ),
        ({"use_double_wide_mlp": 1}, "use_double_wide_mlp is 1: expected true or false"),
        ({"attention_k_eq_v": None}, "attention_k_eq_v is null: expected true or false"),
        ({"vocab_size_per_layer_input": 7}, "vocab_size_per_layer_input is 7: expected as many rows"),
        ({"hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input is -1: expected a whole number"),
        ({"num_kv_shared_layers": 35}, "num_kv_shared_layers is 35: expected a whole number from 1 to 34"),
        ({"num_kv_shared_layers": 31}, "last 31 layers read the keys and values of others, but no global layer"),
        ({"attention_k_eq_v": True, "num_global_key_value_heads": 3}, "8 query heads cannot share 3 kv heads"),
        ({"global_head_dim": 7}, "rotary embedding needs an even head_dim, got 7"),
        ({"per_layer_config": {"04": {"head_dim": 64}}}, "per_layer_config is"),
        ({"per_layer_config": {"0": 7}}, "per_layer_config is"),
        (
            {"rope_parameters": {**ROPES, "full_attention": {**ROPES["full_attention"], "partial_rotary_factor": 1.5}}},
            "full_attention: partial_rotary_factor is 1.5, expected at most 1",
        ),
        (
            {"rope_parameters": {**ROPES, "sliding_attention": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}},
            "sliding_attention: partial_rotary_factor of its rotary embedding is not understood",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_module_does_not_compute_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {**TEXT, **change})
    assert message in str(caught.value)


def test_experts_and_values_that_are_keys(experts: Model, tmp_path: Path) -> None:
    """Logits up to three windows, from a checkpoint of ours, and the config that transformers makes of it."""
    config, W = experts.config, experts.config.longest_window
    assert W is not None and "layers.2.self_attn.v_proj.weight" not in experts.weights
    write_checkpoint(tmp_path, config, experts.weights, dtype=torch.float32)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    ours, words = load(tmp_path), torch.randint(0, 512, (3 * W + 5,), generator=torch.Generator().manual_seed(1))
    assert theirs.state_dict()["model.layers.1.experts.gate_up_proj"].shape == (8, 64, 64)
    for length in (W - 1, W, W + 1, 2 * W, 3 * W + 5):
        with torch.no_grad():
            expected = theirs(words[None, :length]).logits
            difference = expected - ours.eager()(words[None, :length], torch.tensor(0), None)[0]
        assert difference.abs().max() < FP32_LOGITS, length
    theirs.config.save_pretrained(tmp_path / "again")
    assert dataclasses.replace(read_config(tmp_path / "again"), name=config.name) == config


@pytest.mark.parametrize("target", PIPELINES)
def test_lists_of_passes_with_experts(target: str, experts: Model) -> None:
    """Chunks longer than the window, decoding over the wrap, bytes of caches."""
    case, chunk, W = Case.of(experts), 21, 16
    graph, records = pipeline(target, chunk=chunk, scheme=scheme("none")).run(case.graph)
    assert len(graph.calls(ops.EXPERTS)) == 3 and not any(record.skipped for record in records)
    ids = torch.randint(0, 512, (4 * W,), generator=torch.Generator().manual_seed(7)).tolist()
    with torch.no_grad():
        expected = experts.eager()(torch.tensor([ids]), torch.tensor(0), None)[0][0].numpy()
    session = dataclasses.replace(case, graph=graph).session(chunk=chunk)
    actual = [session.logits(ids[: 3 * W + 5]), *(session.decode(token)[None] for token in ids[3 * W + 5 :])]
    assert np.abs(np.concatenate(actual) - expected).max() < FP32_LOGITS
    slots = W if target in ("xla", "tvm") else W + chunk - 1
    # Keys and values of two local layers with four heads, 16 wide, and of a global one with two, 32 wide.
    sizes = session.cache_bytes()
    assert sizes["local"] == 4 * 2 * 2 * 4 * 16 * slots and sizes["global"] % (4 * 2 * 2 * 32) == 0


@pytest.mark.parametrize(("target", "quant"), [("onnxruntime", "none"), ("reference", "int8")])
def test_artifacts_with_experts(target: str, quant: str, experts: Model) -> None:
    """With codes, runtimes round activations, so that here and there another expert is chosen."""
    assert transom.validate(experts, targets=[target], quant=quant, threads=1).passed


def test_keys_and_values_that_no_layer_reads_are_left_out(tmp_path: Path) -> None:
    """Released checkpoints hold projections of layers that share others'; a layer that keeps its own needs them."""
    config = preset("gemma4-tiny")
    weights = dict(random_weights(config, 0))
    for name in ("k_proj", "v_proj", "k_norm"):
        weights[f"layers.4.self_attn.{name}.weight"] = weights[f"layers.1.self_attn.{name}.weight"]
    write_checkpoint(tmp_path / "more", config, weights)
    (line,) = (line for line in load(tmp_path / "more").left_out if "no layer reads" in line)
    assert "model.layers.4.self_attn.k_proj.weight" in line
    del weights["layers.1.self_attn.k_proj.weight"]
    write_checkpoint(tmp_path / "less", config, weights)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors are missing: model.layers.1.self_attn.k_proj.weight"):
        load(tmp_path / "less")


def test_what_gguf_files_hold_otherwise(tmp_path: Path) -> None:
    """Values of their own, gates and ups apart, and what layers that share keys and values have no use for."""
    assert isinstance(STORED, Gemma4Config)
    config = dataclasses.replace(STORED, keys_as_values=False, name="again")
    weights = random_weights(config, 3)
    extra = dict(weights)
    for part in ("k_proj", "v_proj", "k_norm"):
        extra[f"layers.4.self_attn.{part}.weight"] = weights[f"layers.1.self_attn.{part}.weight"]
    again = load(write_gguf(tmp_path / "again.gguf", config, extra, gates_apart=True))
    assert again.config == config
    assert all(torch.equal(again.weights[name].read(), weight.read()) for name, weight in weights.items())
    (line,) = (line for line in again.left_out if "no layer reads" in line)
    assert "blk.4.attn_k.weight" in line


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"attention.sliding_window_pattern": None}, "expected whether each layer is local"),
        ({"attention.sliding_window_pattern": 6}, "expected whether each layer is local"),
        ({"attention.sliding_window": 0}, "attention.sliding_window is 0"),
        ({"attention.scale": 0.125}, "attention.scale is 0.125, but llama.cpp takes 1"),
        ({"attention.key_length_swa": None}, "attention.key_length_swa is None"),
        ({"attention.value_length_swa": 32}, "attention.value_length_swa is 32, but keys are 64 wide"),
        ({"rope.dimension_count": 32}, "rope.dimension_count is 32, but keys are 128 wide"),
        ({"attention.head_count_kv": [2, 1, 1, 2, 2]}, "expected one number for local and one for global layers"),
        ({"attention.shared_kv_layers": 1}, "expected a local and a global layer as the last ones"),
        ({"feed_forward_length": [256, 256, 512, 512, 512]}, "expected one width, or twice that"),
        ({"rope.scaling.type": "yarn"}, "'yarn'"),
        ({"embedding_length_per_layer_input": None}, "embedding_length_per_layer_input is None"),
    ],
    ids=str,
)  # fmt: skip
def test_gguf_files_of_another_model_are_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "other.gguf", STORED, random_weights(STORED, 0), metadata=metadata)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)


def test_a_gguf_file_must_say_which_pairs_turn(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "g.gguf", STORED, random_weights(STORED, 0), skip=("rope_freqs.weight",))
    with pytest.raises(ConfigError, match=r"rope_freqs.weight is not what says how many of 64 pairs turn"):
        load(path)


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-e4b", "gemma4-12b", "gemma4-26b-a4b", "gemma4-31b"])
def test_sizes_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Names and shapes of every tensor, without memory; and the bytes of caches, by hand."""
    config = preset(name)
    assert isinstance(config, Gemma4Config)
    write_config(config, tmp_path)
    theirs_config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(theirs_config)
    expected = {key.removeprefix("model."): value.shape for key, value in theirs.state_dict().items()}
    del expected["lm_head.weight"]
    stacked = architecture(config.architecture).huggingface.stacked
    for key, value in build_empty(config).state_dict().items():
        how = stacked(config, key)
        assert expected.pop(key) == (value.shape if how is None else how.shape(tuple(value.shape))), key
    assert not expected
    owners = config.layer_kinds[: config.unshared]
    local = owners.count("local") * config.num_kv_heads * 256
    growing = owners.count("global") * config.global_kv_heads * 512
    assert config.window is not None
    assert plan(config, context=8192).cache_bytes_bounded == 4 * (local * config.window + growing * 8192)


def test_which_layer_reads_which() -> None:
    config = preset("gemma4-e2b")
    assert isinstance(config, Gemma4Config)
    assert [config.source(index) for index in (0, 4, 14, 15, 18, 19, 33, 34)] == [0, 4, 14, 13, 13, 14, 13, 14]
    assert [layer.kv_heads for layer in config.layers] == [1] * 15 + [0] * 20
    assert [state.layer for state in config.states] == [index for index in range(15) for _ in range(2)]


@pytest.mark.parametrize("target", PIPELINES)
def test_artifacts_of_every_target(target: str, tiny: Model, tmp_path: Path) -> None:
    """Shared keys and values and heads of two widths: right over the wrap of rings, in the bytes of their formula."""
    chunk, context, W = 21, 256, 16
    ids = torch.randint(0, 512, (5 * W,), generator=torch.Generator().manual_seed(7)).tolist()
    with torch.no_grad():
        logits = tiny.eager()(torch.tensor([ids]), torch.tensor(0), None)[0][0].numpy()
    half = target == "tensorrt"  # whose file the CPU runs, to check its numbers
    dtype = "float16" if half else "float32"
    transom.compile(tiny, target=target, dtype=dtype, context=context, chunk=chunk, out=tmp_path / "artifact")
    session = transom.open(tmp_path / "artifact", threads=1)
    tolerance = FLOAT16_LOGITS if half else FP32_LOGITS
    actual = [session.logits(ids[: 3 * W + 5]), *(session.decode(token)[None] for token in ids[3 * W + 5 :])]
    assert np.abs(np.concatenate(actual) - logits).max() < tolerance
    slots = W if target in ("xla", "tvm") else W + chunk - 1
    # Keys and values of two heads: two local layers 16 wide, one global layer 32 wide.
    number = 2 if half else 4
    assert session.cache_bytes() == {"local": number * 4 * 2 * 16 * slots, "global": number * 4 * 32 * context}
