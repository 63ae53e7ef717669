"""What is Gemma 2's own: published configs, and what their keys and those of GGUF files leave open."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.zoo.tiny_gguf import STORABLE, write_gguf
from transom.errors import ConfigError
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.config import tile
from transom.zoo.gemma2 import Gemma2Config
from transom.zoo.huggingface import left_out, read_config
from transom.zoo.model import load
from transom.zoo.plan import parameters

PUBLISHED: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02,
    "intermediate_size": 36_864, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32,
    "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0, "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096, "sliding_window_size": 4096,
    "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256_000,
}  # fmt: skip


def read(folder: Path, **changes: Any) -> Gemma2Config:
    (folder / "config.json").write_text(json.dumps(PUBLISHED | changes))
    config = read_config(folder)
    assert isinstance(config, Gemma2Config)
    return config


def test_the_published_form_is_the_preset(tmp_path: Path) -> None:
    assert dataclasses.replace(read(tmp_path), name="gemma2-27b") == preset("gemma2-27b")
    assert left_out(tmp_path) == ()


@pytest.mark.parametrize(("name", "billions"), [("gemma2-2b", 2.61), ("gemma2-9b", 9.24), ("gemma2-27b", 27.23)])
def test_sizes_are_the_published_ones(name: str, billions: float) -> None:
    assert round(parameters(preset(name)) / 1e9, 2) == billions


def test_bounds_may_be_missing_or_null(tmp_path: Path) -> None:
    config = read(tmp_path, attn_logit_softcapping=None, final_logit_softcapping=20)
    assert (config.attention_softcap, config.logit_softcap) == (None, 20.0)
    with pytest.raises(ConfigError, match="attn_logit_softcapping is 0: expected a positive finite number"):
        read(tmp_path, attn_logit_softcapping=0)


def test_a_gguf_file_that_says_little_is_read_as_llama_cpp_does(tmp_path: Path) -> None:
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window", "rope.freq_base")
    config = STORABLE["gemma2"]
    assert isinstance(config, Gemma2Config)
    path = write_gguf(tmp_path / "a.gguf", config, random_weights(config, 0), metadata=dict.fromkeys(keys))
    expected: dict[str, Any] = {"window": 4096, "attention_softcap": 50.0, "logit_softcap": 30.0, "name": "a"}
    assert load(path).config == dataclasses.replace(config, **expected)
    many = dataclasses.replace(config, layer_kinds=tile("LG", 46))
    path = write_gguf(tmp_path / "b.gguf", many, random_weights(many, 0))
    read_back = load(path).config
    assert isinstance(read_back, Gemma2Config) and read_back.query_scalar == many.hidden_size // many.num_heads
