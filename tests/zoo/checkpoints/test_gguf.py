from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.gemma import gemma_config
from tests.zoo.tiny_gguf import TINY, write_gguf
from transom.errors import CheckpointError, ConfigError
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.gguf import open_gguf, revision
from transom.zoo.checkpoints.gguf_config import read_metadata
from transom.zoo.checkpoints.gguf_header import read_header
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.config import tile
from transom.zoo.rope import Rope

WEIGHTS = random_weights(TINY, 0)
QUANTISED = {
    "attn_q.weight": "Q4_0",
    "attn_k.weight": "Q4_1",
    "attn_v.weight": "Q5_0",
    "attn_output.weight": "Q5_1",
    "token_embd.weight": "Q8_0",
    "ffn_gate.weight": "Q4_K",
    "ffn_up.weight": "Q5_K",
    "0.ffn_down.weight": "Q6_K",
    "1.ffn_down.weight": "F16",
    "2.ffn_down.weight": "BF16",
}
CODED = {
    "Q4_0": (32, -8, 7),
    "Q4_1": (32, -8, 7),
    "Q5_0": (32, -16, 15),
    "Q5_1": (32, -16, 15),
    "Q8_0": (32, -127, 127),
    "Q6_K": (16, -32, 31),
}


@pytest.fixture(scope="module")
def quantised_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "quantised.gguf", TINY, WEIGHTS, types=QUANTISED)


def test_configuration(tiny_gguf: Path) -> None:
    config, _ = open_gguf(tiny_gguf)
    assert config == TINY


def test_weights_come_back(tiny_gguf: Path) -> None:
    weights = open_gguf(tiny_gguf)[1].weights
    assert list(weights) == list(WEIGHTS)
    for name, weight in WEIGHTS.items():
        # Norms went through 1 + w and back.
        tolerance = 2**-23 * 8 if weight.read().dim() == 1 else 0
        assert torch.allclose(weights[name].read(), weight.read(), rtol=0, atol=tolerance), name


def test_every_type_is_what_the_package_says(quantised_gguf: Path) -> None:
    weights = open_gguf(quantised_gguf)[1].weights
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(quantised_gguf).tensors}
    seen = set()
    for name, weight in weights.items():
        tensor = theirs[weight.origin.split(": ")[1]]
        seen.add(tensor.tensor_type.name)
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("norm.weight"):
            expected = expected - 1
        assert torch.equal(weight.read(), expected), name
        assert torch.equal(weight.read_rows(3, 7), expected[3:7]), name
    assert seen == {"F32", "F16", "BF16", *(kind for kind in QUANTISED.values() if kind.startswith("Q"))}


