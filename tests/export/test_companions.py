"""What goes into an artifact beside the model: stop tokens, sampling, the chat template, and what was left out."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

import transom
from tests.conftest import Cli
from tests.tolerances import FP32_LOGITS
from tests.zoo.tiny_gguf import TINY, write_gguf
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.model import load
from transom.zoo.tokenizer import Tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SAMPLED = {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.5}


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A checkpoint whose files disagree about stop tokens, with a chat template that is not Gemma's."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, folder)
    Tokenizer.of_bytes(512).save(folder)
    change(folder / "config.json", eos_token_id=[1, 300], colour="red")
    change(folder / "generation_config.json", eos_token_id=[1, 50], repetition_penalty=1.5, **SAMPLED)
    change(folder / "tokenizer_config.json", eos_token="<unused1>", chat_template=CHATML)
    return folder


def change(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(data | values))


def typed(text: str) -> io.TextIOWrapper:
    """Standard input with a text in it."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")


def export(source: str | Path, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and generation_config.json of an artifact."""
    transom.compile(load(source), out=out, context=64, chunk=16)
    return json.loads((out / "manifest.json").read_text()), json.loads((out / "generation_config.json").read_text())


def test_the_sources_own(folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    manifest, generation = export(folder, out)
    # generation_config.json, config.json, the tokenizer's end of turn and what its config names.
    assert manifest["stop_ids"] == [1, 50, 262, 264, 300] == generation["eos_token_id"]
    assert {key: generation[key] for key in SAMPLED} == SAMPLED
    assert manifest["not_done"][:2] == [
        "config.json: nothing reads the keys colour",
        "generation_config.json: repetition_penalty = 1.5 is not applied",
    ]
    session = transom.open(out)
    assert session.stop_ids == {1, 50, 262, 264, 300} and session.tokenizer is not None
    expected = session.tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n", bos=False)
    assert session.tokenizer.encode_chat([{"role": "user", "content": "hi"}]) == expected
    prompts = []
    encode = Tokenizer.encode

    def recorded(self: Tokenizer, text: str, bos: bool = True) -> list[int]:
        prompts.append(text)
        return encode(self, text, bos)

    monkeypatch.setattr(Tokenizer, "encode", recorded)
    monkeypatch.setattr("sys.stdin", typed("hi\n"))
    assert cli("chat", out, "--max-new-tokens", 2)[0] == 0
    assert prompts[-1] == "<|im_start|>user\nhi<|im_end|>\n"


def test_greedy_where_the_source_does_not_sample(
    folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": null, "top_k": null}')
    _, generation = export(folder, tmp_path / "out")
    assert generation["do_sample"] is False
    answers = set()
    for _ in range(3):
        monkeypatch.setattr("sys.stdin", typed("hi\n"))
        code, answer, _ = cli("chat", tmp_path / "out", "--max-new-tokens", 8)
        assert code == 0
        answers.add(answer)
    assert len(answers) == 1 and answers != {"\n"}


def test_a_hub_ids_own_are_read_from_the_snapshot(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns: list[str] = []

    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    decoy = tmp_path / "google/gemma-3-tiny"
    decoy.mkdir(parents=True)
    (decoy / "generation_config.json").write_text('{"eos_token_id": 99, "do_sample": false}')
    monkeypatch.chdir(tmp_path)
    # A relative path with that name is a folder; the hub is asked where there is none.
    shutil.move(decoy, tmp_path / "elsewhere")
    model = load("google/gemma-3-tiny")
    (tmp_path / "google").mkdir(exist_ok=True)
    shutil.move(tmp_path / "elsewhere", decoy)
    transom.compile(model, out=tmp_path / "out", context=64, chunk=16)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 50, 262, 264, 300] and generation["top_k"] == 7
    assert "*.jinja" in patterns and "*.json" in patterns


@pytest.mark.parametrize("context", [1, 2, 17])
def test_models_of_a_short_context(context: int, tmp_path: Path) -> None:
    config = dataclasses.replace(preset("gemma3-tiny"), context=context)
    write_checkpoint(tmp_path / "m", config, random_weights(config, 0))
    model = load(tmp_path / "m")
    session = transom.open(transom.compile(model, out=tmp_path / "out").folder)
    ids = [2, 9, 4, 7][:context]
    with torch.no_grad():
        expected = model.eager()(torch.tensor([ids]), torch.tensor(0), None)[0][0].numpy()
    assert np.abs(session.logits(ids) - expected).max() < FP32_LOGITS


def test_heads_that_a_runtime_does_not_take(tmp_path: Path, cli: Cli) -> None:
    config = dataclasses.replace(preset("gemma3-tiny"), head_dim=12)
    write_checkpoint(tmp_path / "m", config, random_weights(config, 0))
    code, _, error = cli("export", tmp_path / "m", "-o", tmp_path / "out")
    assert code == 2 and "multiple of 8, not 12: choose 'onnx'" in error and not (tmp_path / "out").exists()
    assert cli("export", tmp_path / "m", "-o", tmp_path / "out", "--target", "onnx")[0] == 0


def test_gguf(tmp_path: Path) -> None:
    ids = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 200, "tokenizer.ggml.bos_token_id": 2}
    path = write_gguf(
        tmp_path / "m.gguf",
        TINY,
        random_weights(TINY, 0),
        general={**ids, "tokenizer.chat_template": CHATML, "general.sampling.top_k": 9},
    )
    manifest, generation = export(path, tmp_path / "out")
    assert manifest["stop_ids"] == [1, 200, 271] and generation["top_k"] == 9
    assert (tmp_path / "out/chat_template.jinja").read_text() == CHATML


def test_a_template_that_is_not_valid(folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder / "tokenizer_config.json", chat_template="{% for %}")
    code, out, _ = cli("export", folder, "-o", tmp_path / "out", "--context", 64)
    assert code == 0 and "not done: chat: the checkpoint's chat template is not valid in line 1" in out
    monkeypatch.setattr("sys.stdin", typed("hi\n"))
    code, _, error = cli("chat", tmp_path / "out")
    assert code == 2 and "chat template is not valid in line 1" in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["[1, 2]", "{"])
def test_a_malformed_generation_config_is_refused(folder: Path, tmp_path: Path, cli: Cli, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    code, _, error = cli("export", folder, "-o", tmp_path / "out")
    assert code == 2 and "generation_config.json" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
