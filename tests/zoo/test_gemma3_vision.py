"""Gemma 3 with images against transformers: soft tokens, logits past the window, configurations, checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.images.sequences import Sequence, sequence
from tests.tolerances import FP32_LOGITS
from transom.errors import CheckpointError, ConfigError
from transom.zoo.architectures import architecture, build_empty, preset, tensor_shapes
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.huggingface import read_config, write_config
from transom.zoo.model import Model, load

TINY = ("gemma3-vision-tiny", "gemma3-vision-tiny-wide")


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest) -> Model:
    return load(request.param, images=True)


@pytest.fixture(scope="module")
def theirs(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same weights in transformers."""
    folder = tmp_path_factory.mktemp("vision")
    write_checkpoint(folder, model.config, model.weights, dtype=torch.float32)
    loaded = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


def test_the_windows_are_shorter_and_longer_than_an_image() -> None:
    short, long = (preset(name) for name in TINY)
    assert short.images is not None and short.longest_window is not None and long.longest_window is not None
    assert short.longest_window < short.images.soft_tokens < long.longest_window


def test_logits_are_those_of_transformers(model: Model, theirs: Any) -> None:
    """Images after text, after one another and at the end; text far past the window; nothing but text."""
    for kinds in ("tttii", "it", "ti" * 3 + "t" * 30, "t" * 60):
        text: Sequence = sequence(model, kinds)
        with torch.no_grad():
            ours = model.eager()(text.tokens[None], torch.tensor(0), None, until=text.until, soft=text.soft[None])[0]
            ids = torch.where(text.tokens < 0, theirs.config.image_token_id, text.tokens)[None]
            images = {"pixel_values": text.pixels} if len(text.pixels) else {}
            expected = theirs(input_ids=ids, token_type_ids=(text.tokens < 0).long()[None], **images).logits
            if len(text.pixels):
                features = theirs.get_image_features(text.pixels).pooler_output.flatten(0, -2)
                assert (features - text.soft[text.tokens < 0]).abs().max() < FP32_LOGITS
        assert (ours - expected).abs().max() < FP32_LOGITS, kinds


def test_without_images_it_is_its_text_decoder(model: Model) -> None:
    text, tokens = load(model.config.name), torch.arange(3, 80)[None]
    assert text.config == model.config.text and text.config.images is None
    assert tensor_shapes(text.config).keys() == model.text().weights.keys()
    with torch.no_grad():
        expected, actual = (decoder.eager()(tokens, torch.tensor(0), None)[0] for decoder in (model, text))
    # Every weight has its own draw by name, so that both have the same.
    assert torch.equal(expected, actual)


def test_what_we_write_both_read(tmp_path: Path) -> None:
    for name in TINY:
        config = preset(name)
        write_config(config, tmp_path)
        assert dataclasses.replace(read_config(tmp_path, images=True), name=name) == config
        assert dataclasses.replace(read_config(tmp_path), name=name) == config.text
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert theirs.mm_tokens_per_image == 16 and theirs.vision_config.image_size == 64
        assert theirs.text_config.sliding_window == config.longest_window
    family = architecture("gemma3_vision")
    assert {type(build_empty(preset.config)) for preset in family.presets} == {family.build}


def test_a_sparse_config_is_so400m(tmp_path: Path) -> None:
    data = {
        "model_type": "gemma3",
        "text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024},
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    config: Any = read_config(tmp_path, images=True)
    vision = config.vision
    assert (vision.hidden_size, vision.intermediate_size, vision.num_layers) == (1152, 4304, 27)
    assert (vision.num_heads, vision.patch_size, vision.image_size) == (16, 14, 896)
    assert dataclasses.asdict(config.images) == {
        "size": 896, "soft_tokens": 256, "begin_id": 255_999, "end_id": 256_000, "text_before": "\n\n",
        "text_after": "\n\n",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": {"patch_size": 15}}, "patches of 15 pixels do not divide an image of 896"),
        ({"vision_config": {"vision_use_head": True}}, "vision_config.vision_use_head is true: only False"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act"),
        ({"mm_tokens_per_image": 250}, "64 x 64 patches do not average to 250 soft tokens"),
        ({"mm_tokens_per_image": 9}, "64 x 64 patches do not average to 9 soft tokens"),
        ({"boi_token_index": 300_000}, "are not among 262208 tokens"),
        ({"eoi_token_index": -1}, "eoi_token_index is -1: expected the id of a token"),
        ({"image_token_index": 7, "image_token_id": 8}, "they must agree"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    data = {"model_type": "gemma3", "text_config": {"hidden_size": 2560}, "vision_config": {}, **change}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=words):
        read_config(tmp_path, images=True)


@pytest.mark.parametrize(
    ("text", "tower", "projector"),
    [
        ("language_model.model.", "vision_tower.vision_model.", ""),
        ("model.language_model.", "model.vision_tower.vision_model.", "model."),
        ("model.language_model.", "model.vision_tower.", "model."),
    ],
)
def test_all_generations_of_names(tmp_path: Path, text: str, tower: str, projector: str) -> None:
    model = load(TINY[0], images=True)
    write_config(model.config, tmp_path)
    tensors = {}
    for name, weight in model.weights.items():
        inner = name.removeprefix("vision_tower.")
        prefix = tower if inner != name else projector if name.startswith("multi_modal") else text
        tensors[prefix + inner] = weight.read()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    again = load(tmp_path, images=True)
    assert again.left_out[:1] != ("the vision tower is left out",) and again.weights.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        assert torch.equal(again.weights[name].read(), weight.read()), name
    assert any(line.startswith("the vision tower is left out") for line in load(tmp_path).left_out)
    # A tower of which a part is missing is none.
    del tensors[f"{tower}post_layernorm.bias"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vision_tower.post_layernorm.bias"):
        load(tmp_path, images=True)
    # Without any, it is a text model whose config says more.
    safetensors.torch.save_file(
        {name: value for name, value in tensors.items() if name.startswith(text)}, tmp_path / "model.safetensors"
    )
    text_only = load(tmp_path, images=True)
    assert text_only.config.images is None and "holds no tensor of it" in text_only.left_out[0]
