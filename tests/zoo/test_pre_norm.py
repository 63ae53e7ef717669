"""What Qwen, Mistral and Ministral 3 have of their own: sizes, published configs, windows, GGUF's YaRN."""

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
from transom.zoo.chat import CHATML, render_template
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.config import DecoderConfig, tile
from transom.zoo.huggingface import left_out, read_config, write_config
from transom.zoo.ministral3 import Ministral3
from transom.zoo.model import load
from transom.zoo.plan import parameters
from transom.zoo.pre_norm import PreNormConfig
from transom.zoo.rope import YarnRope

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}  # fmt: skip
YARN: dict[str, Any] = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16_384, "rope_theta": 1e6, "rope_type": "yarn",
    "type": "yarn",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151_643,
        "eos_token_id": 151_645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18_944, "max_position_embeddings": 32_768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "sliding_window": 131_072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 152_064,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40_960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1_000_000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151_936,
    },
    "mistral-7b-v0.1": {
        "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14_336, "max_position_embeddings": 32_768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32_000,
    },
    "mistral-nemo-12b": {
        "architectures": ["MistralForCausalLM"], "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 14_336, "max_position_embeddings": 131_072, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 131_072,
    },
    "ministral3-3b": {
        "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "image_token_index": 10,
        "vision_config": {"model_type": "pixtral"}, "spatial_merge_size": 2,
        "text_config": {
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 9216,
            "max_position_embeddings": 262_144, "model_type": "ministral3", "num_attention_heads": 32,
            "num_hidden_layers": 26, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_parameters": YARN,
            "sliding_window": None, "tie_word_embeddings": True, "vocab_size": 131_072,
        },
    },
}  # fmt: skip


def read(folder: Path, data: dict[str, Any]) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(data))
    return read_config(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms(tmp_path: Path, name: str) -> None:
    assert dataclasses.replace(read(tmp_path, PUBLISHED[name]), name=name) == preset(name)
    assert left_out(tmp_path) == ()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-72b", 72_706_203_648),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-32b", 32_762_123_264),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("mistral-small-24b", 23_572_403_200),
    ],
)
def test_presets_have_as_many_parameters_as_published(name: str, count: int) -> None:
    assert parameters(preset(name)) == count


