"""Quantised checkpoints: what is written, what is read again, and that no target rounds it a second time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import transom
from tests.conftest import Cli
from tests.tolerances import BFLOAT16_LOGITS_TENSORRT, INT8_ACTIVATIONS
from transom.errors import CheckpointError, QuantizationError, TokenizerError
from transom.formats.schemes import scheme
from transom.graphs.weight import Weight
from transom.passes.convert_quantized import dequantized
from transom.training.quantize import PtqMethod, quantize_model
from transom.zoo.checkpoints.codes import CODES_FILE
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.generation import Generation
from transom.zoo.model import Model, load
from transom.zoo.tokenizer import Tokenizer
from transom.zoo.tokenizer_config import TokenizerConfig

SCHEMES = ["int4_block32", "int4", "int4_channel", "int4_block32_bf16", "fp8_channel", "sfp8", "int8_block32:none"]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A local layer sees a window; a global one sees all that came before it. " * 40)
    return path


def numbers(model: Model, quant: str) -> dict[str, torch.Tensor]:
    return {
        name: dequantized(name, weight, scheme(quant))
        for name, weight in model.weights.items()
        if len(weight.shape) > 1
    }


def test_a_checkpoint_keeps_what_its_source_says_beside_the_weights(tiny: Model, tmp_path: Path) -> None:
    assert tiny.tokenizer is not None
    config = TokenizerConfig(template="{{ messages[0].content }}", tokens={"eos_token": "<unused3>"}, adds_bos=False)
    source = dataclasses.replace(
        tiny,
        tokenizer=Tokenizer(tiny.tokenizer._backend, config),
        generation=Generation(stop_ids=(7, 300), sampling={"do_sample": False}),
    )
    quantize_model(source, quant="int4_block32", out=tmp_path / "q")
    again = load(tmp_path / "q")
    assert again.tokenizer is not None and again.tokenizer.config == config
    assert again.generation.sampling == {"do_sample": False}
    assert set(again.generation.stop_ids) == {1, 7, 262, 266, 300}
    without = dataclasses.replace(source, tokenizer=None)
    quantize_model(without, quant="int4_block32", out=tmp_path / "w")
    assert load(tmp_path / "w").generation.stop_ids == (7, 300)
    quantize_model(source, quant="int4_block32", out=tmp_path / "q", overwrite=True)


@pytest.mark.parametrize("quant", SCHEMES)
def test_a_checkpoint_means_what_its_codes_mean(quant: str, tiny: Model, tmp_path: Path) -> None:
    result = quantize_model(tiny, quant=quant, out=tmp_path / "q")
    again = load(tmp_path / "q")
    assert again.quant == quant and again.tokenizer is not None
    expected = numbers(tiny, quant)
    for name, weight in again.weights.items():
        values = weight.read()
        if name in expected and scheme(quant).of(name):
            assert weight.encoded is not None and values.dtype == torch.float32
            assert torch.equal(values, expected[name]), name
            # Converting again changes nothing: the codes are kept.
            assert torch.equal(dequantized(name, weight, scheme(quant)), values)
        else:
            assert torch.equal(values, tiny.weights[name].read())
    errors = {entry.weight: entry for entry in result.conversions}
    for name, entry in errors.items():
        difference = expected[name] - tiny.weights[name].read()
        assert entry.max_abs == pytest.approx(float(difference.abs().max()))
        assert entry.error == pytest.approx(float(difference.norm() / tiny.weights[name].read().norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("quant", "target", "bound"),
    [("int4_block32", "onnx", INT8_ACTIVATIONS), ("int4_block32_bf16", "tensorrt", BFLOAT16_LOGITS_TENSORRT)],
)
def test_what_is_deployed_are_the_codes(
    quant: str, target: str, bound: float, tiny: Model, calibration: Path, tmp_path: Path
) -> None:
    """Through packing, and although rounding to nearest would give other codes."""
    quantize_model(tiny, quant=quant, out=tmp_path / "q", method="gptq", text=calibration)
    again = load(tmp_path / "q")
    artifact = transom.compile(again, out=tmp_path / "artifact", target=target)
    assert artifact.manifest.quantization == quant
    assert artifact.manifest.conversions and all(entry["kept"] for entry in artifact.manifest.conversions)
    near = numbers(tiny, quant)
    assert not torch.equal(again.weights["layers.0.mlp.up_proj.weight"].read(), near["layers.0.mlp.up_proj.weight"])
    with torch.no_grad():
        ids = [(7 * step) % 500 for step in range(60)]
        expected, _ = again.eager()(torch.tensor([ids]), torch.tensor(0), None)
    session = transom.open(tmp_path / "artifact")
    difference = torch.from_numpy(session.logits(ids)) - expected[0]
    assert float(difference.square().mean().sqrt()) < bound, "what the runtime computes in, and nothing else"


def test_a_checkpoint_in_bfloat16_is_calibrated_too(tiny: Model, calibration: Path, tmp_path: Path) -> None:
    """What it was before it was widened is not read again."""
    name = "layers.0.mlp.up_proj.weight"
    saved = {key: dataclasses.replace(one.to(torch.bfloat16), exact=None) for key, one in tiny.weights.items()}
    half = dataclasses.replace(tiny, weights=saved)
    weights = {}
    for method, text in (("nearest", None), ("gptq", calibration)):
        quantize_model(half, quant="int4_block32", out=tmp_path / method, method=method, text=text)  # type: ignore[arg-type]
        weights[method] = load(tmp_path / method).weights[name].read()
    assert not torch.equal(weights["nearest"], weights["gptq"])


def test_transformers_read_it(tiny: Model, tmp_path: Path) -> None:
    quantize_model(tiny, quant="int4_block32", out=tmp_path / "q")
    theirs = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    state = theirs.state_dict()
    for name, weight in load(tmp_path / "q").weights.items():
        assert torch.equal(state[f"model.{name}"], weight.read()), name


def divergence(model: Model, other: Model, ids: list[int]) -> float:
    with torch.no_grad():
        p, q = (m.eager()(torch.tensor([ids]), torch.tensor(0), None)[0][0].log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_calibration_is_worth_it(tiny: Model, calibration: Path, tmp_path: Path) -> None:
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode(calibration.read_text())[:100]
    divergences: dict[str, float] = {}
    methods: tuple[PtqMethod, ...] = ("nearest", "mse", "gptq")
    for method in methods:
        text = calibration if method == "gptq" else None
        quantize_model(tiny, quant="int4_block32", out=tmp_path / method, method=method, text=text)
        divergences[method] = divergence(tiny, load(tmp_path / method), ids)
    assert divergences["gptq"] < 0.4 * divergences["nearest"]
    assert divergences["gptq"] < 0.4 * divergences["mse"]


def spoil(path: Path, change: Any) -> None:
    """Change bytes of a file."""
    raw = bytearray(path.read_bytes())
    path.write_bytes(change(raw))


def test_codes_under_their_former_name_are_read(tiny: Model, tmp_path: Path) -> None:
    quantize_model(tiny, quant="int8_block32:none", out=tmp_path / "q")
    (tmp_path / "q" / CODES_FILE).rename(tmp_path / "q" / "lattice.safetensors")
    assert load(tmp_path / "q").quant == "int8_block32:none"


@pytest.mark.parametrize("case", ["cut", "other numbers", "no scheme", "unknown scheme", "missing part"])
def test_damaged_codes_are_refused(case: str, tiny: Model, tmp_path: Path) -> None:
    folder = tmp_path / "q"
    quantize_model(tiny, quant="int8_block32:none", out=folder)
    path, words = folder / CODES_FILE, "quantise it again"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if case == "cut":
        path.write_bytes(raw[:-5])
        words = "fetch the file again"
    elif case == "other numbers":
        model_file = folder / "model.safetensors"
        spoil(model_file, lambda data: data[:-4096] + bytes(4096))
        # The norms come last; a matrix is what must be spoilt.
        size = int.from_bytes(model_file.read_bytes()[:8], "little")
        entry = json.loads(model_file.read_bytes()[8 : 8 + size])["model.layers.2.mlp.up_proj.weight"]
        start = 8 + size + entry["data_offsets"][0]
        spoil(model_file, lambda data: data[:start] + b"\0\0\0\x40" + data[start + 4 :])
        words = "was changed after it was quantised"
    else:
        metadata = header["__metadata__"]
        if case == "no scheme":
            del metadata["scheme"]
        elif case == "unknown scheme":
            metadata["scheme"] = "int3"
        else:
            metadata["specs"] = metadata["specs"].replace("layers.0.mlp.up_proj", "layers.0.mlp.upper_proj")
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match=words):
        load(folder)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown scheme": ({"quant": "int3"}, QuantizationError, "int3"),
    "nothing to quantise": ({"quant": "none"}, QuantizationError, "quantises nothing"),
    "unknown method": ({"method": "magic"}, QuantizationError, "choose one of nearest, mse, gptq"),
    "no text": ({"method": "gptq"}, QuantizationError, "--calibrate"),
    "missing text": ({"method": "gptq", "text": Path("missing.txt")}, TokenizerError, "cannot read the text"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_leaves_nothing_behind(case: str, tiny: Model, tmp_path: Path) -> None:
    options, error, words = BAD[case]
    with pytest.raises(error, match=words):
        quantize_model(tiny, out=tmp_path / "q", **({"quant": "int4_block32"} | options))
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(TokenizerError, match="one sequence needs"):
        quantize_model(tiny, quant="int4_block32", out=tmp_path / "q", method="gptq", text=tmp_path / "short.txt")


def test_codes_of_another_spec_are_rounded_and_said(tiny: Model, tmp_path: Path) -> None:
    quantize_model(tiny, quant="int8_block32", out=tmp_path / "q")
    artifact = transom.compile(load(tmp_path / "q"), quant="int4_block32", out=tmp_path / "a", target="onnx")
    kept = {entry["weight"]: entry for entry in artifact.manifest.conversions}
    assert not kept["layers.0.mlp.down_proj.weight"]["kept"]
    assert kept["layers.0.mlp.down_proj.weight"]["source"] == "int8 in blocks of 32"
    assert 0.05 < kept["layers.0.mlp.down_proj.weight"]["error"] < 0.12


@pytest.mark.parametrize("quant", ["int4_block32", "int4_channel"])
def test_a_grid_without_codes_is_found_again(quant: str, tiny: Model, tmp_path: Path) -> None:
    """As checkpoints trained for 4 bits are released: bfloat16, and nothing beside it."""
    quantize_model(tiny, quant=quant, out=tmp_path / "codes")
    coded = load(tmp_path / "codes")
    bare = {name: dataclasses.replace(weight, encoded=None) for name, weight in coded.weights.items()}
    write_checkpoint(tmp_path / "bare", tiny.config, bare, dtype=torch.bfloat16)
    again = load(tmp_path / "bare")
    assert again.quant == "none"
    result = quantize_model(again, quant=f"{quant}:none", out=tmp_path / "recovered")
    for record in result.conversions:
        weight = again.weights[record.weight]
        assert record.recovered == weight.shape[0] and not record.kept
        numbers = load(tmp_path / "recovered").weights[record.weight].read()
        assert torch.equal(numbers.bfloat16(), weight.read()), "to the last bit of what was saved"
        near = dequantized(record.weight, Weight.of(coded.weights[record.weight].read()), scheme(quant))
        assert float((numbers - near).abs().max()) <= 2**-8 * float(near.abs().max())
    # What is on no grid is rounded, and said to be.
    rounded = quantize_model(tiny, quant=quant, out=tmp_path / "rounded")
    assert not any(record.recovered for record in rounded.conversions)


def test_a_folder_with_codes_of_others_is_not_replaced(cli: Cli, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"codes": torch.zeros(1)}, tmp_path / CODES_FILE)
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, err = cli("quantize", "gemma3-tiny", "--scheme", "int8", "-o", tmp_path, "--overwrite")
    assert code == 2 and "is not a checkpoint that transom wrote" in err
    assert {path.name for path in tmp_path.iterdir()} == {CODES_FILE, "thesis.txt"}


def test_command_line(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    options = ("--scheme", "int4_block32", "--calibrate", calibration, "--samples", 2, "-o", out)
    code, text, err = cli("quantize", "gemma3-tiny", *options, "--json")
    assert code == 0, err
    report = json.loads(text)
    assert report["method"] == "gptq" and report["scheme"] == "int4_block32"
    assert all(0.01 < entry["error"] < 0.3 for entry in report["conversions"] if "layers" in entry["weight"])
    assert {entry["weight"] for entry in report["conversions"]} == {
        name for name, weight in load(out).weights.items() if weight.encoded is not None
    }
    code, text, err = cli("export", out, "-o", tmp_path / "a")
    assert code == 0 and "kept to the bit" in text, err
    assert cli("quantize", "gemma3-tiny", *options)[0] == 2, "it exists already"
    assert cli("quantize", "gemma3-tiny", *options, "--overwrite")[0] == 0
    code, _, err = cli("quantize", out, "--scheme", "int8", "-o", out, "--overwrite")
    assert code == 2 and "is the model that is read" in err
    (out / "notes.txt").write_text("mine")
    code, _, err = cli("quantize", "gemma3-tiny", *options, "--overwrite")
    assert code == 2 and "holds what transom did not write there (notes.txt)" in err
    assert load(out).quant == "int4_block32" and (out / "notes.txt").read_text() == "mine"
    code, _, err = cli(
        "quantize",
        "gemma3-tiny",
        "--scheme",
        "int8",
        "--method",
        "mse",
        "--calibrate",
        calibration,
        "-o",
        tmp_path / "x",
    )
    assert code == 2 and "reads no text" in err
