"""Rotary embeddings against transformers': frequencies, magnitudes, and what a config says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from transom.errors import ConfigError
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.huggingface import read_config, rope_parameters
from transom.zoo.llama3 import Llama3Config
from transom.zoo.rope import Rope, YarnRope, rotation

PLAIN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 128, "rope_type": "yarn"}
LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 512, "rope_theta": 1e6,
}  # fmt: skip

YARNS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "whole pairs or not": {**PLAIN, "truncate": False},
    "as gpt-oss": {
        "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "rope_type": "yarn",
        "original_max_position_embeddings": 4096,
    },
    "as Ministral 3": {
        **PLAIN, "factor": 16.0, "original_max_position_embeddings": 16_384, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "as DeepSeek": {**PLAIN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "one of two weights": {**PLAIN, "mscale": 0.707},
    "other bounds": {**PLAIN, "beta_fast": 8.0, "beta_slow": 2.0},
    "a ramp of no width": {**PLAIN, "original_max_position_embeddings": 1},
    "a factor of its own": {**PLAIN, "attention_factor": 0.5, "mscale": 1.0, "mscale_all_dim": 2.0},
    "shrunk": {**PLAIN, "factor": 0.5},
    "null is absent": {**PLAIN, "beta_fast": None, "attention_factor": None},
}  # fmt: skip


def read(folder: Path, **change: Any) -> Rope:
    (folder / "config.json").write_text(json.dumps(LLAMA | change))
    config = read_config(folder)
    assert isinstance(config, Llama3Config)
    return config.rope


@pytest.mark.parametrize("scaling", YARNS.values(), ids=YARNS)
def test_yarn_is_that_of_transformers(tmp_path: Path, scaling: dict[str, Any]) -> None:
    rope = read(tmp_path, rope_scaling=scaling)
    assert isinstance(rope, YarnRope)
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(rope.frequencies(64), theirs.inv_freq) and rope.magnitude == theirs.attention_scaling
    positions_T = torch.tensor([0, 1, 127, 128, 511, 5000])
    for ours, half in zip(rotation(positions_T, rope, 64), theirs(torch.zeros(1), positions_T[None]), strict=True):
        assert torch.equal(ours, half[0, :, :32])
    # Either generation, and what we write, says the same.
    assert read(tmp_path, rope_parameters={**scaling, "rope_theta": 1e6}) == rope
    assert read(tmp_path, rope_theta=None, rope_parameters=rope_parameters(rope)) == rope
    assert read(tmp_path, rope_scaling={"type" if key == "rope_type" else key: scaling[key] for key in scaling}) == rope


@pytest.mark.parametrize(
    ("fraction", "turning", "factor"), [(0.25, 8, 1.0), (0.3, 9, 2.0), (1.0, 32, 1.0), (None, 32, 1.0)]
)
def test_proportional_is_that_of_transformers(tmp_path: Path, fraction: float, turning: int, factor: float) -> None:
    """A part of the pairs turns; how many is rounded down."""
    scaling = {"rope_type": "proportional", "partial_rotary_factor": fraction, "rope_theta": 1e6, "factor": factor}
    scaling = {key: value for key, value in scaling.items() if value is not None}
    rope = read(tmp_path, rope_theta=None, rope_parameters=scaling)
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(rope.frequencies(64), theirs.inv_freq) and int(theirs.inv_freq.count_nonzero()) == turning
    assert read(tmp_path, rope_theta=None, rope_parameters=rope_parameters(rope)) == rope


def test_yarn_stretches_slow_pairs_only() -> None:
    plain, yarn = Rope(theta=1e6), YarnRope(theta=1e6, factor=4.0, original_context=4096)
    divisors = plain.frequencies(64, dtype=torch.float64) / yarn.frequencies(64, dtype=torch.float64)
    assert divisors[0] == 1 and abs(divisors[-1] - 4) < 1e-12 and bool((divisors.diff() > -1e-12).all())
    assert 0 < int(((divisors > 1.01) & (divisors < 3.99)).sum()) < 32
    assert plain.magnitude == 1 and yarn.magnitude == pytest.approx(1.1386294)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": None}, "the factor of its rotary embedding is null"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is null"),
        ({"truncate": 0}, "truncate is 0, expected true or false"),
        ({"beta_slow": 32.0}, "beta_slow 32 must be less than beta_fast 32"),
        ({"beta_fast": -1}, "beta_fast is -1, expected a positive"),
        ({"attention_factor": 0.0}, "attention_factor is 0.0, expected a positive"),
        ({"mscale": -1.0, "mscale_all_dim": 1.0}, "mscale is -1.0, expected a positive"),
        ({"rope_theta": 1.0}, "rope_theta is 1, expected more than 1"),
        ({"low_freq_factor": 1.0}, "low_freq_factor of its rotary embedding is not understood"),
        ({"short_factor": [1.0]}, "short_factor is not understood there"),
        ({"rope_type": "dynamic"}, "rope_type 'dynamic' is not supported, only default, linear, llama3, yarn, prop"),
    ],
    ids=str,
)
def test_what_is_no_yarn_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, rope_theta=1e6 if "rope_theta" not in change else 1.0, rope_scaling={**PLAIN, **change})
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_transformers_overlooks_truncate_by_type_of_layer(tmp_path: Path) -> None:
    """So a config by type is refused where it matters, and is read where it does not."""
    gemma = {**LLAMA, "model_type": "gemma3_text", "num_key_value_heads": 2, "sliding_window_pattern": 1}
    path = tmp_path / "config.json"
    yarn = {**PLAIN, "rope_theta": 1e6}
    path.write_text(json.dumps(gemma | {"rope_parameters": {"full_attention": yarn}}))
    config = read_config(tmp_path)
    assert isinstance(config, Gemma3Config)
    assert config.rope_global == YarnRope(theta=1e6, factor=4.0, original_context=128)
    path.write_text(json.dumps(gemma | {"rope_parameters": {"full_attention": {**yarn, "truncate": False}}}))
    with pytest.raises(ConfigError, match="full_attention: truncate is false, which transformers overlooks"):
        read_config(tmp_path)
