"""Weights that are NaN or infinite are refused wherever they are read, whatever holds them, with their rows."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Cli
from tests.zoo.tiny_gguf import TINY, write_gguf
from transom.errors import CheckpointError, RangeError
from transom.graphs.weight import Weight
from transom.training.quantize import quantize_model
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.codes import CODES_FILE
from transom.zoo.checkpoints.gguf_header import read_header
from transom.zoo.checkpoints.gguf_types import QUANT_TYPES
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.model import Model, load

NAMES = ("layers.3.mlp.down_proj.weight", "layers.3.self_attn.q_norm.weight", "embed_tokens.weight")
ROWS = (9, 10, 30)
KINDS = ("F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "BF16")
TARGETS = ("onnxruntime", "onnx", "xla", "tvm", "tensorrt")


def spoilt(folder: Path, name: str, value: float, dtype: torch.dtype | None = None) -> Path:
    """A checkpoint of gemma3-tiny with a number in three rows of a tensor."""
    weights = random_weights(preset("gemma3-tiny"), 0)
    tensor = weights[name].read()
    tensor[list(ROWS)] = value
    write_checkpoint(folder, preset("gemma3-tiny"), {**weights, name: Weight.of(tensor)}, dtype=dtype)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_safetensors(tmp_path: Path, name: str, value: float, dtype: torch.dtype) -> None:
    weight = load(spoilt(tmp_path, name, value, dtype)).weights[name]
    assert weight.read_rows(0, 9).isfinite().all() and weight.read_rows(11, 30).isfinite().all()
    for narrow in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(CheckpointError, match=rf"model\.{name} holds .* not finite in rows 9, 10, 30: fetch"):
            list(weight.to(narrow).blocks(limit=1000))


def test_many_rows_are_counted(tmp_path: Path) -> None:
    weights = random_weights(preset("gemma3-tiny"), 0)
    tensor = weights["embed_tokens.weight"].read()
    tensor[100:400, 3] = np.nan
    write_checkpoint(
        tmp_path, preset("gemma3-tiny"), {**weights, "embed_tokens.weight": Weight.of(tensor)}, dtype=torch.float16
    )
    with pytest.raises(CheckpointError, match="in rows 100, 101, 102, 103, 104 and 295 more"):
        load(tmp_path).weights["embed_tokens.weight"].read()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_gguf(tmp_path: Path, kind: str, value: float) -> None:
    """A half-float scale of one block, or a plain number."""
    path = write_gguf(tmp_path / "model.gguf", TINY, random_weights(TINY, 0), types={"ffn_down.weight": kind})
    _, block, block_bytes = next(entry for entry in QUANT_TYPES.values() if entry[0] == kind)
    row_bytes = TINY.intermediate_size // block * block_bytes
    number = {"F32": struct.pack("<f", value), "BF16": struct.pack("<f", value)[2:]}.get(kind, struct.pack("<e", value))
    offset = read_header(path).tensors["blk.3.ffn_down.weight"].offset
    raw = bytearray(path.read_bytes())
    for row in ROWS:
        first = offset + row * row_bytes + (block_bytes - 2 if kind == "Q6_K" else 0)
        raw[first : first + len(number)] = number
    path.write_bytes(raw)
    weight = load(path).weights["layers.3.mlp.down_proj.weight"]
    assert weight.read_rows(11, 30).isfinite().all()
    with pytest.raises(CheckpointError, match=r"blk\.3\.ffn_down\.weight holds .* not finite in rows 9, 10, 30"):
        weight.read()
    assert (weight.encoded is not None) == (kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K"))
    if weight.encoded is not None:
        assert weight.encoded.read_rows(11, 30)[1].isfinite().all()
        with pytest.raises(CheckpointError, match=rf"{kind}, holds numbers that are not finite in rows 9, 10, 30"):
            weight.encoded.with_block(16).read_rows(0, 20)


def write_into(path: Path, tensor: str, index: int, number: bytes) -> None:
    """Overwrite a number of a safetensors file, counted in numbers of that size."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0] + index * len(number)
    raw[start : start + len(number)] = number
    path.write_bytes(raw)


