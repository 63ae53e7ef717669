from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.gemma import gemma
from transom.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.zoo.checkpoints.gguf_header import read_header
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.checkpoints.safetensors import open_safetensors, revision
from transom.zoo.huggingface import write_config
from transom.zoo.model import load

TINY = gemma("gemma3-tiny")


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return {name: weight.read().bfloat16() for name, weight in random_weights(TINY, 0).items()}


Tensors = dict[str, torch.Tensor]


def save(folder: Path, tensors: Tensors, prefix: str = "model.") -> Path:
    safetensors.torch.save_file(
        {prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize(
    "prefix",
    ["model.", "language_model.model.", "model.language_model.", "language_model.", "", "module._orig_mod.model."],
)
def test_every_prefix(tmp_path: Path, tensors: Tensors, prefix: str) -> None:
    opened = open_safetensors(save(tmp_path, tensors, prefix), TINY).weights
    assert list(opened) == list(tensors)
    for name, tensor in tensors.items():
        assert opened[name].dtype == torch.bfloat16
        assert torch.equal(opened[name].read(), tensor)


def prefixed(tensors: Tensors, prefix: str = "model.") -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("metadata", [None, {"model.embed_tokens.weight": "lm_head.weight"}])
@pytest.mark.parametrize(
    ("prefix", "head"),
    [("model.", "lm_head.weight"), ("language_model.model.", "language_model.lm_head.weight"), ("", "lm_head.weight")],
)
def test_a_head_alone_is_the_table(
    tmp_path: Path, tensors: Tensors, prefix: str, head: str, metadata: dict[str, str] | None
) -> None:
    named = prefixed(tensors, prefix)
    named[head] = named.pop(f"{prefix}embed_tokens.weight")
    safetensors.torch.save_file(named, tmp_path / "model.safetensors", metadata=metadata)
    opened = open_safetensors(tmp_path, TINY).weights
    assert list(opened) == list(tensors)
    assert torch.equal(opened["embed_tokens.weight"].read(), tensors["embed_tokens.weight"])


def test_a_head_must_equal_the_table(tmp_path: Path, tensors: Tensors) -> None:
    write_config(TINY, tmp_path)

    def table_of(head: torch.Tensor) -> Weight:
        safetensors.torch.save_file(prefixed(tensors) | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        return load(tmp_path).weights["embed_tokens.weight"]

    table = tensors["embed_tokens.weight"]
    assert torch.equal(table_of(table.float()).read(), table)
    other = table.clone()
    other[300, 7] += 1
    weight = table_of(other)
    assert torch.equal(weight.read_rows(0, 300), table[:300])
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight.* 256 to 511"):
        weight.read_rows(256, 512)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[9, 64\]"):
        table_of(other[:9])


FREQUENCIES = 1.0 / TINY.rope_global.theta ** (torch.arange(0, 32, 2) / 32) / 8
LOCAL_FREQUENCIES = 1.0 / TINY.rope_local.theta ** (torch.arange(0, 32, 2) / 32)
REDUNDANT = {
    "layers.0.self_attn.q_proj.bias": torch.zeros(128),
    "layers.5.mlp.down_proj.bias": torch.zeros(64, dtype=torch.bfloat16),
    "rotary_emb.inv_freq": FREQUENCIES,
    "rotary_emb_local.inv_freq": LOCAL_FREQUENCIES,
    "rotary_emb.full_attention_inv_freq": FREQUENCIES.bfloat16(),
    "rotary_emb.sliding_attention_original_inv_freq": LOCAL_FREQUENCIES.half(),
    "layers.2.self_attn.rotary_emb.inv_freq": FREQUENCIES,
    "layers.1.self_attn.rotary_emb.inv_freq": LOCAL_FREQUENCIES,
    "embed_tokens.embed_scale": torch.tensor(8.0),
}


@pytest.mark.parametrize("name", REDUNDANT)
def test_redundant_tensors_are_checked(tmp_path: Path, tensors: Tensors, name: str) -> None:
    assert list(open_safetensors(save(tmp_path, tensors | {name: REDUNDANT[name]}), TINY).weights) == list(tensors)
    other = REDUNDANT[name].clone().float()
    other.view(-1)[-1] += 1
    message = "is not zero" if name.endswith("bias") else "is not what config.json says"
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        open_safetensors(save(tmp_path, tensors | {name: other}), TINY)


def test_parts_that_are_left_out_are_told(tmp_path: Path, tensors: Tensors) -> None:
    vision = {
        "vision_tower.vision_model.post_layernorm.weight": torch.zeros(1000),
        "vision_tower.vision_model.post_layernorm.bias": torch.zeros(1000),
        "multi_modal_projector.mm_soft_emb_norm.weight": torch.zeros(500_000, dtype=torch.bfloat16),
    }
    for prefix, outer in (("language_model.model.", ""), ("model.language_model.", "model.")):
        safetensors.torch.save_file(prefixed(tensors, prefix) | prefixed(vision, outer), tmp_path / "model.safetensors")
        assert open_safetensors(tmp_path, TINY).left_out == (
            f"the vision tower is left out ({outer}vision_tower.vision_model.post_layernorm.bias, "
            f"{outer}vision_tower.vision_model.post_layernorm.weight)",
            f"the projector of images is left out ({outer}multi_modal_projector.mm_soft_emb_norm.weight)",
        )


Q = "layers.0.self_attn.q_proj"
FOREIGN = {
    "model.layers.6.mlp.up_proj.weight": r"1 tensors are not part.*config.json says that there are 6 layers",
    "score.weight": "a head of another task",
    "v_head.summary.weight": "a head of another task",
    "model.norm2.weight": "not part of the model: model.norm2.weight: the model has no such part",
    "model.layers.6.self_attn.rotary_emb.inv_freq": "config.json says that there are 6 layers",
    "model.a\nb.weight": r"model\.a\\nb\.weight",
    "model.layers.0.self_attn.sinks": "not part of the model: model.layers.0.self_attn.sinks",
    "model.norms.bias": "not part of the model",
    f"model.{Q}.lora_A.weight": "those of an adapter.*merge the adapter",
    f"model.{Q}.base_layer.weight": "those of an adapter",
    f"base_model.model.model.{Q}.weight": "those of an adapter",
    f"model.{Q}.weight_scale": "packed by a quantiser",
    f"model.{Q}.weight_scale_inv": "packed by a quantiser",
    f"model.{Q}.qweight": "packed by a quantiser",
    f"model.{Q}.scales": "packed by a quantiser",
    f"model.{Q}.weight.absmax": "packed by a quantiser",
    f"model.{Q}.weight.quant_state.bitsandbytes__nf4": "packed by a quantiser",
    f"language_model.model.{Q}.weight": "not part of the model",
    "language_model.model.embed_tokens.weight": "has 2 tables of tokens",
    f"model._orig_mod.{Q}.weight": "are one tensor's names",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_the_model_does_not_hold_is_refused(tmp_path: Path, tensors: Tensors, name: str) -> None:
    safetensors.torch.save_file(prefixed(tensors) | {name: torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=FOREIGN[name]) as caught:
        open_safetensors(tmp_path, TINY)
    assert "\n" not in str(caught.value)


def test_advice_names_the_cause(tmp_path: Path, tensors: Tensors) -> None:
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.5" not in name}
    with pytest.raises(CheckpointError, match=r"the checkpoint holds 5 layers and config\.json says 6"):
        open_safetensors(save(tmp_path, fewer), TINY)
    with pytest.raises(CheckpointError, match=r"names begin with 'decoder\.', expected 'model\.'"):
        open_safetensors(save(tmp_path, tensors, "decoder."), TINY)
    with pytest.raises(
        CheckpointError, match=r"80 of 80 .* its tensors are called wte: config.json belongs to another"
    ):
        open_safetensors(save(tmp_path, {"wte": torch.zeros(3)}, ""), TINY)
    with pytest.raises(CheckpointError, match="it holds no tensors"):
        open_safetensors(save(tmp_path, {}), TINY)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json stands beside the model: merge the adapter"):
        open_safetensors(save(tmp_path, tensors), TINY)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"no model\.safetensors, but pytorch_model\.bin: save the model as safetensors"),
        ("consolidated.safetensors", r"consolidated\.safetensors: call the weights model\.safetensors"),
        ("adapter_model.safetensors", "merge the adapter"),
        ("tiny.gguf", "give the path of that file"),
    ],
)
def test_another_container_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(tmp_path, TINY)


def test_the_stand_in_of_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match="run git lfs pull"):
        open_safetensors(tmp_path, TINY)
    with pytest.raises(CheckpointError, match="run git lfs pull"):
        read_header((tmp_path / "model.safetensors").rename(tmp_path / "model.gguf"))


def test_rows_in_ranges(tmp_path: Path, tensors: Tensors) -> None:
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


def test_revision_changes_with_the_file(tmp_path: Path, tensors: Tensors) -> None:
    before = revision(save(tmp_path, tensors))
    assert revision(tmp_path) == before
    assert revision(save(tmp_path, tensors, "language_model.model.")) != before


def test_missing_tensors_are_listed(tmp_path: Path, tensors: Tensors) -> None:
    gone = ("layers.2.mlp.up_proj.weight", "norm.weight")
    save(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in gone})
    with pytest.raises(CheckpointError, match=r"2 of 80 .*model\.layers\.2\.mlp\.up_proj\.weight, model\.norm\.weight"):
        open_safetensors(tmp_path, TINY)


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("layers.0.self_attn.q_proj.weight", torch.zeros(128, 63), r"q_proj\.weight has shape \[128, 63\], expected"),
        ("embed_tokens.weight", torch.zeros(500, 64), "has 500 vocabulary rows, but config.json says vocab_size 512"),
        ("embed_tokens.weight", torch.zeros(600, 64), "has 600 vocabulary rows"),
        ("norm.weight", torch.zeros(64, dtype=torch.int64), r"norm\.weight is I64, expected one of F32"),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: Tensors, name: str, replacement: torch.Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(save(tmp_path, tensors | {name: replacement}), TINY)


