"""Files of an encoder of images beside those of its text decoder: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import transom
from tests.conftest import Cli
from tests.tolerances import FP32_LOGITS
from tests.zoo.tiny_gguf import STORABLE, write_gguf, write_mmproj
from transom.errors import CheckpointError, ConfigError, TransomError
from transom.images.pan_and_scan import boxes
from transom.images.resize import PixelSpec, pixels
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.gguf import revision
from transom.zoo.checkpoints.gguf_header import Header, read_header
from transom.zoo.checkpoints.gguf_mmproj import read_mmproj
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.gemma3_vision import Gemma3VisionConfig
from transom.zoo.model import Model, load


def _storable() -> Gemma3VisionConfig:
    """The tiny model, with a scale of attention that the format implies, and rows of whole blocks but for fc2's."""
    tiny = preset("gemma3-vision-tiny")
    assert isinstance(tiny, Gemma3VisionConfig)
    vision = dataclasses.replace(tiny.vision, hidden_size=96)
    return dataclasses.replace(tiny, name="text", attention_scale=tiny.head_dim**-0.5, vision=vision)


TINY = _storable()
WEIGHTS = random_weights(TINY, 0)
TOKENS = {TINY.images.begin_id: "<start_of_image>", TINY.images.end_id: "<end_of_image>"}
PROJECTION, NORM = "multi_modal_projector.mm_input_projection_weight", "multi_modal_projector.mm_soft_emb_norm.weight"
OTHER_FORM = {"clip.projector_type": None, "clip.vision.projector_type": "gemma3"}
ENCODER = ("vision_tower.", "multi_modal_projector.")


def _write_text(path: Path, tokens: dict[int, str]) -> Path:
    text = {name: weight for name, weight in WEIGHTS.items() if not name.startswith(ENCODER)}
    return write_gguf(path, TINY.text, text, metadata={"attention.sliding_window_pattern": 3}, tokens=tokens)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_text(tmp_path_factory.mktemp("mmproj") / "text.gguf", TOKENS)


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mmproj(tmp_path_factory.mktemp("mmproj") / "mmproj.gguf", TINY, WEIGHTS)


