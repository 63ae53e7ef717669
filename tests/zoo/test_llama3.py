"""What is Llama 3's own: its configs, its scaled rotary embedding, its GGUF files, and SmolLM2's real weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from tests.tolerances import FP32_LOGITS
from tests.zoo.tiny_gguf import STORABLE, write_gguf
from transom.errors import CheckpointError, ConfigError
from transom.zoo.architectures import packaged, preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.config import DecoderConfig
from transom.zoo.huggingface import left_out, read_config
from transom.zoo.llama3 import Llama3Config
from transom.zoo.model import load
from transom.zoo.rope import Llama3Rope, Rope

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
OLD_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14_336,
    "max_position_embeddings": 131_072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": SCALING,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128_256,
}
NEW_8B = {key: value for key, value in OLD_8B.items() if not key.startswith("rope_")} | {
    "rope_parameters": {**SCALING, "rope_theta": 500_000.0},
    "head_dim": 128,
}
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100_000,
    "tie_word_embeddings": True,
    "vocab_size": 49_152,
}


def read(folder: Path, data: dict[str, Any]) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(data))
    return read_config(folder)


@pytest.mark.parametrize(
    ("data", "name"), [(OLD_8B, "llama3.1-8b"), (NEW_8B, "llama3.1-8b"), (SMOLLM2, "smollm2-135m")]
)
def test_published_forms(tmp_path: Path, data: dict[str, Any], name: str) -> None:
    assert dataclasses.replace(read(tmp_path, data), name=name) == preset(name)


def test_keys_without_a_use_are_listed(tmp_path: Path) -> None:
    read(tmp_path, SMOLLM2)
    assert left_out(tmp_path) == ("config.json: nothing reads the keys is_llama_config",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu": only "silu" is supported'),
        ({"attention_bias": True}, "attention_bias is true: only false is supported"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"rope_scaling": {**SCALING, "rope_type": "yarn"}}, "low_freq_factor of its rotary embedding is not"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_scaling": {**SCALING, "low_freq_factor": 4.0}}, "low_freq_factor 4 must be less than high_freq"),
        ({"rope_scaling": {**SCALING, "original_max_position_embeddings": None}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**SCALING, "attention_factor": 2.0}}, "attention_factor of its rotary embedding is not"),
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings"),
        ({"rope_parameters": {**SCALING, "rope_theta": 1e4}}, "rope_theta is 10000.0 in rope_parameters and 500000"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5 kv heads"),
        ({"head_dim": 3}, "even head_dim"),
        ({"tie_word_embeddings": "yes"}, "expected true or false"),
        ({"quantization_config": {"quant_method": "awq"}}, "packed by awq"),
    ],
    ids=str,
)
def test_what_the_zoo_does_not_hold(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path, OLD_8B | change)
    assert message in str(refusal.value)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequencies_are_those_of_transformers(factor: float) -> None:
    parameters = {**SCALING, "factor": factor, "rope_theta": 5e5}
    theirs = transformers.LlamaConfig(head_dim=128, rope_parameters=parameters)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    ours = Llama3Rope(theta=5e5, factor=factor).frequencies(128)
    assert torch.equal(ours, rotary.inv_freq)
    divisors = Rope(theta=5e5).frequencies(128) / ours
    assert divisors.min() == 1 and divisors.max() == factor and 1 < divisors.median() < factor


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_may_be_tied(tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(tiny(), tied=tied)
    weights = random_weights(config, 0)
    assert ("lm_head.weight" in weights) != tied
    write_checkpoint(tmp_path, config, weights, dtype=torch.float32)
    ids_BT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        ours_BTV, _ = load(tmp_path).eager()(ids_BT, torch.tensor(0), None)
        assert (ours_BTV - theirs(ids_BT).logits).abs().max() < FP32_LOGITS


def test_frequencies_of_another_model_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(STORABLE["llama3"], name="file")
    assert isinstance(config, Llama3Config)
    good = write_gguf(tmp_path / "file.gguf", config, random_weights(config, 0))
    assert load(good).config == config
    odd = dataclasses.replace(config, rope=Llama3Rope(theta=5e5, factor=8.0, original_context=4096))
    bad = write_gguf(tmp_path / "odd.gguf", odd, random_weights(odd, 0))
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight scales positions in another way"):
        load(bad)
    ones = dataclasses.replace(config, name="ones", rope=Llama3Rope(theta=5e5, factor=1.0))
    plain = load(write_gguf(tmp_path / "ones.gguf", ones, random_weights(ones, 0))).config
    assert plain == dataclasses.replace(ones, rope=Rope(theta=5e5))


def tiny() -> Llama3Config:
    config = preset("llama3-tiny")
    assert isinstance(config, Llama3Config)
    return config


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        return packaged("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(str(error))


def test_smollm2_is_what_its_file_holds(file: Path) -> None:
    """Queries read by hand from the file, put back into the order that the converter changed."""
    model = load("smollm2-135m")
    assert dataclasses.replace(model.config, name="smollm2-135m") == preset("smollm2-135m")
    assert model.parameters == 134_515_008
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}["blk.7.attn_q.weight"]
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    expected = values.reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    assert np.array_equal(model.weights["layers.7.self_attn.q_proj.weight"].read().numpy(), expected)
