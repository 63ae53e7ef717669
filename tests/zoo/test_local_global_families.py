"""What is their own of OLMo 3, EXAONE 4.0, Cohere 2 and SmolLM3: published configs, and what their keys leave open."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tolerances import FP32_LOGITS
from tests.zoo.tiny_gguf import STORABLE, write_gguf
from transom.errors import ConfigError
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.config import LocalGlobalConfig, tile
from transom.zoo.huggingface import left_out, read_config
from transom.zoo.model import load
from transom.zoo.plan import parameters
from transom.zoo.smollm3 import SmolLM3Config

LLAMA3 = {
    "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
OLMO3: dict[str, Any] = {
    "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11_008, "max_position_embeddings": 65_536, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 500_000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": 1.2079441541679836,
    },
    "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 100_278, "eos_token_id": 100_257,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
}  # fmt: skip
EXAONE4: dict[str, Any] = {
    "architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4", "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 5120, "intermediate_size": 27_392, "max_position_embeddings": 131_072, "num_attention_heads": 40,
    "num_hidden_layers": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_scaling": LLAMA3,
    "rope_theta": 1_000_000, "sliding_window": 4096, "sliding_window_pattern": "LLLG", "tie_word_embeddings": False,
    "vocab_size": 102_400, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
}  # fmt: skip
EXAONE4_SMALL = EXAONE4 | {
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 4096, "max_position_embeddings": 65_536,
    "num_attention_heads": 32, "num_hidden_layers": 30, "sliding_window": None, "sliding_window_pattern": None,
    "tie_word_embeddings": True, "layer_types": ["full_attention"] * 30,
}  # fmt: skip
COMMAND_R7B: dict[str, Any] = {
    "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14_336, "layer_norm_eps": 1e-5, "layer_switch": 4,
    "logit_scale": 0.25, "max_position_embeddings": 132_096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50_000, "rotary_pct": 1.0,
    "sliding_window": 4096, "sliding_window_pattern": 4, "use_embedding_sharing": True, "use_gated_activation": True,
    "use_parallel_block": True, "use_parallel_embedding": False, "use_qk_norm": False, "vocab_size": 256_000,
}  # fmt: skip
SMOLLM3: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 11_008, "max_position_embeddings": 65_536, "max_window_layers": 28,
    "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 5e6, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128_256,
    "layer_types": ["full_attention"] * 36,
}  # fmt: skip


def read(folder: Path, data: dict[str, Any]) -> LocalGlobalConfig:
    (folder / "config.json").write_text(json.dumps(data))
    config = read_config(folder)
    assert isinstance(config, LocalGlobalConfig)
    return config


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (OLMO3, "olmo3-7b"), (EXAONE4, "exaone4-32b"), (EXAONE4_SMALL, "exaone4-1.2b"), (COMMAND_R7B, "command-r7b"),
        (SMOLLM3, "smollm3-3b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_published_forms(tmp_path: Path, data: dict[str, Any], name: str) -> None:
    assert dataclasses.replace(read(tmp_path, data), name=name) == preset(name)
    assert left_out(tmp_path) == ()


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("olmo3-7b", 7.30), ("olmo3-32b", 32.23), ("exaone4-1.2b", 1.28), ("exaone4-32b", 32.00), ("command-r7b", 8.03),
        ("command-a", 111.06), ("smollm3-3b", 3.08),
    ],
)  # fmt: skip
def test_sizes_are_the_published_ones(name: str, billions: float) -> None:
    assert round(parameters(preset(name)) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        (OLMO3, {"rope_theta": 1e6}, "transformers 5 takes it for the full layers only"),
        (OLMO3, {"sliding_window": None}, "layers of sliding_attention need one"),
        (OLMO3, {"sliding_window_pattern": 2}, "sliding_window_pattern is 2: only 4 is supported"),
        (EXAONE4, {"layer_types": None}, 'sliding_window_pattern is "LLLG": expected a positive whole number'),
        (COMMAND_R7B, {"use_parallel_block": False}, "use_parallel_block"),
        (COMMAND_R7B, {"use_qk_norm": True}, "use_qk_norm"),
        (COMMAND_R7B, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        (COMMAND_R7B, {"logit_scale": 0}, "logit_scale is 0: expected a positive finite number"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "expected 0 (no rotation) or 1 for each of 36 layers"),
        (SMOLLM3, {"layer_types": ["sliding_attention"] * 36}, "need use_sliding_window and sliding_window"),
    ],
    ids=lambda value: "" if isinstance(value, dict) and len(value) > 3 else str(value),
)
def test_what_the_zoo_does_not_hold(tmp_path: Path, data: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path, data | change)
    assert message in str(refusal.value)


def test_a_window_that_smollm3_uses_bounds_the_layers_without_positions(tmp_path: Path) -> None:
    data = {key: value for key, value in SMOLLM3.items() if key != "layer_types"}
    config = read(tmp_path, data | {"sliding_window": 512, "use_sliding_window": True})
    assert config.layer_kinds == tile("GGGL", 36) and config.window == 512
    assert isinstance(config, SmolLM3Config) and config.rotated == (True, True, True, False) * 9
    assert read(tmp_path, data | {"sliding_window": 512}).window is None


@pytest.mark.parametrize("name", ["exaone4-tiny", "smollm3-tiny"])
def test_without_a_window_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Every layer of EXAONE 4 is rotated then, and SmolLM3 is as released."""
    tiny = preset(name)
    assert isinstance(tiny, LocalGlobalConfig)
    config = dataclasses.replace(tiny, layer_kinds=tile("G", tiny.num_layers), window=None)
    write_checkpoint(tmp_path, config, random_weights(config, 0), dtype=torch.float32)
    ids_BT = torch.arange(3, 40)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        ours_BTV, _ = load(tmp_path).eager()(ids_BT, torch.tensor(0), None)
        assert (ours_BTV - theirs(ids_BT).logits).abs().max() < FP32_LOGITS


def test_gguf_files_that_say_nothing_of_windows(tmp_path: Path) -> None:
    """Files of OLMo 2 and of EXAONE's 1.2B have no window, and every layer is global."""
    for family in ("olmo3", "exaone4"):
        config = STORABLE[family]
        missing = {"attention.sliding_window": None, "attention.sliding_window_pattern": None}
        path = write_gguf(tmp_path / f"{family}.gguf", config, random_weights(config, 0), metadata=missing)
        read_back = load(path).config
        assert isinstance(read_back, LocalGlobalConfig)
        assert read_back.layer_kinds == tile("G", config.num_layers) and read_back.window is None