def refusal(text: Path, mmproj: Path) -> str:
    with pytest.raises(TransomError) as caught:
        load(text, mmproj=mmproj)
    message = str(caught.value)
    assert "\n" not in message and str(mmproj) in message
    return message


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metadata": OTHER_FORM},
        {"metadata": {"clip.vision.projector_type": "gemma3"}},
        {"first_converter": True},
        {"metadata": {"general.type": None, "clip.has_text_encoder": False, "clip.has_llava_projector": False}},
    ],
)
def test_a_model_comes_back(text: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_mmproj(tmp_path / "mmproj.gguf", TINY, WEIGHTS, **options)
    model = load(text, mmproj=path)
    assert model.config == TINY and list(model.weights) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        # Norms of the decoder, and the projector's, went through 1 + w and back.
        shifted = name == NORM or (name.endswith("norm.weight") and not name.startswith(ENCODER))
        expected, actual = weight.read(), model.weights[name].read()
        assert torch.allclose(actual, expected, rtol=0, atol=2**-23 * 8 if shifted else 0), name
    assert model.left_out == load(text).left_out


def test_the_revision_is_of_both_files(text: Path, mmproj: Path, tmp_path: Path) -> None:
    model = load(text, mmproj=mmproj)
    assert model.revision == f"{revision(text)} + {revision(mmproj)}" and model.mmproj == str(mmproj)
    other = write_mmproj(tmp_path / "mmproj.gguf", TINY, random_weights(TINY, 1))
    assert load(text, mmproj=other).revision != model.revision
    assert load(text).revision == revision(text) and load(text).mmproj is None


def test_without_it_there_are_no_images(text: Path) -> None:
    assert load(text, images=True).config == TINY.text


@pytest.mark.parametrize("command", ["show", "plan"])
def test_commands_tell_of_it(command: str, cli: Cli, text: Path, mmproj: Path) -> None:
    reports = []
    for more in ((), ("--mmproj", mmproj)):
        code, out, err = cli(command, text, *more, "--json")
        assert code == 0, err
        reports.append(json.loads(out))
    assert reports[0] != reports[1]


def test_validate_measures_it(cli: Cli, text: Path, mmproj: Path, tmp_path: Path) -> None:
    code, _, err = cli(
        "validate", text, "--mmproj", mmproj, "--targets", "reference", "--json", tmp_path / "report.json"
    )
    assert code == 0, err
    images = json.loads((tmp_path / "report.json").read_text())["targets"]["reference"]["images"]
    assert images["encoded"] and images["runs"] and max(images["soft_max_rel"], images["max_rel"]) < FP32_LOGITS


def test_random_weights_need_the_sizes_of_both(text: Path, mmproj: Path) -> None:
    model = load(text, mmproj=mmproj, weights="random")
    assert model.config == TINY and model.revision == "seed 0"
    assert torch.equal(model.weights[PROJECTION].read(), WEIGHTS[PROJECTION].read())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_types(text: Path, tmp_path: Path, kind: str) -> None:
    """fc2 has rows of 80, which blocks of 32 do not fit: such files hold it in F16."""
    quantised = dict.fromkeys(("attn_q.weight", "attn_out.weight", "ffn_up.weight", "input_projection.weight"), kind)
    types = {"ffn_down.weight": "BF16" if kind == "BF16" else "F16", **quantised}
    model = load(text, mmproj=write_mmproj(tmp_path / "mmproj.gguf", TINY, WEIGHTS, types=types))
    layer = "vision_tower.encoder.layers.1."
    fc2 = f"{layer}mlp.fc2.weight"
    half = torch.bfloat16 if kind == "BF16" else torch.float16
    assert torch.equal(model.weights[fc2].read(), WEIGHTS[fc2].read().to(half).float())
    for name in (f"{layer}self_attn.q_proj.weight", f"{layer}mlp.fc1.weight", PROJECTION):
        weight, expected = model.weights[name], WEIGHTS[name].read()
        assert (weight.encoded is not None) == kind.startswith("Q")
        if weight.encoded is None:
            assert torch.equal(weight.read(), expected.to(half).float())
            continue
        codes = weight.encoded.read_rows(0, len(expected))
        assert torch.equal(weight.encoded.decode(codes), weight.read())
        step = expected.abs().max() / (127 if kind == "Q8_0" else 7)
        assert 0 < (weight.read() - expected).abs().max() < step


def test_a_patch_embedding_in_blocks_has_no_codes(text: Path, tmp_path: Path) -> None:
    """Codes are those of matrices, and this tensor has four axes."""
    vision = dataclasses.replace(TINY.vision, patch_size=32)
    config = dataclasses.replace(TINY, vision=vision, images=dataclasses.replace(TINY.images, soft_tokens=1))
    weights = random_weights(config, 0)
    path = write_mmproj(tmp_path / "mmproj.gguf", config, weights, types={"patch_embd.weight": "Q8_0"})
    model, name = load(text, mmproj=path), "vision_tower.embeddings.patch_embedding.weight"
    patches, expected = model.weights[name], weights[name].read()
    assert patches.encoded is None and patches.shape == (96, 3, 32, 32) and model.config == config
    assert 0 < (patches.read() - expected).abs().max() < expected.abs().max() / 127


def test_an_encoder_of_sound_is_left_out(text: Path, tmp_path: Path) -> None:
    metadata = {**OTHER_FORM, "clip.audio.projector_type": "x", "clip.has_audio_encoder": True, "made.by": "us"}
    tensors = {name: np.zeros(4, np.float32) for name in ("a.conv1d.1.weight", "mm.a.fc.weight")}
    path = write_mmproj(tmp_path / "mmproj.gguf", TINY, WEIGHTS, metadata=metadata, tensors=tensors)
    assert set(load(text, mmproj=path).left_out) - set(load(text).left_out) == {
        "an encoder of sound is left out (a.conv1d.1.weight, mm.a.fc.weight)",
        "metadata that the model has no use for: clip.audio.projector_type, made.by",
    }


def test_tokens_around_an_image(text: Path, mmproj: Path, tmp_path: Path) -> None:
    """The tokenizer's of their names, else the released ids, which a small vocabulary does not have."""
    unnamed = _write_text(tmp_path / "text.gguf", {})
    assert "tokens around an image, 255999 and 256000, are not among 512" in refusal(unnamed, mmproj)

    def around(header: Header) -> tuple[int, int]:
        images = read_mmproj(read_header(mmproj), header)[0].images
        assert images is not None
        return images.begin_id, images.end_id

    header = read_header(unnamed)
    table = header.tensors["token_embd.weight"]
    header.tensors["token_embd.weight"] = dataclasses.replace(table, shape=(262_144, TINY.hidden_size))
    assert around(header) == (255_999, 256_000)
    assert around(read_header(text)) == (508, 509)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("projector_type", None, "is None, known are gemma3"),
        ("projector_type", "mlp", "is 'mlp', known are gemma3: choose another model"),
        ("projector_type", 3, "is 3, expected a string"),
        ("vision.projector_type", "gemma3n", "but clip.projector_type is 'gemma3': they must agree"),
        ("has_vision_encoder", None, "is None, only True"),
        ("has_vision_encoder", False, "is False, only True"),
        ("has_text_encoder", True, "only False"),
        ("use_gelu", None, "is None, only True"),
        ("use_gelu", 1, "is 1, only True"),
        ("use_silu", True, "is True, only False"),
        ("vision.image_mean", [0.5, 0.5, 0.4], "only 0.5 for each of 3 colours"),
        ("vision.image_mean", ["0.5"] * 3, "only 0.5 for each of 3 colours"),
        ("vision.image_std", None, "is None, only 0.5"),
        ("vision.image_std", [0.5], "only 0.5"),
        ("vision.projection_dim", 2560, "but text is 64 wide: give files of one model"),
        ("vision.projection_dim", None, "is None, expected a number"),
        ("vision.block_count", 3, "but the file holds 2 layers"),
        ("vision.block_count", 1, "but the file holds 2 layers"),
        ("vision.attention.head_count", 5, "5 heads do not divide a width of 96"),
        ("vision.attention.layer_norm_epsilon", None, "expected a number"),
        ("vision.embedding_length", 48, "v.patch_embd.weight has shape [96, 3, 4, 4], expected [48, 3, 4, 4]"),
        ("vision.embedding_length", 2**30, "hidden_size is 1073741824, expected a whole number"),
        ("vision.feed_forward_length", 81, "v.blk.0.ffn_up.weight has shape [80, 96], expected [81, 96]"),
        ("vision.image_size", 128, "v.position_embd.weight has shape [256, 96], expected [1024, 96]"),
        ("vision.image_size", 66, "patches of 4 pixels do not divide an image of 66"),
        ("vision.patch_size", 8, "v.patch_embd.weight has shape [96, 3, 4, 4], expected [96, 3, 8, 8]"),
        ("vision.projector.scale_factor", 3, "it must divide the 16 patches of a side"),
        ("vision.feature_layer", 7, "that may change its numbers: clip.vision.feature_layer (7)"),
    ],
)
def test_keys_that_are_refused(text: Path, tmp_path: Path, key: str, value: object, words: str) -> None:
    metadata = {f"clip.{key}": value}
    message = refusal(text, write_mmproj(tmp_path / "mmproj.gguf", TINY, WEIGHTS, metadata=metadata))
    assert words in message
    if "has shape" not in words and "vision: " not in message:
        assert f"clip.{key}" in message


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("mm.soft_emb_norm.weight", None, "tensors are missing: mm.soft_emb_norm.weight: fetch it again"),
        ("v.post_ln.bias", None, "tensors are missing: v.post_ln.bias"),
        ("v.blk.1.attn_k.bias", None, "tensors are missing: v.blk.1.attn_k.bias"),
        ("v.class_embd", (96,), "1 tensors have no place in the model: v.class_embd"),
        ("v.pre_ln.weight", (96,), "no place in the model: v.pre_ln.weight"),
        ("v.blk.0.attn_q_norm.weight", (96,), "no place in the model: v.blk.0.attn_q_norm.weight"),
        ("mm.input_projection.bias", (64,), "no place in the model: mm.input_projection.bias"),
        # As a linear layer would hold it.
        ("mm.input_projection.weight", (64, 96), "has shape [64, 96], expected [96, 64]"),
        ("blk.0.attn_q.weight", (64, 64), "no place in the model: blk.0.attn_q.weight"),
    ],
)
def test_tensors_that_are_refused(
    text: Path, tmp_path: Path, name: str, shape: tuple[int, ...] | None, words: str
) -> None:
    tensors = {name: None if shape is None else np.zeros(shape, np.float32)}
    assert words in refusal(text, write_mmproj(tmp_path / "mmproj.gguf", TINY, WEIGHTS, tensors=tensors))