def test_codes_are_exact(quantised_gguf: Path) -> None:
    weights = open_gguf(quantised_gguf)[1].weights
    theirs = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(quantised_gguf).tensors}
    seen = set()
    for name, weight in weights.items():
        kind = theirs[weight.origin.split(": ")[1]]
        assert (weight.encoded is not None) == (kind in CODED), name
        if weight.encoded is None:
            continue
        seen.add(kind)
        block, lowest, highest = CODED[kind]
        codes, scales, offsets = weight.encoded.read_rows(2, 31)
        assert weight.encoded.block == block
        assert codes.dtype == torch.int8 and scales.dtype == torch.float32
        assert codes.shape == (29, weight.shape[1]) and scales.shape == (29, weight.shape[1] // block)
        assert codes.min() >= lowest and codes.max() <= highest
        values = codes.view(29, -1, block).float() * scales[..., None]
        assert (offsets is not None) == kind.endswith("_1")
        if offsets is not None:
            values += offsets[..., None]
        assert torch.equal(values.view(29, -1), weight.read_rows(2, 31)), name
    assert seen == set(CODED)


def test_27b_scales_by_width_per_head(tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY,
        layer_kinds=tile("LLLLLG", 62),
        hidden_size=32,
        intermediate_size=32,
        head_dim=4,
        vocab_size=280,
        attention_scale=8**-0.5,
    )
    path = write_gguf(tmp_path / "tiny.gguf", config, random_weights(config, 0))
    assert open_gguf(path)[0] == config


@pytest.mark.parametrize("pattern", [3, [True, True, False, True, True, False, True]])
def test_a_stated_pattern_counts(tiny_gguf: Path, pattern: object) -> None:
    header = read_header(tiny_gguf)
    header.metadata["gemma3.attention.sliding_window_pattern"] = pattern
    assert gemma_config(read_metadata(header)[0]).layer_kinds == tile("LLG", 7)


@pytest.mark.parametrize("pattern", [0, "LLG", [True, False]])
def test_a_pattern_that_fits_nothing_is_refused(tiny_gguf: Path, pattern: object) -> None:
    header = read_header(tiny_gguf)
    header.metadata["gemma3.attention.sliding_window_pattern"] = pattern
    with pytest.raises(ConfigError, match="sliding_window_pattern"):
        read_metadata(header)[0]


@pytest.mark.parametrize(("key", "value"), [("attention.key_length", 0), ("block_count", 1.5)])
def test_metadata_that_makes_no_model(tiny_gguf: Path, key: str, value: float) -> None:
    header = read_header(tiny_gguf)
    header.metadata[f"gemma3.{key}"] = value
    with pytest.raises(ConfigError):
        read_metadata(header)[0]


def test_without_rope_scaling(tmp_path: Path) -> None:
    plain = dataclasses.replace(TINY, rope_global=Rope(theta=1e6))
    path = write_gguf(tmp_path / "tiny.gguf", plain, WEIGHTS)
    assert open_gguf(path)[0] == plain


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"architecture": "mamba"},
            ConfigError,
            "unknown architecture 'mamba': known are gemma3, gemma2, gemma4, llama",
        ),
        ({"architecture": "longnet"}, ConfigError, "such files are not read, give the Hugging Face folder"),
        ({"metadata": {"block_count": None}}, ConfigError, "gemma3.block_count is None, expected a number"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, ConfigError, "'yarn'"),
        ({"metadata": {"attention.value_length": 32}}, ConfigError, "keys and values differ"),
        ({"metadata": {"embedding_length": 512}}, CheckpointError, r"token_embd.weight has shape \[300, 256\]"),
        ({"skip": ("blk.3.ffn_up.weight",)}, CheckpointError, r"1 of 93 tensors are missing: blk\.3\.ffn_up\.weight"),
        ({"skip": ("token_embd.weight",)}, CheckpointError, "token_embd.weight is missing"),
    ],
)
def test_what_cannot_be_read(
    tmp_path: Path, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, WEIGHTS, **arguments)  # type: ignore[arg-type]
    with pytest.raises(error, match=message) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


def test_unread_types_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TINY, WEIGHTS, types={"0.attn_q.weight": "TQ1_0"})
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight has quantisation type 34"):
        open_gguf(path)


def test_damaged_files(tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    path = tmp_path / "broken.gguf"
    head = read_header(tiny_gguf).parts[0].data_start
    for content, message in (
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" * 100, "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + whole[8:], "version 1 GGUF"),
        (b"GGUF" + (3).to_bytes(4, "big") + whole[8:], "big-endian GGUF"),
        (whole[:20], "cut off within its head"),
        (whole[: head // 2], "cut off within its head|corrupt"),
        (whole[: head - 200], "cut off within its head"),
        (whole[:-100], r"blk\.6\.\w+\.weight ends at byte|output_norm.weight ends at byte"),
        (whole[:8] + b"\xff" * 200 + whole[208:], "cut off within its head|corrupt"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_gguf(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="No such file"):
        open_gguf(tmp_path / "absent.gguf")


def test_any_cut_of_the_head_is_an_error(tiny_gguf: Path, tmp_path: Path) -> None:
    whole, path = tiny_gguf.read_bytes(), tmp_path / "broken.gguf"
    for cut in np.linspace(0, read_header(tiny_gguf).parts[0].data_start, 60).astype(int):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            open_gguf(path)


def test_without_the_package(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert read_metadata(read_header(tiny_gguf))[0] == TINY
    with pytest.raises(CheckpointError, match=r"pip install 'transom\[gguf\]'"):
        open_gguf(tiny_gguf)


def test_header_agrees_with_the_package(tiny_gguf: Path) -> None:
    header, reader = read_header(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.offset, ours.shape) == (tensor.data_offset, tuple(tensor.shape.tolist()[::-1]))
    for key, value in header.metadata.items():
        expected = reader.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key


@pytest.mark.real
def test_real_270m(real_gguf: Path) -> None:
    config, opened = open_gguf(real_gguf)
    weights = opened.weights
    assert dataclasses.replace(config, name="gemma3-270m") == preset("gemma3-270m")
    assert sum(weight.encoded is not None for weight in weights.values()) == 81 + 10 + 9
    assert revision(real_gguf) == "sha256:a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    assert weights["norm.weight"].read().max().item() == pytest.approx(300, abs=1)
    for name in ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight"):
        encoded = weights[name].encoded
        assert encoded is not None
        codes, scales, _ = encoded.read_rows(0, 64)
        values = codes.view(64, -1, encoded.block).float() * scales[..., None]
        assert torch.equal(values.view(64, -1), weights[name].read_rows(0, 64))