def row_numbers(folder: Path, part: str) -> int:
    """Codes of 8 bits, or scales, in a row of the weight that is spoilt."""
    encoded = load(folder).weights[NAMES[0]].encoded
    assert encoded is not None
    codes, scales, _ = encoded.read_rows(0, 1)
    return (codes if part == "codes" else scales).shape[1]


@pytest.fixture(scope="module")
def quantised(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints with codes beside them, by scheme."""
    root = tmp_path_factory.mktemp("quantised")

    def folder(quant: str) -> Path:
        path = root / quant.replace(":", "-")
        if not path.exists():
            quantize_model(tiny, quant=quant, out=path)
        return path

    return folder


@pytest.mark.parametrize(
    ("quant", "part", "number"),
    [
        ("int8_block32:none", "scales", struct.pack("<f", np.nan)),
        ("int8_block32:none", "scales", struct.pack("<f", 3e38)),
        ("int4_block128:none", "scales", struct.pack("<f", -np.inf)),
        ("sfp8:none", "scales", struct.pack("<f", np.inf)),
        ("fp8_channel:none", "scales", struct.pack("<f", np.nan)),
        ("fp8_channel:none", "codes", b"\x7f"),
        ("fp8_channel:none", "codes", b"\xff"),
    ],
)
def test_codes_beside_a_checkpoint(
    quantised: Callable[[str], Path], tmp_path: Path, quant: str, part: str, number: bytes
) -> None:
    """One that means no number, in the first rows, which are looked at when it is opened, and in a later one."""
    shutil.copytree(quantised(quant), tmp_path / "model")
    name, path = "layers.3.mlp.down_proj.weight", tmp_path / "model" / CODES_FILE
    columns = row_numbers(tmp_path / "model", part)
    write_into(path, f"{name}.{part}", 20 * columns + 1 % columns, number)
    weight = load(tmp_path / "model").weights[name]
    assert weight.encoded is not None and weight.read().isfinite().all()
    assert weight.encoded.read_rows(0, 20)[1].isfinite().all()
    with pytest.raises(CheckpointError, match=rf"{CODES_FILE}: {name}, .*, holds .* not finite in row 20: fetch"):
        weight.encoded.read_rows(0, weight.shape[0])
    write_into(path, f"{name}.{part}", 2 * columns, number)
    with pytest.raises(CheckpointError, match=r"not finite in rows 2, 20"):
        load(tmp_path / "model")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("quant", ["none", "int4_block32_bf16:none"])
def test_every_target_refuses_them(cli: Cli, tmp_path: Path, target: str, quant: str) -> None:
    folder = spoilt(tmp_path / "model", NAMES[0], np.nan, torch.bfloat16)
    code, out, err = cli(
        "export", folder, "--target", target, "--quant", quant, "--context", 64, "--out", tmp_path / "a"
    )
    assert code == 2 and "down_proj.weight holds numbers that are not finite in rows 9, 10, 30" in err
    assert "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("target", "quant", "part", "number"),
    [
        *((target, "int8_block32:none", "scales", struct.pack("<f", np.nan)) for target in TARGETS[:4]),
        *((target, "fp8_channel:none", "codes", b"\x7f") for target in TARGETS),
        ("tensorrt", "fp8_channel:none", "scales", struct.pack("<f", np.inf)),
    ],
)
def test_every_target_refuses_such_codes(
    cli: Cli, quantised: Callable[[str], Path], tmp_path: Path, target: str, quant: str, part: str, number: bytes
) -> None:
    """The numbers beside them are finite: targets write codes and scales as they are, and never read those."""
    shutil.copytree(quantised(quant), tmp_path / "model")
    write_into(
        tmp_path / "model" / CODES_FILE, f"{NAMES[0]}.{part}", 20 * row_numbers(tmp_path / "model", part), number
    )
    code, out, err = cli("export", tmp_path / "model", "--target", target, "--context", 64, "--out", tmp_path / "a")
    assert (
        code == 2 and f"{CODES_FILE}: {NAMES[0]}, " in err and " holds numbers that are not finite in row 20: " in err
    )
    assert "Traceback" not in out + err and not (tmp_path / "a").exists()


def test_codes_of_packed_projections(cli: Cli, tmp_path: Path) -> None:
    """Each part of a stacked weight has codes of its own, which are kept as they are shipped."""
    path = write_gguf(tmp_path / "model.gguf", TINY, random_weights(TINY, 0), types={"attn_k.weight": "Q8_0"})
    raw = bytearray(path.read_bytes())
    first = read_header(path).tensors["blk.3.attn_k.weight"].offset + 5 * TINY.hidden_size // 32 * 34
    raw[first : first + 2] = struct.pack("<e", np.nan)
    path.write_bytes(raw)
    options = ("--target", "onnxruntime", "--quant", "as_shipped", "--context", 64)
    code, out, err = cli("export", path, *options, "--out", tmp_path / "a")
    assert code == 2 and "blk.3.attn_k.weight, Q8_0, holds numbers that are not finite in row 5: " in err
    assert "Traceback" not in out + err and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("validate", "--targets", "reference"),
        ("evaluate", "--text", "{text}", "--length", 20),
        ("bisect", "reference", "onnxruntime", "--model"),
        ("quantize", "--scheme", "int4_block32", "--out", "{out}"),
        ("quantize", "--scheme", "int4_block32", "--method", "gptq", "--calibrate", "{text}", "--out", "{out}"),
        ("qat", "--scheme", "int4_block32", "--data", "{text}", "--out", "{out}"),
        ("ranges",),
    ],
    ids=lambda command: command[0],
)
def test_every_command_refuses_them(cli: Cli, tiny: Model, tmp_path: Path, command: tuple[str | int, ...]) -> None:
    assert tiny.tokenizer is not None
    folder = spoilt(tmp_path / "model", NAMES[2], np.inf, torch.float32)
    tiny.tokenizer.save(folder)
    text = tmp_path / "text.txt"
    text.write_text("a few words, and some more of them " * 40)
    name, *options = command
    given = [str(option).format(text=text, out=tmp_path / "out") for option in options]
    where = len(given) if given and given[-1] == "--model" else 0
    code, out, err = cli(name, *given[:where], folder, *given[where:])
    assert code == 2 and "embed_tokens.weight holds numbers that are not finite in rows 9, 10, 30" in err, err
    assert "Traceback" not in out + err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "dtype", "value", "words"),
    [
        ("xla", "bfloat16", 3.4e38, r"reaches 3.4e\+38 in rows 9, 10, 30, of which bfloat16 holds 3.39e\+38"),
        ("tensorrt", "bfloat16", -3.4e38, r"reaches 3.4e\+38 in rows 9, 10, 30, of which bfloat16"),
        ("xla", "float16", 7e4, "reaches 7e+04, of which float16 holds 6.55e+04"),
        ("tensorrt", "float16", -7e4, "reaches 7e+04, of which float16 holds 6.55e+04"),
    ],
)
def test_what_a_narrower_dtype_cannot_hold(
    cli: Cli, tmp_path: Path, target: str, dtype: str, value: float, words: str
) -> None:
    """`GuardRanges` refuses a float16 model by its own measurement, `Weight.to` every other one by its rows."""
    folder = spoilt(tmp_path / "model", NAMES[0], value, torch.float32)
    code, out, err = cli(
        "export", folder, "--target", target, "--dtype", dtype, "--context", 64, "--out", tmp_path / "a"
    )
    assert code == 2 and words.replace("\\", "") in err, err
    assert "Traceback" not in out + err and not (tmp_path / "a").exists()


def test_conversions_of_weights_in_memory() -> None:
    weight = Weight.of(torch.tensor([[1.0, 2.0], [7e4, 0.0], [3.0, -1e5]]), "numbers")
    assert torch.equal(weight.to(torch.bfloat16).read(), weight.read().bfloat16())
    with pytest.raises(RangeError, match=r"numbers reaches 1e\+05 in rows 1, 2, of which float16 holds 6.55e\+04"):
        weight.to(torch.float16).read()
    with pytest.raises(RangeError, match="in rows 1, 2"):
        weight.to(torch.float16).read_rows(1, 2)
    assert weight.to(torch.float16).read_rows(0, 1).dtype == torch.float16


def test_eager_modules_hold_no_infinities(tmp_path: Path) -> None:
    model = load(spoilt(tmp_path, NAMES[0], 7e4, torch.float32))
    assert model.eager(torch.bfloat16) is not None
    with pytest.raises(RangeError, match=r"down_proj.weight reaches 7e\+04"):
        model.eager(torch.float16)