def test_damaged_files(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors: give the folder"):
        open_safetensors(tmp_path, TINY)
    path = save(tmp_path, tensors) / "model.safetensors"
    whole = path.read_bytes()
    for cut, message in (
        (len(whole) - 1, "its header describes"),
        (100, "within its header"),
        (3, "within its header"),
    ):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=message) as caught:
            open_safetensors(tmp_path, TINY)
        assert "\n" not in str(caught.value)
    (length,) = struct.unpack("<Q", whole[:8])
    path.write_bytes(whole[:8] + b"x" * length + whole[8 + length :])
    with pytest.raises(CheckpointError, match="the header"):
        open_safetensors(tmp_path, TINY)
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    with pytest.raises(CheckpointError, match="the header: not readable as JSON"):
        open_safetensors(tmp_path, TINY)
    header = json.loads(whole[8 : 8 + length])
    entry = header["model.layers.0.mlp.up_proj.weight"]
    entry["data_offsets"] = [entry["data_offsets"][0] - 4, entry["data_offsets"][1] - 4]
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + whole[8 + length :])
    with pytest.raises(CheckpointError, match="the header"):
        open_safetensors(tmp_path, TINY)


def test_a_file_that_shrinks_after_opening(tmp_path: Path, tensors: Tensors) -> None:
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
    for damaged in (
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../b"}}',
        '{"weight_map": {"a": ""}}',
        json.dumps({"weight_map": {"a": "b" * 300}}),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"index\.json: "):
            open_safetensors(tmp_path, TINY)


def test_an_index_must_agree_with_its_shards(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert open_safetensors(tmp_path, TINY).weights
    name, file = next(iter(index["weight_map"].items()))
    other = next(shard for shard in index["weight_map"].values() if shard != file)
    for change, message in (
        ({name: other}, f"{name} stands in {file}, not in {other}"),
        ({"model.absent": file}, f"{file} lacks model.absent"),
    ):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=message):
            open_safetensors(tmp_path, TINY)
    path.write_text(json.dumps({"weight_map": {n: f for n, f in index["weight_map"].items() if n != name}}))
    with pytest.raises(CheckpointError, match=f"{file} holds {name} too"):
        open_safetensors(tmp_path, TINY)
    path.write_text(json.dumps(index))
    shutil.copy(tmp_path / file, tmp_path / "extra.safetensors")
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.absent": "extra.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"stands in extra.safetensors and .*: remove one"):
        open_safetensors(tmp_path, TINY)
