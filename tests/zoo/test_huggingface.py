from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from transom.graphs.errors import ConfigError
from transom.zoo.config import DecoderConfig, Rope, tile
from transom.zoo.huggingface import read_config, write_config
from transom.zoo.presets import PRESETS, preset

# The 4B's first published config: what equals the class default is left out.
SPARSE_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
}
OLD_1B = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
NEW_1B = {key: value for key, value in OLD_1B.items() if not key.startswith(("rope", "sliding_window_p"))} | {
    "layer_types": ["full_attention" if (index + 1) % 6 == 0 else "sliding_attention" for index in range(26)],
    "_sliding_window_pattern": 6,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def read(folder: Path, data: object) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(data))
    return read_config(folder)


def named(config: DecoderConfig, name: str) -> DecoderConfig:
    return dataclasses.replace(config, name=name)


@pytest.mark.parametrize(
    ("data", "name"), [(SPARSE_4B, "gemma3-4b"), (OLD_1B, "gemma3-1b"), (NEW_1B, "gemma3-1b")], ids=["4b", "old", "new"]
)
def test_published_forms(tmp_path: Path, data: dict[str, Any], name: str) -> None:
    assert read(tmp_path, data) == named(preset(name), tmp_path.name)


@pytest.mark.parametrize("name", PRESETS)
def test_what_we_write_both_read(tmp_path: Path, name: str) -> None:
    config = preset(name)
    write_config(config, tmp_path)
    assert named(read_config(tmp_path), name) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.architectures == ["Gemma3ForCausalLM"]
    ours_global = [kind == "global" for kind in config.layer_kinds]
    assert [kind == "full_attention" for kind in theirs.layer_types] == ours_global
    assert theirs.query_pre_attn_scalar**-0.5 == config.attention_scale
    assert theirs.rope_parameters["full_attention"]["rope_theta"] == config.rope_global.theta
    assert theirs.rope_parameters["full_attention"].get("factor", 1.0) == config.rope_global.factor


def test_what_they_write_we_read(tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(num_hidden_layers=7, sliding_window_pattern=3, final_logit_softcapping=30.0)
    config.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert ours.layer_kinds == tile("LLG", 7)
    assert ours.logit_softcap == 30.0
    assert (ours.hidden_size, ours.window, ours.context) == (2304, 4096, 131_072)


def test_defaults_are_their_class_defaults(tmp_path: Path) -> None:
    """A config that says nothing must come out as transformers would fill it in."""
    sparse = read(tmp_path, {"model_type": "gemma3_text"})
    transformers.Gemma3TextConfig().save_pretrained(tmp_path)
    assert sparse == read_config(tmp_path)


def test_thetas_and_softcap_are_read(tmp_path: Path) -> None:
    config = read(tmp_path, OLD_1B | {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "final_logit_softcapping": 30.0})
    assert (config.rope_global, config.rope_local) == (Rope(theta=5e5), Rope(theta=2e4))
    assert config.logit_softcap == 30.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "unknown model_type 'llama': known are gemma3_text, gemma3"),
        ({"model_type": None}, "unknown model_type None"),
        ({"hidden_size": "wide"}, "of the wrong type"),
        ({"model_type": ["gemma3"]}, "unknown model_type"),
        ({"hidden_size": float("inf")}, "of the wrong type"),
        ({"query_pre_attn_scalar": -4}, "not positive"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "of the wrong type"),
        ({"hidden_activation": "relu"}, "hidden_activation = 'relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type 'yarn'"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 26 layers"),
        ({"layer_types": ["chunked_attention"] * 26}, "chunked_attention"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"num_hidden_layers": 0}, "layer"),
    ],
)
def test_what_the_zoo_does_not_hold(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, OLD_1B | change)
    assert "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="JSON object"):
        read(tmp_path, [])
    (tmp_path / "config.json").write_text('{"model_type": "gemma')
    with pytest.raises(ConfigError, match="not readable as JSON"):
        read_config(tmp_path)
