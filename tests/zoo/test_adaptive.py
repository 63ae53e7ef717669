"""A window for every layer: a Llama of transformers with a mask a layer says the same; a run finds windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import transom
from tests.conftest import Cli
from tests.tolerances import FP32_LOGITS
from transom.errors import ConfigError
from transom.zoo.architectures import preset, with_windows
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.model import load

WINDOWS = (4, 16, None, 9)


def test_each_layer_sees_its_own_window(tmp_path: Path) -> None:
    model = load("adaptive-tiny")
    assert [layer.window for layer in model.config.layers] == list(WINDOWS)
    llama = preset("llama3-tiny")
    fields = {name: getattr(model.config, name) for name in vars(llama) if hasattr(model.config, name)}
    twin = type(llama)(**{**fields, "architecture": "llama3", "layer_kinds": ("global",) * len(WINDOWS)})
    write_checkpoint(tmp_path, twin, model.weights, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )

    def bound(window: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            places = torch.arange(mask.shape[-1])
            far = places[:, None] - places >= window
            return args, {**kwargs, "attention_mask": mask.masked_fill(far, torch.finfo(mask.dtype).min)}

        return hook

    for layer, window in zip(theirs.model.layers, WINDOWS, strict=True):
        if window is not None:
            layer.self_attn.register_forward_pre_hook(bound(window), with_kwargs=True)
    eager, ids = model.eager(), torch.randint(0, 500, (1, 3 * 16 + 5), generator=torch.Generator().manual_seed(0))
    for length in (3, 4, 5, 8, 9, 10, 15, 16, 17, 32, 3 * 16 + 5):
        with torch.no_grad():
            expected, actual = theirs(ids[:, :length]).logits, eager(ids[:, :length], torch.tensor(0), None)[0]
        assert (expected - actual).abs().max() < FP32_LOGITS, length


def test_families_of_one_window_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose a model of llama3 or adaptive"):
        with_windows(preset("gemma3-tiny"), (None,) * preset("gemma3-tiny").num_layers)
    with pytest.raises(ConfigError, match="a window of 0"):
        with_windows(preset("llama3-tiny"), (8, 0, None))


def test_what_is_learned_is_what_is_deployed(cli: Cli, tmp_path: Path) -> None:
    """A Llama whose layers are all global becomes a checkpoint of windows, whose caches are what the budget allows."""
    (tmp_path / "text").write_text("A local layer sees a window; a global one sees all that came before it. " * 60)
    code, out, err = cli(
        "learn-windows", "llama3-tiny", "--data", tmp_path / "text", "-o", tmp_path / "learned",
        "--windows", "8,24,all", "--budget", "0.5",
        "--context", "128", "--steps", "8", "--length", "64", "--batch", "2", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["cache"] <= 0.5 and len(report["windows"]) == 3
    learned = load(tmp_path / "learned")
    assert [layer.window for layer in learned.config.layers] == report["windows"]
    transom.compile(learned, target="onnx", context=128, chunk=16, out=tmp_path / "artifact")
    session = transom.open(tmp_path / "artifact")
    ids = [(7 * step) % 500 for step in range(3 * 24 + 5)]
    logits = session.logits(ids)
    with torch.no_grad():
        expected = learned.eager()(torch.tensor([ids]), torch.tensor(0), None)[0][0]
    assert (torch.from_numpy(logits) - expected).abs().max() < FP32_LOGITS
    windows = {state.layer: state.window for state in session.states}
    assert [windows[index] for index in range(3)] == report["windows"]
    code, out, err = cli(
        "learn-windows",
        "llama3-tiny",
        "--data",
        tmp_path / "text",
        "-o",
        tmp_path / "no",
        "--windows",
        "8,x",
        "--budget",
        "1",
    )
    assert code == 2 and "write numbers of keys and all" in err and not (tmp_path / "no").exists()