def test_files_that_do_not_belong_together(
    text: Path, mmproj: Path, tiny_gguf: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    assert "general.architecture is 'gemma3', expected 'clip': give the mmproj file" in refusal(text, text)
    with pytest.raises(ConfigError, match="give the file of the language model"):
        load(mmproj, mmproj=mmproj)
    with pytest.raises(CheckpointError, match=r"absent.gguf: cannot be read"):
        load(text, mmproj=tmp_path / "absent.gguf")
    # Another width than the encoder's.
    assert "but tiny is 256 wide" in refusal(tiny_gguf, mmproj)
    llama = STORABLE["llama3"]
    other = write_gguf(tmp_path / "llama.gguf", llama, random_weights(llama, 0))
    assert "its encoder is one for gemma3" in refusal(other, mmproj)
    for name in (tiny_folder, "gemma3-vision-tiny"):
        with pytest.raises(ConfigError, match=r"belongs to a \.gguf file of the text decoder"):
            load(name, mmproj=mmproj)


def test_export_and_an_image(cli: Cli, text: Path, mmproj: Path, tmp_path: Path) -> None:
    folder, image = tmp_path / "a", tmp_path / "a.png"
    code, out, err = cli("export", text, "--mmproj", mmproj, "-o", folder, "--chunk", 32, "--context", 128, "--json")
    assert code == 0, err
    source = json.loads(out)["source"]
    assert source["mmproj"] == str(mmproj) and source["revision"] == f"{revision(text)} + {revision(mmproj)}"
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    PIL.Image.fromarray(array).save(image)
    prompt = transom.open(folder, threads=1).prompt(["hello ", image])
    assert prompt.soft is not None and [token for token in prompt.tokens.tolist() if token in TOKENS] == list(TOKENS)
    module: Any = Model(config=TINY, weights=WEIGHTS, tokenizer=None, source="", revision="").eager()
    (box,) = boxes(40, 50, None)
    expected = module.encode_image(torch.from_numpy(pixels(array, box, PixelSpec(size=TINY.images.size))))[0]
    assert np.abs(prompt.soft - expected.numpy()).max() < FP32_LOGITS
    code, out, err = cli("run", folder, "--image", image, "--prompt", "hello", "--max-new-tokens", 3, "--json")
    assert code == 0 and json.loads(out)["prompt_tokens"] > TINY.images.soft_tokens, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("{text}", "--mmproj", "{text}"), "give the mmproj file"),
        (("{mmproj}", "--mmproj", "{mmproj}"), "give the file of the language model"),
        (("gemma3-tiny", "--mmproj", "{mmproj}"), "leave the mmproj file out"),
        (("{text}", "--mmproj", "{mmproj}", "--no-vision"), "--no-vision leaves it out"),
        (("{text}", "--mmproj", "absent.gguf"), "absent.gguf: cannot be read"),
    ],
)
def test_errors_of_export(
    cli: Cli, text: Path, mmproj: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    named = [option.format(text=text, mmproj=mmproj) for option in options]
    code, _, err = cli("export", *named, "-o", tmp_path / "a")
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "a").exists()
