"""gpt-oss's own: experts as its checkpoints hold them, and codes that stay what they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.tolerances import INT8_EXPERTS
from tests.zoo.tiny_gguf import STORABLE, write_gguf
from transom.backends.opening import open_session
from transom.compiler import compile_model
from transom.errors import CheckpointError, ConfigError
from transom.export.options import Options
from transom.formats.schemes import scheme
from transom.graphs.weight import Weight
from transom.passes.conversion import can_hold, encode
from transom.passes.convert_quantized import scheme_spec
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.model import Model, load

EXPERTS, WIDTH, HIDDEN = 4, 64, 32
MATRICES = {"gate_up_proj": (2 * HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with experts of random codes, as the released checkpoints hold them."""
    folder = tmp_path_factory.mktemp("gpt-oss-tiny")
    model = load("gpt-oss-tiny")
    write_checkpoint(folder, model.config, model.weights)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for layer in range(model.config.num_layers):
        for name, (rows, columns) in MATRICES.items():
            whole = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[whole]
            shape = (EXPERTS, rows, columns // 32)
            tensors[f"{whole}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{whole}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_expert(model: Model, name: str) -> torch.Tensor:
    """A matrix of every expert as transformers holds it: transposed, gates and ups by turns."""
    rows = model.weights[name].read().view(EXPERTS, -1, model.weights[name].shape[1])
    if "gate_up" in name:
        rows = rows.view(EXPERTS, 2, HIDDEN, -1).transpose(1, 2).flatten(1, 2)
    return rows.transpose(1, 2)


def test_mxfp4_is_read_to_the_bit(packed: Path) -> None:
    model, tensors = load(packed), load_file(packed / "model.safetensors")
    for name in MATRICES:
        ours = f"layers.1.mlp.experts.{name}"
        parts = (tensors[f"model.{ours}_{part}"] for part in ("blocks", "scales"))
        theirs = convert_moe_packed_tensors(*parts, dtype=torch.float32)
        assert torch.equal(by_expert(model, ours), theirs)
        codes = model.weights[ours].encoded
        assert codes is not None and codes.name == "MXFP4"
        rows = model.weights[ours].read()
        assert torch.equal(codes.decode(codes.read_rows(5, 77)), rows[5:77])
        # Eight bits hold them too: what such a target multiplies with is what the checkpoint says.
        for name_of_scheme, bits in (("int8", 8), ("mxfp4", 4), ("as_shipped", 4)):
            spec = scheme_spec(scheme(name_of_scheme), ours, model.weights[ours])
            assert spec is not None and spec.bits == bits and can_hold(spec, codes)
            encoded, record = encode(ours, model.weights[ours], spec)
            assert record.kept and record.source == "MXFP4"
            assert torch.equal(encoded.dequantized(), rows)


def test_another_packing_is_refused(packed: Path, tmp_path: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="packed by awq"):
        load(tmp_path)


def test_codes_of_another_size_are_refused(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj_scales is U8 \[4, 63, 1\], expected U8 \[4, 64, 1\]"):
        load(tmp_path)


def test_columns_that_blocks_do_not_divide_are_refused(packed: Path, tmp_path: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    tensors = load_file(packed / "model.safetensors")
    for name, tensor in tensors.items():
        if ".gate_up_proj" in name:
            tensors[name] = torch.cat((tensor, tensor[:, :32]), dim=1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj is MXFP4, whose blocks of 32 do not divide 48 columns"):
        load(tmp_path)


def test_mxfp4_of_a_gguf_file_keeps_its_codes(tmp_path: Path) -> None:
    config = dataclasses.replace(STORABLE["gpt_oss"], name="again")
    weights = random_weights(config, 5)
    again = load(write_gguf(tmp_path / "again.gguf", config, weights, types={"exps.weight": "MXFP4"}))
    for name in ("layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"):
        codes, rows = again.weights[name].encoded, again.weights[name].read()
        assert codes is not None and codes.name == "MXFP4"
        assert torch.equal(codes.decode(codes.read_rows(3, 40)), rows[3:40])
        # Steps between the largest floats of 4 bits are a third of the numbers there.
        assert 0 < (rows - weights[name].read()).abs().max() < 0.25 * weights[name].read().abs().max()


def test_int8_is_near_where_no_choice_of_experts_changes(tmp_path: Path) -> None:
    """What rounding does beyond its usual errors is that other experts are chosen."""
    model = load("gpt-oss-tiny")
    weights = dict(model.weights)
    for layer in range(model.config.num_layers):
        bias = torch.zeros(EXPERTS)
        bias[[layer % EXPERTS, (layer + 1) % EXPERTS]] = 30.0
        weights[f"layers.{layer}.mlp.router.bias"] = Weight.of(bias)
    model = dataclasses.replace(model, weights=weights)
    compile_model(model, Options.of(model, target="onnxruntime", quant="int8", context=128), out=tmp_path / "int8")
    ids_T = torch.randint(0, 512, (100,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_TV = model.eager()(ids_T[None], torch.tensor(0), None)[0][0]
    logits_TV = torch.from_numpy(open_session(tmp_path / "int8").logits(ids_T.tolist()))
    assert 0 < (logits_TV - expected_TV).square().mean().sqrt() < INT8_EXPERTS


def test_the_manifest_tells_that_mxfp4_takes_8_bits(packed: Path, tmp_path: Path) -> None:
    """Where the target has no products with 4-bit floats."""
    model = load(packed)
    options = Options.of(model, target="onnxruntime", quant="mxfp4", context=128)
    manifest = compile_model(model, options, out=tmp_path / "mxfp4").manifest
    kept = {entry["weight"]: entry["kept"] for entry in manifest.conversions}
    assert {name for name, is_kept in kept.items() if is_kept} == {name for name in kept if ".experts." in name}
    assert any(line.startswith("float4_e2m1fn: its codes are written as int8") for line in manifest.not_done)
