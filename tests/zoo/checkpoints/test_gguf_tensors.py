from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.zoo.gguf_bytes import HIDDEN, ROWS, File, Tensor, f32, tiny
from transom.errors import CheckpointError
from transom.zoo.checkpoints.checkpoint import refuse_differences
from transom.zoo.checkpoints.gguf import open_gguf
from transom.zoo.checkpoints.gguf_types import OTHER_TYPES, SIZED_TYPES


def write(tmp_path: Path, file: File) -> Path:
    (path := tmp_path / "tiny.gguf").write_bytes(file.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _, checkpoint = open_gguf(path)
        for weight in refuse_differences(checkpoint.weights, checkpoint.copies).values():
            weight.read()
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def half_table() -> File:
    """The tiny model with an embedding that float16 holds."""
    file = tiny()
    table = file.tensor("token_embd.weight")
    table.data = np.frombuffer(table.data, "<f4").astype("<f2").astype("<f4").tobytes()
    return file


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_head_that_is_the_embedding(tmp_path: Path, kind: str) -> None:
    file = half_table()
    table = file.tensor("token_embd.weight")
    data = table.data if kind == "F32" else np.frombuffer(table.data, "<f4").astype("<f2").tobytes()
    file.tensors.append(Tensor("output.weight", table.axes, 0 if kind == "F32" else 1, data))
    _, checkpoint = open_gguf(write(tmp_path, file))
    assert checkpoint.left_out == () and "lm_head.weight" not in checkpoint.weights
    (name,) = checkpoint.copies
    checked = refuse_differences(checkpoint.weights, checkpoint.copies)[name]
    assert torch.equal(checked.read(), checkpoint.weights[name].read())


def test_a_head_of_its_own(tmp_path: Path) -> None:
    file = tiny()
    values = np.frombuffer(file.tensor("token_embd.weight").data, "<f4").reshape(ROWS, HIDDEN).copy()
    values[-1, -1] += 1e-6
    message = refusal(write(tmp_path, file.add("output.weight", values)))
    assert "output.weight differs from token_embd.weight" in message


def test_a_head_of_another_shape(tmp_path: Path) -> None:
    assert "output.weight has shape [3, 32]" in refusal(
        write(tmp_path, tiny().add("output.weight", np.ones((3, HIDDEN))))
    )


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("rope_freqs.weight", 1),
        ("blk.0.rope_freqs.weight", 1),
        ("rope_factors_long.weight", 1),
        ("blk.1.attn_q.scale", 1),
        ("blk.1.attn_q.input_scale", 1),
        ("output.scale", 1),
        ("blk.0.attn_q.bias", 0),
        ("blk.1.ffn_up.bias", 0),
        ("output_norm.bias", 0),
        ("output.bias", 0),
    ],
)
def test_redundant_tensors_are_checked(tmp_path: Path, name: str, harmless: float) -> None:
    values = np.full(4, harmless, np.float32)
    _, checkpoint = open_gguf(write(tmp_path, tiny().add(name, values)))
    assert checkpoint.left_out == ()
    for wrong in (harmless + 0.5, np.nan):
        values[-1] = wrong
        message = refusal(write(tmp_path, tiny().add(name, values)))
        assert f"{name} holds other numbers than {harmless}" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blk.2.attn_q.weight", "block_count leaves 2 layers, but the file holds blk.2.attn_q.weight"),
        ("blk.0.attn_qkv.weight", "no place in the model: blk.0.attn_qkv.weight"),
        ("blk.0.ffn_gate_exps.weight", "no place in the model: blk.0.ffn_gate_exps.weight"),
        ("blk.0.attn_sinks.weight", "blk.0.attn_sinks.weight"),
        ("blk.0.attn_q.weight.lora_a", "belongs to an adapter: merge it"),
        ("blk.0.attn_q.lora_b", "belongs to an adapter: merge it"),
        ("per_layer_token_embd.weight", "per_layer_token_embd.weight"),
    ],
)
def test_tensors_without_a_place(tmp_path: Path, name: str, words: str) -> None:
    assert words in refusal(write(tmp_path, tiny().add(name, np.zeros(4))))


def test_parts_beside_the_decoder_are_listed(tmp_path: Path) -> None:
    file = tiny()
    for name in ("v.blk.0.attn_q.weight", "mm.input_projection.weight", "dense_2.weight", "blk.1.nextn.eh_proj.weight"):
        file.add(name, np.zeros((4, 4)))
    # A type that we do not read is no fault in a part that is not read.
    file.tensors.append(Tensor("v.patch_embd.weight", [32, 2], 20, bytes(36)))
    config, checkpoint = open_gguf(write(tmp_path, file))
    assert config.num_layers == 2
    assert list(checkpoint.left_out) == [
        "a vision or audio part is left out (v.blk.0.attn_q.weight, mm.input_projection.weight, v.patch_embd.weight)",
        "a head that embeds whole texts is left out (dense_2.weight)",
        "a part that predicts tokens further ahead is left out (blk.1.nextn.eh_proj.weight)",
    ]


