from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.gemma import gemma, gemma_config
from transom.errors import ConfigError
from transom.zoo.architectures import preset, presets
from transom.zoo.config import tile
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.huggingface import left_out, read_config, write_config
from transom.zoo.rope import Rope

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


def read(folder: Path, data: object) -> Gemma3Config:
    (folder / "config.json").write_text(json.dumps(data))
    return gemma_config(read_config(folder))


def named(config: Gemma3Config, name: str) -> Gemma3Config:
    return dataclasses.replace(config, name=name)


@pytest.mark.parametrize(
    ("data", "name"), [(SPARSE_4B, "gemma3-4b"), (OLD_1B, "gemma3-1b"), (NEW_1B, "gemma3-1b")], ids=["4b", "old", "new"]
)
def test_published_forms(tmp_path: Path, data: dict[str, Any], name: str) -> None:
    assert read(tmp_path, data) == named(gemma(name), tmp_path.name)


@pytest.mark.parametrize("name", [name for name in presets() if preset(name).architecture == "gemma3"])
def test_what_we_write_both_read(tmp_path: Path, name: str) -> None:
    config = gemma(name)
    write_config(config, tmp_path)
    assert named(gemma_config(read_config(tmp_path)), name) == config
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
    ours = gemma_config(read_config(tmp_path))
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
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "unknown model_type .mamba.: known are gemma3_text, gemma3, gemma2, gemma4"),
        ({"model_type": None}, "unknown model_type null"),
        ({"hidden_size": "wide"}, 'hidden_size is "wide": expected a whole number from 1'),
        ({"model_type": ["gemma3"]}, "unknown model_type"),
        ({"hidden_size": float("inf")}, "hidden_size is Infinity: expected a whole number from 1"),
        ({"query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4: expected a positive finite number"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear": expected an object'),
        ({"hidden_activation": "relu"}, 'hidden_activation is "relu": only "gelu_pytorch_tanh"'),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, "rope_type 'dynamic'"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 26 layers"),
        ({"layer_types": ["chunked_attention"] * 26}, "chunked_attention"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_what_the_zoo_does_not_hold(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, OLD_1B | change)
    assert "\n" not in str(caught.value)


# Changes of a small config. READ_ALIKE are read as transformers reads them; REFUSED are refused, by the key's name.
SMALL = {
    "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "query_pre_attn_scalar": 8, "sliding_window": 8, "sliding_window_pattern": 3, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}  # fmt: skip
DROP = "drop this key"
WITHOUT_THETAS = {"rope_theta": DROP, "rope_local_base_freq": DROP}
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
READ_ALIKE: list[dict[str, Any]] = [
    {},
    {"rope_scaling": None},
    {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 0.5}},
    {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": 16}},
    {**WITHOUT_THETAS, "rope_parameters": NESTED},
    {**WITHOUT_THETAS, "rope_parameters": {**NESTED, "sliding_attention": None}},
    {**WITHOUT_THETAS, "rope_parameters": {"full_attention": {"type": "linear", "factor": 8.0, "rope_theta": 5e5}}},
    {**WITHOUT_THETAS, "rope_parameters": {**NESTED, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
    {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_parameters": NESTED},
    {"rope_theta": None, "rope_local_base_freq": None, "rope_parameters": NESTED},
    {"sliding_window_pattern": 1},
    {"sliding_window_pattern": 7},
    {"sliding_window_pattern": DROP},
    {"layer_types": ["full_attention", "sliding_attention"] * 3},
    {"layer_types": ["full_attention"] * 6, "sliding_window": None},
    {"layer_types": None},
    {"sliding_window": 1024},
    {"final_logit_softcapping": 30.0},
    {"attn_logit_softcapping": 50.0},
    {"rms_norm_eps": 1e-5},
    {"some_key_of_a_trainer": 3, "use_cache": False, "torch_dtype": "float16", "id2label": {"0": "a"}},
    {"architectures": ["Gemma3TextModel"]},
    {"architectures": None},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sliding_window": None}, "sliding_window is null"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"sliding_window": -1}, "sliding_window is -1"),
    ({"sliding_window": True}, "sliding_window is true"),
    ({"sliding_window": 2**40}, "sliding_window is 1099511627776"),
    ({"use_sliding_window": False}, "use_sliding_window is false"),
    ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ({"sliding_window_pattern": -3}, "sliding_window_pattern is -3"),
    ({"sliding_window_pattern": None}, "sliding_window_pattern is null"),
    ({"sliding_window_pattern": "LLG"}, 'sliding_window_pattern is "LLG"'),
    ({"sliding_window_pattern": DROP, "_sliding_window_pattern": 3}, "_sliding_window_pattern is 3"),
    ({"layer_types": [0, 1, 0, 1, 0, 1]}, "layer_types is"),
    ({"layer_types": "full_attention"}, 'layer_types is "full_attention"'),
    ({"layer_types": ["chunked_attention"] * 6}, "chunked_attention"),
    ({"head_dim": None}, "head_dim is null"),
    ({"head_dim": 7}, "even head_dim"),
    ({"num_key_value_heads": None}, "num_key_value_heads is null"),
    ({"num_attention_heads": 2**40}, "num_attention_heads is 1099511627776: expected a whole"),
    ({"hidden_size": 30}, "hidden_size is 30: expected a multiple of num_attention_heads"),
    ({"hidden_size": "32"}, 'hidden_size is "32"'),
    ({"vocab_size": 10**30}, "vocab_size is 1000"),
    ({"vocab_size": 64.0}, "vocab_size is 64.0"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers is 1000000000000000000000000000000: expected a whole number"),
    ({"vocab_size": 2**25}, "config.json: vocab_size is 33554432"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000: expected a whole number from 1 to 1,024"),
    ({"max_position_embeddings": 512.5}, "max_position_embeddings is 512.5"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings is 1000000000000"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
    ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6"'),
    ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar is null"),
    ({"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar is 1000"),
    ({"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
    ({"final_logit_softcapping": -30.0}, "final_logit_softcapping is -30.0"),
    ({"final_logit_softcapping": True}, "final_logit_softcapping is true"),
    ({"attn_logit_softcapping": "50"}, 'attn_logit_softcapping is "50"'),
    ({"hidden_activation": None}, "hidden_activation is null"),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
    ({"attention_bias": True}, "attention_bias is true"),
    ({"attention_bias": 0}, "attention_bias is 0"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings is null"),
    ({"use_bidirectional_attention": "all"}, 'use_bidirectional_attention is "all"'),
    ({"is_causal": False}, "is_causal is false"),
    ({"is_causal": None}, "is_causal is null"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config is"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map is"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config says .* packed by gptq"),
    ({"quantization_config": {}}, "quantization_config says"),
    ({"quantization": {"bits": 4, "group_size": 64}}, "quantization says"),
    ({"architectures": ["Gemma3ForSequenceClassification"]}, "architectures is"),
    ({"architectures": "Gemma3ForCausalLM"}, "architectures is"),
    ({"rope_theta": 1e-320}, "rope_theta is 1e-320"),
    ({"final_logit_softcapping": 1e300}, "final_logit_softcapping is 1e\\+300"),
    ({"rope_scaling": {"a\nb": 1}}, r"a\\nb is not understood"),
    ({"rope_theta": 0.0}, "rope_theta is 0.0"),
    ({"rope_theta": float("nan")}, "rope_theta is NaN"),
    ({"rope_theta": True}, "rope_theta is true"),
    ({"rope_theta": None}, "rope_theta is null"),
    ({"rope_local_base_freq": -1e4}, "sliding_attention: rope_theta is -10000.0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor of its rotary embedding is 0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor of its rotary embedding is null"),
    ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "factor of its rotary embedding is Infinity"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, 'factor of its rotary embedding is "8"'),
    ({"rope_scaling": {"factor": 8.0}}, "no rope_type"),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "call its type rope_type"),
    ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 8.0}}, "must be one name"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_type 3"),
    ({"rope_scaling": NESTED}, "full_attention, sliding_attention is not understood there"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8.0, "beta_fast": 32}}, "beta_fast"),
    ({"rope_scaling": [8.0]}, "rope_scaling is"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}, "rope_parameters is"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is"),
    ({"rope_parameters": {**NESTED, "full_attention": 8}}, "expected an object for full_attention"),
    ({"rope_parameters": {**NESTED, "chunked_attention": {}}}, "chunked_attention is not understood"),
    ({"rope_theta": 1e4, "rope_parameters": NESTED}, "they must agree"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": NESTED}, "they must agree"),
    (
        {**WITHOUT_THETAS, "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
        "partial_rotary_factor of its rotary embedding",
    ),
]  # fmt: skip


def changed(change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (SMALL | change).items() if value != DROP}


@pytest.mark.parametrize("change", READ_ALIKE, ids=str)
def test_configs_are_read_as_transformers_reads_them(tmp_path: Path, change: dict[str, Any]) -> None:
    ours = read(tmp_path, changed(change))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert [kind == "global" for kind in ours.layer_kinds] == [kind == "full_attention" for kind in theirs.layer_types]
    assert ours.window == theirs.sliding_window or "local" not in ours.layer_kinds
    for layer_type, rope in (("full_attention", ours.rope_global), ("sliding_attention", ours.rope_local)):
        entry = theirs.rope_parameters[layer_type]
        assert (rope.theta, rope.factor) == (entry["rope_theta"], entry.get("factor", 1.0))
        assert entry["rope_type"] == ("default" if rope.factor == 1 else "linear")
    assert (ours.norm_eps, ours.logit_softcap) == (theirs.rms_norm_eps, theirs.final_logit_softcapping)


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_refused_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, changed(change))
    assert "\n" not in str(caught.value) and str(tmp_path.name) in str(caught.value)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({}, "text_config is missing"),
        ({"text_config": None}, "text_config is null"),
        ({"text_config": {}}, "text_config is {}"),
        ({"text_config": "small"}, 'text_config is "small"'),
        ({**SMALL, "model_type": "gemma3"}, "text_config is missing.*set model_type to 'gemma3_text'"),
        ({"text_config": {**SMALL, "tie_word_embeddings": False}}, "text_config.tie_word_embeddings is false"),
        ({"text_config": SMALL, "tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"text_config": {**SMALL, "model_type": "gemma2"}}, 'text_config.model_type is "gemma2"'),
        ({"text_config": SMALL, "hidden_size": 64}, "hidden_size is 64: beside text_config, which says 32"),
        ({"text_config": SMALL, "rope_theta": 5e5}, "rope_theta is 500000.0: beside text_config"),
        ({"model_type": "gemma3_text", **SMALL, "text_config": SMALL}, "keep one of the two"),
        ({"text_config": SMALL, "quantization_config": {"quant_method": "fp8"}}, "packed by fp8"),
        ({"text_config": {**SMALL, "quantization_config": {}}}, "text_config.quantization_config says"),
        ({"text_config": {**SMALL, "sliding_window": None}}, "text_config.sliding_window is null"),
        ({"text_config": SMALL, "architectures": ["Gemma3ForSequenceClassification"]}, "architectures is"),
    ],
)
def test_what_wraps_a_text_config(tmp_path: Path, outer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, {"model_type": "gemma3"} | outer)


def test_what_is_not_applied_is_listed(tmp_path: Path) -> None:
    read(tmp_path, SMALL)
    assert left_out(tmp_path) == ()
    read(tmp_path, SMALL | {"attn_logit_softcapping": 50.0, "zeta": 1, "alpha": 2})
    assert left_out(tmp_path) == (
        "config.json: attn_logit_softcapping = 50.0 is not applied, as in transformers",
        "config.json: nothing reads the keys alpha, zeta",
    )
    wrapped = {"model_type": "gemma3", "text_config": SMALL | {"final_logit_softcapping": 30.0}, "beta": 1}
    assert read(tmp_path, wrapped).logit_softcap is None
    assert left_out(tmp_path) == (
        "config.json: text_config.final_logit_softcapping = 30.0 is not applied, as in transformers",
        "config.json: nothing reads the keys beta",
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "merge the adapter into its base first"),
        ("model-q8.gguf", "model-q8.gguf: give the path of that file itself"),
        ("model.safetensors", r"no config\.json: give the folder"),
        ("params.npz", "params.npz: save the model as safetensors"),
        ("model.nemo", "model.nemo: convert it"),
    ],
)
def test_what_a_folder_holds_instead_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(SMALL).encode())
    assert read_config(tmp_path).vocab_size == 64


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="JSON object"):
        read(tmp_path, [])
    for text in ('{"model_type": "gemma', "[" * 100_000, "// a comment\n{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="not readable as JSON"):
            read_config(tmp_path)