QWEN2 = {**SMALL, "model_type": "qwen2"}
MINISTRAL = {**SMALL, "model_type": "ministral"}
WINDOWS: list[dict[str, Any]] = [
    {**QWEN2},
    {**QWEN2, "use_sliding_window": True},
    {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    {**QWEN2, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 3},
    {**QWEN2, "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    {**QWEN2, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
    {**QWEN2, "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {**MINISTRAL},
    {**MINISTRAL, "sliding_window": None},
    {**MINISTRAL, "sliding_window": 8, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
]


@pytest.mark.parametrize("model_type", ["qwen3", "ministral3", "gpt_oss"])
def test_heads_of_which_a_config_says_no_width(tmp_path: Path, model_type: str) -> None:
    data = {key: value for key, value in SMALL.items() if key not in ("head_dim", "rope_theta")}
    own = () if model_type == "ministral3" else ("llama_4_scaling_beta",)
    rope = {key: value for key, value in YARN.items() if key not in own}
    ours = read(tmp_path, {**data, "model_type": model_type, "rope_parameters": rope})
    assert ours.head_dim == transformers.AutoConfig.from_pretrained(tmp_path).head_dim != 8


def test_yarn_without_the_context_before_it(tmp_path: Path) -> None:
    """And biases of which Qwen 2's class asks no key."""
    scaling = {"rope_type": "yarn", "factor": 4.0}
    ours = read(tmp_path, {**QWEN2, "rope_scaling": scaling, "attention_bias": True})
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert isinstance(ours, PreNormConfig) and isinstance(ours.rope, YarnRope)
    assert ours.rope.original_context == theirs["original_max_position_embeddings"] == 128


@pytest.mark.parametrize("data", WINDOWS, ids=lambda data: str({**data, **dict.fromkeys(SMALL)}.values()))
def test_windows_are_those_of_transformers(tmp_path: Path, data: dict[str, Any]) -> None:
    ours = read(tmp_path, data)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    kinds = [None if kind == "full_attention" else theirs.sliding_window for kind in theirs.layer_types]
    assert [layer.window for layer in ours.layers] == kinds


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**QWEN2, "use_sliding_window": None}, "use_sliding_window is null: expected true or false"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        ({**QWEN2, "max_window_layers": -1}, "max_window_layers is -1: expected a whole number from 0"),
        ({**QWEN2, "layer_types": ["sliding_attention"] * 4}, "need use_sliding_window and a sliding_window"),
        ({**QWEN2, "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({**SMALL, "model_type": "qwen3", "attention_bias": True}, "attention_bias is true"),
        ({**SMALL, "model_type": "mistral", "layer_types": ["full_attention"] * 4}, "expected sliding_attention"),
        ({**MINISTRAL, "sliding_window": None, "layer_types": ["sliding_attention"] * 4}, "sliding_window is null"),
        ({**SMALL, "model_type": "ministral3"}, "rope_parameters is null: expected rope_type yarn"),
        (
            {**SMALL, "model_type": "ministral3", "rope_scaling": {**YARN, "llama_4_scaling_beta": None}}
            | {"rope_theta": 1e6},
            "expected a number for llama_4_scaling_beta",
        ),
        (
            {**SMALL, "model_type": "ministral3", "rope_theta": 1e6, "rope_parameters": YARN}
            | {"layer_types": ["sliding_attention"] * 4},
            "expected full_attention for each of 4 layers",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_named(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_local_layers_need_a_window() -> None:
    config = preset("qwen3-tiny")
    assert isinstance(config, PreNormConfig)
    for window in (None, 0, True):
        with pytest.raises(ConfigError, match=f"qwen3-tiny: window is {window!r}, expected a whole number"):
            dataclasses.replace(config, window=window)


@pytest.mark.parametrize("family", ["mistral", "ministral3"])
def test_one_window_in_all_layers(tmp_path: Path, family: str) -> None:
    """What the tiny models, of which every layer is another one, or global, do not show."""
    tiny = preset(f"{family}-tiny")
    assert isinstance(tiny, PreNormConfig)
    config = dataclasses.replace(tiny, layer_kinds=tile("L", 2), window=16)
    write_checkpoint(tmp_path, config, random_weights(config, 0), dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(theirs).__name__ == f"{family.capitalize()}ForCausalLM"
    ids_BT = torch.randint(0, 512, (1, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BTV, _ = load(tmp_path).eager()(ids_BT, torch.tensor(0), None)
        assert (ours_BTV - theirs(ids_BT).logits).abs().max() < FP32_LOGITS


def test_the_text_decoder_of_a_mistral3(tmp_path: Path) -> None:
    """Ministral 3 is published beside an encoder of images, which is left out."""
    write_config(preset("ministral3-tiny"), tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Mistral3Config(
        text_config=text,
        vision_config={"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16, **vision},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = transformers.Mistral3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.architecture == "ministral3" and any("vision tower" in line for line in ours.left_out)
    ids_BT = torch.randint(0, 512, (1, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BTV, _ = ours.eager()(ids_BT, torch.tensor(0), None)
        assert (ours_BTV - theirs(input_ids=ids_BT).logits).abs().max() < FP32_LOGITS


def test_queries_grow_with_their_position() -> None:
    """By the logarithm of the original contexts before them; keys do not."""
    model = load("ministral3-tiny").eager()
    assert isinstance(model, Ministral3)
    cosines, _, plain, _ = model.rotations(torch.tensor([0, 31, 32, 64, 480]))[0]
    growth = (cosines[:, -1] / plain[:, -1]).tolist()
    assert growth == pytest.approx([1, 1, 1 + 0.1 * 0.693147, 1 + 0.1 * 1.098612, 1 + 0.1 * 2.772589], rel=1e-6)


YARN_KEYS: dict[str, object] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 128,
}


def read_gguf(folder: Path, **change: object) -> YarnRope:
    config = dataclasses.replace(STORABLE["qwen3"], name="file")
    metadata = {**YARN_KEYS, **{key.replace("__", "."): value for key, value in change.items()}}
    opened = load(write_gguf(folder / "file.gguf", config, random_weights(config, 0), metadata=metadata)).config
    assert isinstance(opened, PreNormConfig)
    rope = opened.rope
    assert isinstance(rope, YarnRope)
    return rope


def test_yarn_as_llama_cpp_stores_it(tmp_path: Path) -> None:
    plain = YarnRope(theta=1e6, factor=4.0, original_context=128)
    assert read_gguf(tmp_path) == plain
    assert read_gguf(tmp_path, rope__scaling__yarn_ext_factor=1.0) == plain
    assert read_gguf(tmp_path, rope__scaling__original_context_length=None).original_context == 512
    bounds = read_gguf(tmp_path, rope__scaling__yarn_beta_fast=16.0, rope__scaling__yarn_beta_slow=2.0)
    assert (bounds.beta_fast, bounds.beta_slow) == (16.0, 2.0)
    assert read_gguf(tmp_path, rope__scaling__attn_factor=1.1386294) == plain
    # Its multiplier is the weight of what the scores are divided by again.
    assert plain.magnitude == pytest.approx(1.1386294)
    assert read_gguf(tmp_path, rope__scaling__yarn_log_multiplier=1.0).magnitude == 1.0
    assert read_gguf(tmp_path, rope__scaling__yarn_log_multiplier=0.5).magnitude == pytest.approx(1.1386294 / 1.0693147)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope__scaling__factor", None, "rope.scaling.factor is None"),
        ("rope__scaling__yarn_beta_slow", 40.0, "rope.scaling.yarn_beta_slow is 40.0, expected less than"),
        ("rope__scaling__yarn_ext_factor", 0.5, "rope.scaling.yarn_ext_factor is 0.5"),
        ("rope__scaling__attn_factor", 1.5, "rope.scaling.attn_factor is 1.5, expected 1 or YaRN's own, 1.138629"),
        ("rope__scaling__yarn_attn_factor", 1.5, "rope.scaling.yarn_attn_factor is 1.5"),
        ("rope__freq_base", 1.0, "rope.freq_base is 1.0, expected more than 1"),
        ("attention__sliding_window", 16, "attention.sliding_window"),
    ],
)
def test_what_is_no_yarn_in_a_gguf_file(tmp_path: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_gguf(tmp_path, **{key: value})


def test_a_file_of_a_mistral_is_read_as_llamas(tmp_path: Path) -> None:
    """llama.cpp stores both under one name."""
    llama = dataclasses.replace(STORABLE["llama3"], name="file")
    file = write_gguf(tmp_path / "file.gguf", llama, random_weights(llama, 0), architecture="llama")
    assert load(file).config.architecture == "llama3"


def test_chatml() -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render_template(CHATML, {}, conversation) == (  # type: ignore[arg-type]
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
