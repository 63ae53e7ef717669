from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from transom.graphs.errors import CheckpointError
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.checkpoints.safetensors import open_safetensors, revision
from transom.zoo.presets import preset

TINY = preset("gemma3-tiny")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {name: weight.read().bfloat16() for name, weight in random_weights(TINY, 0).items()}


def save(folder: Path, tensors: dict[str, torch.Tensor], prefix: str = "model.") -> Path:
    safetensors.torch.save_file(
        {prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", ""])
def test_every_prefix(tmp_path: Path, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    others = {"../vision": torch.zeros(3), "lm_head.weight": tensors["embed_tokens.weight"].clone()}
    safetensors.torch.save_file(
        {prefix + name: tensor for name, tensor in tensors.items()} | others, tmp_path / "model.safetensors"
    )
    opened = open_safetensors(tmp_path, TINY).weights
    assert list(opened) == list(tensors)
    for name, tensor in tensors.items():
        assert opened[name].dtype == torch.bfloat16
        assert torch.equal(opened[name].read(), tensor)


def test_rows_in_ranges(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    opened = open_safetensors(save(tmp_path, tensors), TINY).weights
    weight = opened["layers.3.mlp.down_proj.weight"]
    assert torch.equal(weight.read_rows(5, 17), tensors["layers.3.mlp.down_proj.weight"][5:17])
    assert torch.equal(opened["norm.weight"].read_rows(1, 4), tensors["norm.weight"][1:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_what_we_write_both_read(tmp_path: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    weights = random_weights(TINY, 3)
    write_checkpoint(tmp_path, TINY, weights, dtype=dtype, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 10**9)
    theirs = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    ours = open_safetensors(tmp_path, TINY).weights
    for name, weight in weights.items():
        assert torch.equal(ours[name].read(), weight.read().to(dtype))
        assert torch.equal(theirs[f"model.{name}"], weight.read().to(dtype))


def test_revision_changes_with_the_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    before = revision(save(tmp_path, tensors))
    assert revision(tmp_path) == before
    assert revision(save(tmp_path, tensors, "language_model.model.")) != before


def test_missing_tensors_are_listed(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    gone = ("layers.2.mlp.up_proj.weight", "norm.weight")
    save(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in gone})
    with pytest.raises(CheckpointError, match=r"2 of 80 .*model\.layers\.2\.mlp\.up_proj\.weight, model\.norm\.weight"):
        open_safetensors(tmp_path, TINY)


@pytest.mark.parametrize(
    ("name", "replacement", "said"),
    [
        ("layers.0.self_attn.q_proj.weight", torch.zeros(128, 63), r"q_proj\.weight has shape \[128, 63\], expected"),
        ("embed_tokens.weight", torch.zeros(500, 64), "has 500 vocabulary rows, but config.json says vocab_size 512"),
        ("embed_tokens.weight", torch.zeros(600, 64), "has 600 vocabulary rows"),
        ("norm.weight", torch.zeros(64, dtype=torch.int64), r"norm\.weight is I64, expected one of F32"),
    ],
)
def test_wrong_tensors(
    tmp_path: Path, tensors: dict[str, torch.Tensor], name: str, replacement: torch.Tensor, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_safetensors(save(tmp_path, tensors | {name: replacement}), TINY)


def test_damaged_files(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="has neither"):
        open_safetensors(tmp_path, TINY)
    path = save(tmp_path, tensors) / "model.safetensors"
    whole = path.read_bytes()
    for cut, said in ((len(whole) - 1, "its header describes"), (100, "within its header"), (3, "within its header")):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=said) as caught:
            open_safetensors(tmp_path, TINY)
        assert "\n" not in str(caught.value)
    (length,) = struct.unpack("<Q", whole[:8])
    path.write_bytes(whole[:8] + b"x" * length + whole[8 + length :])
    with pytest.raises(CheckpointError, match="header is corrupt"):
        open_safetensors(tmp_path, TINY)


def test_a_file_that_shrinks_after_opening(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    opened = open_safetensors(save(tmp_path, tensors), TINY).weights
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="changed since"):
        [weight.read() for weight in opened.values()]


def test_damaged_index(tiny_folder: Path, tmp_path: Path) -> None:
    index = json.loads((tiny_folder / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00001-of-"):
        open_safetensors(tmp_path, TINY)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a valid index"):
        open_safetensors(tmp_path, TINY)