def test_blocks_that_predict_further_ahead(tmp_path: Path) -> None:
    file = tiny(layers=3).set("gemma3.nextn_predict_layers", ("u32", 1))
    config, checkpoint = open_gguf(write(tmp_path, file))
    assert config.num_layers == 2 and "layers.2.mlp.up_proj.weight" not in checkpoint.weights
    (line,) = checkpoint.left_out
    assert "blk.2.attn_q.weight" in line and "and 8 more" in line


def test_every_type_is_named(tmp_path: Path) -> None:
    for number, (name, block, size) in OTHER_TYPES.items():
        file = tiny()
        tensor = file.tensor("blk.0.ffn_up.weight")
        tensor.type, tensor.data = number, bytes(HIDDEN * HIDDEN // block * size)
        message = refusal(write(tmp_path, file))
        expected = f"is {name}, whose blocks of {block}" if HIDDEN % block else f"quantisation type {number} ({name})"
        assert expected in message and "blk.0.ffn_up.weight" in message
    for number, name in ((4, "Q4_2"), (31, "Q4_0_4_4"), (99, "unknown to us")):
        file = tiny()
        file.tensor("blk.0.ffn_up.weight").type = number
        assert f"quantisation type {number} ({name}): requantise" in refusal(write(tmp_path, file))


def test_sizes_of_types_are_the_packages() -> None:
    gguf = pytest.importorskip("gguf")
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        # Never stored; the package counts two floats where the format has two halves.
        if kind.name != "Q8_1":
            assert SIZED_TYPES[int(kind)] == (kind.name, block, size)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ([], "has shape [], expected [32]"),
        ([0], "has shape [0], expected [32]"),
        ([32, 0], "has shape [0, 32], expected [32]"),
        ([16, 2], "has shape [2, 16], expected [32]"),
        ([1, 1, 1, 1, 32], "has 5 axes, at most 4"),
        ([2**63, 2**63], "the file is truncated"),
    ],
)
def test_axes(tmp_path: Path, axes: list[int], words: str) -> None:
    file = tiny()
    # The last of the file, so that no other tensor moves.
    tensor = next(each for each in file.tensors if each.name == "output_norm.weight")
    file.tensors.remove(tensor)
    file.tensors.append(tensor)
    tensor.axes = axes
    message = refusal(write(tmp_path, file))
    assert words in message and "output_norm.weight" in message


def test_trailing_axes_of_one_are_none(tmp_path: Path) -> None:
    file = tiny()
    file.tensor("output_norm.weight").axes = [HIDDEN, 1, 1]
    _, checkpoint = open_gguf(write(tmp_path, file))
    plain = open_gguf(write(tmp_path, tiny()))[1].weights["norm.weight"].read()
    assert torch.equal(checkpoint.weights["norm.weight"].read(), plain)


def test_a_vector_in_blocks(tmp_path: Path) -> None:
    file = tiny()
    tensor = file.tensor("output_norm.weight")
    tensor.type, tensor.data = 8, bytes(34)
    assert "vectors must be F32" in refusal(write(tmp_path, file))


def test_names_that_stand_twice(tmp_path: Path) -> None:
    file = tiny()
    file.metadata.append(("gemma3.block_count", ("u32", 2)))
    assert "key gemma3.block_count stands twice" in refusal(write(tmp_path, file))
    file = tiny()
    file.tensors.append(f32("output_norm.weight", np.zeros(HIDDEN)))
    assert "tensor output_norm.weight stands twice" in refusal(write(tmp_path, file))


@pytest.mark.parametrize(("shift", "fault"), [(-32, "overlaps"), (32, "leaves a gap"), (-1, "overlaps"), (4, "gap")])
def test_offsets(tmp_path: Path, shift: int, fault: str) -> None:
    file = tiny()
    start = sum(len(tensor.data) + -len(tensor.data) % 32 for tensor in file.tensors[:5])
    file.tensors[5].offset = start + shift
    message = refusal(write(tmp_path, file))
    assert file.tensors[5].name in message and fault in message


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 64])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    assert "name" in refusal(write(tmp_path, tiny().add(name, np.zeros(4))))


@pytest.mark.parametrize("value", [("u32", 0), ("u32", 24), ("bool", True), ("string", "32"), ("f32", 32.0)])
def test_alignments(tmp_path: Path, value: tuple[str, object]) -> None:
    assert "general.alignment" in refusal(write(tmp_path, tiny().set("general.alignment", value)))
