"""Adapters: merged they are what they are beside weights, their files are peft's, what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import transom
from tests.conftest import Cli
from tests.images.sequences import sequence
from tests.tolerances import FP32_LOGITS
from transom.backends.artifact import read_manifest
from transom.errors import CheckpointError
from transom.training.objectives.vision import Vision, VisionSettings
from transom.validation.candidates import check_same, model_of
from transom.zoo.checkpoints.adapter import read_adapter, write_adapter
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.model import Model, load

NAME = "gemma3-vision-tiny"
PROJECTOR = "multi_modal_projector.mm_input_projection_weight"
HEAD = "base_model.model.model."


@pytest.fixture(scope="module")
def model() -> Model:
    return load(NAME, images=True)


def trained(model: Model, train: str = "both", rank: int = 2) -> Vision:
    """A model with an adapter whose products are not zero."""
    objective = Vision(model, VisionSettings(train=train, rank=rank, alpha=3.0), [])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in objective.parameters.items():
            if name.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return objective


@pytest.fixture(scope="module")
def adapter(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All matrices of tower and projector."""
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, trained(model).factors(), alpha=3.0, base=NAME)
    return folder


def soft_tokens(module: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        soft: torch.Tensor = module.encode_image(pixels)
    return soft


def test_merged_is_what_stood_beside(model: Model, adapter: Path) -> None:
    merged = load(NAME, images=True, adapter=adapter)
    pixels = sequence(model, "ii").pixels
    expected, actual = soft_tokens(trained(model).module, pixels), soft_tokens(merged.eager(), pixels)
    assert (actual - expected).abs().max() < FP32_LOGITS
    assert (actual - soft_tokens(model.eager(), pixels)).abs().max() > 100 * FP32_LOGITS
    # The decoder is the same object, and nothing is read before it is asked for.
    assert (
        merged.weights["norm.weight"] is model.weights["norm.weight"] or merged.weights.keys() == model.weights.keys()
    )
    name = "vision_tower.encoder.layers.1.mlp.fc1.weight"
    blocks = torch.cat(list(merged.weights[name].blocks(limit=48 * 4 * 7)))
    torch.testing.assert_close(blocks, merged.weights[name].read())


def test_names_are_those_of_peft(model: Model, tmp_path: Path) -> None:
    write_adapter(tmp_path, trained(model).factors(), alpha=3.0, base=NAME)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    linears = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    modules = [f"vision_tower.encoder.layers.{layer}.{linear}" for layer in (0, 1) for linear in linears]
    assert tensors.keys() == {
        f"{HEAD}{module}.lora_{factor}.weight" for module in [*modules, "multi_modal_projector"] for factor in "AB"
    }
    assert tensors[f"{HEAD}{modules[4]}.lora_A.weight"].shape == (2, 48)
    assert tensors[f"{HEAD}{modules[4]}.lora_B.weight"].shape == (80, 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3.0)
    assert sorted(config["target_modules"]) == sorted(f"model.{module}" for module in modules)
    assert config["target_parameters"] == [f"model.{PROJECTOR}"]


@pytest.fixture(scope="module")
def theirs(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """The same weights in transformers."""
    folder = tmp_path_factory.mktemp("theirs")
    write_checkpoint(folder, model.config, model.weights, dtype=torch.float32)
    return lambda: transformers.Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def test_peft_reads_what_we_write(model: Model, theirs: Callable[[], Any], adapter: Path) -> None:
    peft = pytest.importorskip("peft")
    text = sequence(model, "tit")
    adapted = peft.PeftModel.from_pretrained(theirs(), adapter)
    merged = load(NAME, images=True, adapter=adapter)
    again = sequence(merged, "tit")
    ids = torch.where(text.tokens < 0, adapted.config.image_token_id, text.tokens)[None]
    with torch.no_grad():
        expected = adapted(
            input_ids=ids, token_type_ids=(text.tokens < 0).long()[None], pixel_values=text.pixels
        ).logits[0]
    assert (torch.from_numpy(again.logits(merged)) - expected).abs().max() < FP32_LOGITS


@pytest.mark.parametrize("projector", [True, False])
def test_we_read_what_peft_writes(projector: bool, model: Model, theirs: Callable[[], Any], tmp_path: Path) -> None:
    """Of the tower, of the projector, and of the decoder's linears too."""
    peft = pytest.importorskip("peft")
    parts = {"target_parameters": [PROJECTOR]} if projector else {"use_rslora": True}
    config = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=["q_proj", "fc2", "down_proj"], init_lora_weights=False, **parts
    )
    adapted = peft.get_peft_model(theirs(), config)
    adapted.save_pretrained(tmp_path)
    merged = load(NAME, images=True, adapter=tmp_path)
    text, tokens = sequence(merged, "ti"), torch.arange(3, 60)
    with torch.no_grad():
        soft = adapted.base_model.model.get_image_features(text.pixels).pooler_output.flatten(0, -2)
        logits = adapted(input_ids=tokens[None]).logits[0]
        ours = merged.eager()(tokens[None], torch.tensor(0), None)[0][0]
    assert (soft - text.soft[text.tokens < 0]).abs().max() < FP32_LOGITS
    assert (ours - logits).abs().max() < FP32_LOGITS


def rename(adapter: Path, folder: Path, change: Callable[[str], str]) -> None:
    """An adapter with other names of tensors."""
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    safetensors.torch.save_file(
        {change(name): value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )


def test_names_of_earlier_classes_are_read(model: Model, adapter: Path, tmp_path: Path) -> None:
    rename(adapter, tmp_path, lambda name: name.replace("vision_tower.", "vision_tower.vision_model."))
    shapes = {name: weight.shape for name, weight in model.weights.items()}
    assert read_adapter(tmp_path, shapes).revision == read_adapter(adapter, shapes).revision


def test_an_adapter_of_a_text_decoder(tmp_path: Path) -> None:
    text = load("gemma3-tiny")
    a, b = torch.randn(4, 64), torch.randn(128, 4)
    stem = f"{HEAD}layers.2.self_attn.q_proj.lora_"
    safetensors.torch.save_file({f"{stem}A.weight": a, f"{stem}B.weight": b}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name = "layers.2.self_attn.q_proj.weight"
    merged = load("gemma3-tiny", adapter=tmp_path)
    torch.testing.assert_close(merged.weights[name].read(), text.weights[name].read() + 3 * b @ a)
    assert merged.revision.startswith("seed 0 + sha256:")


def test_what_is_merged_is_not_rounded_again(model: Model, adapter: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, model.config, model.weights)
    base, merged = load(tmp_path, images=True), load(tmp_path, images=True, adapter=adapter)
    a, b = trained(model).factors()[PROJECTOR]
    weight, stored = merged.weights[PROJECTOR], base.weights[PROJECTOR]
    assert stored.dtype == torch.bfloat16 and weight.dtype == torch.float32
    torch.testing.assert_close(weight.read(), stored.read().float() + 1.5 * b @ a)
    assert merged.weights["norm.weight"].dtype == torch.bfloat16


def _tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")


def _config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))


_FIRST = f"{HEAD}multi_modal_projector.lora_A.weight"

FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "no adapter_config.json: give the folder"),
    "no tensors": (lambda path: (path / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "pickled": (
        lambda path: (path / "adapter_model.safetensors").rename(path / "adapter_model.bin"), "save it as safetensors"
    ),
    "config is no JSON": (lambda path: (path / "adapter_config.json").write_text("{"), "not readable as JSON"),
    "truncated": (
        lambda path: (path / "adapter_model.safetensors").write_bytes(
            (path / "adapter_model.safetensors").read_bytes()[:-5]
        ),
        "but its header describes",
    ),
    "another rank": (lambda path: _config(path, r=3), "expected .*: the config says rank 3"),
    "no rank": (lambda path: _config(path, r="8"), 'r is "8": expected a whole number'),
    "no alpha": (lambda path: _config(path, lora_alpha=None), "lora_alpha is null: expected a finite number"),
    "another kind": (lambda path: _config(path, peft_type="LOHA"), "only adapters of LORA are merged"),
    "dora": (lambda path: _config(path, use_dora=True), "use_dora is true: it is not merged"),
    "ranks of its own": (lambda path: _config(path, rank_pattern={"q_proj": 4}), "rank_pattern"),
    "whole modules": (lambda path: _config(path, modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (lambda path: _config(path, bias="all"), "bias is \"all\""),
    "other base weights": (lambda path: _config(path, init_lora_weights="pissa"), "the model's own weights"),
    "unknown key": (lambda path: _config(path, use_later=True), "use_later is true: it is not merged"),
    "a parameter that is not named": (lambda path: _config(path, target_parameters=None), "no such matrix"),
    "another width": (
        lambda path: _tensors(path, lambda tensors: tensors.update({_FIRST: torch.zeros(2, 65)})),
        r"has shape \[2, 65\], expected \[2, 64\]: the adapter is of another model",
    ),
    "unknown module": (
        lambda path: _tensors(path, lambda tensors: tensors.update({f"{HEAD}head.lora_A.weight": torch.zeros(2, 64)})),
        "head.lora_A.weight: the model has no such matrix",
    ),
    "an embedding": (
        lambda path: _tensors(path, lambda tensors: tensors.update({f"{HEAD}x.lora_embedding_A": torch.zeros(2)})),
        "train linear layers alone",
    ),
    "one factor": (lambda path: _tensors(path, lambda tensors: tensors.pop(_FIRST)), "lack one of two factors"),
    "NaN": (
        lambda path: _tensors(path, lambda tensors: tensors[_FIRST].fill_(float("nan"))), "holds NaN or infinity"
    ),
    "integers": (
        lambda path: _tensors(path, lambda tensors: tensors.update({_FIRST: torch.zeros(2, 64, dtype=torch.int8)})),
        "is I8, expected one of F32",
    ),
    "empty": (lambda path: _tensors(path, lambda tensors: tensors.clear()), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(fault: str, adapter: Path, tmp_path: Path) -> None:
    rename(adapter, tmp_path, lambda name: name)
    damage, words = FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        load(NAME, images=True, adapter=tmp_path)


def test_export_merges(model: Model, adapter: Path, tmp_path: Path, cli: Cli) -> None:
    """An artifact's soft tokens and logits are those of the plain module, and its manifest tells of the adapter."""
    out = tmp_path / "artifact"
    code, _, errors = cli("export", NAME, "--adapter", adapter, "--context", 96, "--chunk", 32, "-o", out)
    assert code == 0, errors
    session, merged = transom.open(out), load(NAME, images=True, adapter=adapter)
    manifest = read_manifest(out)
    text = sequence(merged, "tit")
    soft = session.runtime.encode_image(text.pixels.numpy())
    assert abs(torch.from_numpy(soft) - text.soft[text.tokens < 0]).max() < FP32_LOGITS
    rows = np.concatenate(list(session.feed(text.prompt(), wanted="all")))
    assert abs(rows - text.logits(merged)).max() < FP32_LOGITS
    assert manifest.source["adapter"] == str(adapter)
    again = model_of(manifest, out)
    check_same(again, manifest, out)
    assert again.revision == merged.revision != model.revision


def test_export_of_an_adapter_that_does_not_fit_leaves_nothing(adapter: Path, tmp_path: Path, cli: Cli) -> None:
    for name, *options in ((NAME, "--no-vision"), ("gemma3-tiny",)):
        code, _, errors = cli("export", name, "--adapter", adapter, *options, "-o", tmp_path / "artifact")
        assert code == 2 and "the model has no such matrix" in errors and errors.count("\n") == 1
    code, _, errors = cli("export", NAME, "--adapter", tmp_path / "none", "-o", tmp_path / "artifact")
    assert code == 2 and "no adapter_config.json" in errors
    assert list(tmp_path.iterdir()) == []
