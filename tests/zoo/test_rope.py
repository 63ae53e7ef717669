"""Rotary embeddings against transformers': frequencies, magnitudes, and what a config says of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import transom
from tests.conftest import Cli
from tests.tolerances import FP32_LOGITS
from transom.errors import ConfigError
from transom.zoo.architectures import architectures, preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.huggingface import read_config, write_config
from transom.zoo.llama3 import Llama3Config
from transom.zoo.model import load
from transom.zoo.olmo3 import Olmo3Config
from transom.zoo.rope import Rope, RopeScaling, YarnRope, rotation
from transom.zoo.rope_keys import rope_parameters

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


SCALINGS = ("linear:4", "llama3:4", "yarn:4")


@pytest.mark.parametrize("words", SCALINGS)
def test_a_scaled_model_is_that_of_transformers(tmp_path: Path, words: str) -> None:
    """Local layers, whose rotary embedding is another one, stay as they are."""
    tiny = preset("olmo3-tiny")
    assert isinstance(tiny, Olmo3Config)
    config = dataclasses.replace(tiny, rope_global=Rope(theta=tiny.rope_global.theta), context=32)
    write_checkpoint(tmp_path, config, random_weights(config, 0), dtype=torch.float32)
    model = load(tmp_path, rope_scaling=words)
    assert (model.config.context, model.rope_scaling) == (128, words)
    scaled = model.config
    assert isinstance(scaled, Olmo3Config)
    assert scaled.rope_local == config.rope_local and scaled.rope_global != config.rope_global
    assert any(f"rope scaling {words}: " in line and "made for 32 tokens" in line for line in model.left_out)
    assert any("local layers keep theirs" in line for line in model.left_out)
    write_config(scaled, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    ids_BT = torch.randint(0, 256, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BTV, _ = model.eager()(ids_BT, torch.tensor(0), None)
        assert (ours_BTV - theirs(ids_BT).logits).abs().max() < FP32_LOGITS


def test_every_family_says_which_positions_are_scaled() -> None:
    """Or that there are none: a family that forgets to say so would be refused."""
    refused = set()
    for family in architectures():
        config = next(preset.config for preset in family.presets if preset.hub is None)
        ropes = {name: value for name, value in vars(config).items() if isinstance(value, Rope)}
        plain = dataclasses.replace(config, **{name: Rope(theta=rope.theta) for name, rope in ropes.items()})  # type: ignore[arg-type]
        try:
            scaled = plain.scaled(RopeScaling(kind="linear", factor=2.0))
        except ConfigError as error:
            assert "no global layer rotates" in str(error) or "scaled already" in str(error)
            refused.add(family.name)
            continue
        assert scaled.context == 2 * config.context and family.config.SCALED
        assert {name for name in ropes if getattr(scaled, name) != getattr(plain, name)} == set(family.config.SCALED)
    # Their global layers know no positions.
    assert refused == {"cohere2", "exaone4", "mamba2", "rwkv7"}


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("qwen3-tiny", "ntk:4", "no rope scaling is named 'ntk': choose linear, llama3 or yarn"),
        ("qwen3-tiny", "", "no rope scaling is named ''"),
        ("qwen3-tiny", "yarn", "a rope scaling by '' is none: give a number above 1, as in yarn:4"),
        ("qwen3-tiny", "yarn:0", "a rope scaling by '0' is none"),
        ("qwen3-tiny", "linear:-2", "a rope scaling by '-2' is none"),
        ("qwen3-tiny", "linear:1", "a rope scaling by '1' is none"),
        ("qwen3-tiny", "llama3:nan", "a rope scaling by 'nan' is none"),
        ("qwen3-tiny", "llama3:inf", "a rope scaling by 'inf' is none"),
        ("qwen3-tiny", "linear:1e9", "context is 512000000000, expected a whole number"),
        ("gemma3-tiny", "yarn:4", r"gemma3-tiny: its positions are scaled already \(linear, factor 8\)"),
        ("ministral3-tiny", "linear:2", r"scaled already \(yarn, factor 16\)"),
        ("cohere2-tiny", "yarn:4", "cohere2-tiny: no global layer rotates queries and keys"),
        ("mistral-7b-v0.1", "yarn:4", "mistral-7b-v0.1: no global layer rotates"),
    ],
)
def test_scalings_that_are_none(cli: Cli, name: str, words: str, message: str) -> None:
    code, _, err = cli("plan", name, "--rope-scaling", words)
    assert code == 2 and "Traceback" not in err
    with pytest.raises(ConfigError, match=message):
        preset(name).scaled(RopeScaling.read(words))


def test_a_scaled_artifact(tmp_path: Path, cli: Cli) -> None:
    """The context grows, the manifest tells why, and what reads the artifact's model again reads it scaled."""
    folder = tmp_path / "artifact"
    code, out, err = cli("export", "mistral-tiny", "-o", folder, "--rope-scaling", "yarn:4", "--chunk", "21")
    assert code == 0, err
    assert "not done: rope scaling yarn:4: mistral-tiny was made for 512 tokens" in " ".join(out.split())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["context"] == 2048 and manifest["source"]["rope_scaling"] == "yarn:4"
    assert any("local layers share them" in line for line in manifest["not_done"])
    model = load("mistral-tiny", rope_scaling="yarn:4")
    ids = torch.randint(0, 512, (700,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BTV, _ = model.eager()(ids[None], torch.tensor(0), None)
    actual = transom.open(folder).logits(ids.tolist())
    assert abs(actual - expected_BTV[0].numpy()).max() < FP32_LOGITS
    code, out, _ = cli("inspect", folder)
    assert code == 0 and "yarn:4" in out
    code, out, err = cli("validate", folder, "--json", tmp_path / "validation.json")
    assert code == 0, err
    code, _, err = cli("validate", folder, "--rope-scaling", "yarn:4")
    assert code == 2 and "artifacts keep the rope scaling that they have" in err
    code, out, _ = cli("plan", "mistral-tiny", "--rope-scaling", "yarn:4", "--json")
    assert code == 0 and json.loads(out)["context"] == 2048
    artifact = transom.compile(load("mistral-tiny"), out=tmp_path / "same", rope_scaling="yarn:4", context=1000)
    assert artifact.manifest.source["rope_scaling"] == "yarn:4" and artifact.manifest.context == 1000
