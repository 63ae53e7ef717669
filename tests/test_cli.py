"""The command line: its contracts, and one line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from transom.backends.artifact import read_manifest, write_manifest
from transom.cli import main
from transom.cli.options import console, progress_console
from transom.cli.run import _summary
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, exported through the command line."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["transom", "export", "gemma3-tiny", "-o", str(folder), "--context", "128"])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return folder


def test_plan_contract(cli: Cli) -> None:
    code, out, _ = cli("plan", "gemma3-270m", "--context", 32768, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["parameters"] == 268_098_176
    assert plan["context"] == 32768
    assert plan["cache_dtype"] == "bf16"
    # 3 global layers of 1,024 bytes a token; 15 local ones that hold 512 tokens each.
    assert plan["cache_bytes_bounded"] == 3072 * 32768 + 7_864_320
    assert plan["cache_bytes_global_only"] == 18_432 * 32768
    assert plan["weight_bytes"] == 2 * plan["parameters"]
    assert plan["layers"][0] == {"index": 0, "kind": "local", "window": 512, "slots": 512, "bytes": 512 * 1024}
    assert [layer["index"] for layer in plan["layers"] if layer["kind"] == "global"] == [5, 11, 17]


def test_plan_options(cli: Cli) -> None:
    bf16 = json.loads(cli("plan", "gemma3-1b", "--context", 4096, "--quant", "int8", "--json")[1])
    fp32 = json.loads(cli("plan", "gemma3-1b", "--context", 4096, "--cache-dtype", "fp32", "--json")[1])
    assert fp32["cache_bytes_bounded"] == 2 * bf16["cache_bytes_bounded"]
    assert bf16["weight_bytes"] < fp32["weight_bytes"]


def test_list_and_show(cli: Cli) -> None:
    listed = json.loads(cli("list", "--json")[1])
    assert {"gemma3-tiny", "gemma3-270m", "gemma3-27b"} <= {row["name"] for row in listed["models"]}
    assert set(listed["targets"]) == {"onnxruntime", "onnx", "xla", "tvm", "tensorrt"}
    assert "gemma3-27b" in cli("list")[1]
    shown = json.loads(cli("show", "gemma3-27b", "--json")[1])
    assert shown["attention_scale"] == 168**-0.5
    assert "LLLLLG" in cli("show", "gemma3-270m")[1]


def test_run_contract(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("hello " * 8)
    options = ("--max-new-tokens", 9, "--temperature", 0, "--json")
    code, out, _ = cli("run", artifact, "--prompt-file", prompt, *options)
    report = json.loads(out)
    assert code == 0
    assert set(report) == {
        "text", "tokens", "prompt_tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "cache_bytes",
        "peak_rss_bytes", "load_s",
    }  # fmt: skip
    assert 1 <= len(report["tokens"]) <= 9
    # 4 local layers of window 16 + chunk 128 - 1 slots, 2 global layers of the whole context; 2 heads of 32, float32.
    slot = 2 * 2 * 32 * 4
    assert report["cache_bytes"] == {"local": 4 * 143 * slot, "global": 2 * 128 * slot}
    assert json.loads(cli("run", artifact, "--prompt", "hello " * 8, *options)[1])["tokens"] == report["tokens"]


def test_run_prints_the_text(cli: Cli, artifact: Path) -> None:
    code, out, err = cli("run", artifact, "--prompt", "hello", "--max-new-tokens", 3)
    assert code == 0
    assert out.startswith("hello")
    assert "tokens/s" in err


def test_sampling_is_repeatable(cli: Cli, artifact: Path) -> None:
    options = ("--prompt", "hello", "--temperature", 5, "--json", "--max-new-tokens", 20)
    tokens = [json.loads(cli("run", artifact, *options, "--seed", seed)[1])["tokens"] for seed in (1, 1, 2)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_bench_contract(cli: Cli, artifact: Path) -> None:
    code, out, _ = cli("bench", artifact, "--prompt-tokens", 20, "--new-tokens", 4, "--past", 40, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["prompt_tokens"], report["past"], report["new_tokens"]) == (20, 40, 4)
    assert report["prefill_tokens_per_s"] > 0 < report["decode_tokens_per_s"]
    assert {"cache_bytes", "peak_rss_bytes", "load_s"} <= set(report)


def test_inspect(cli: Cli, artifact: Path) -> None:
    manifest = json.loads(cli("inspect", artifact, "--json")[1])
    assert manifest["context"] == 128
    assert {"FuseAttention", "BoundLocalCaches"} <= {record["name"] for record in manifest["passes"]}
    assert "BoundLocalCaches" in cli("inspect", artifact)[1]


def test_random_weights_of_any_config(cli: Cli, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", preset("gemma3-tiny"), random_weights(preset("gemma3-tiny"), 0))
    for seed in (1, 2):
        code, _, err = cli(
            "export", tmp_path / "model", "-o", tmp_path / f"out{seed}", "--weights", "random", "--seed", seed
        )
        assert code == 0, err
    first, second = ((tmp_path / f"out{seed}" / "model.onnx.data").read_bytes() for seed in (1, 2))
    assert first != second


def _damage(folder: Path, name: str, position: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[position] ^= 1
    (folder / name).write_bytes(data)


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "unknown model": (("show", "gemma9-1b"), "gemma3-270m"),
    "no weights": (("export", "gemma3-12b", "-o", "{tmp}/x"), "--weights random"),
    "unknown target": (("export", "gemma3-tiny", "-o", "{tmp}/x", "--target", "abacus"), "onnxruntime"),
    "unknown scheme": (("export", "gemma3-tiny", "-o", "{tmp}/x", "--quant", "int3"), "int8"),
    "context beyond the model": (("export", "gemma3-tiny", "-o", "{tmp}/x", "--context", 4096), "512"),
    "folder exists": (("export", "gemma3-tiny", "-o", "{tmp}"), "exists"),
    "weights misspelt": (("export", "gemma3-tiny", "-o", "{tmp}/x", "--weights", "rnd"), "random"),
    "plan of no tokens": (("plan", "gemma3-270m", "--context", 0), "positive"),
    "no artifact": (("run", "{tmp}/none", "--prompt", "x"), "export"),
    "no manifest": (("run", "{tmp}", "--prompt", "x"), "manifest.json"),
    "no prompt": (("run", "{artifact}"), "--prompt"),
    "two prompts": (("run", "{artifact}", "--prompt", "x", "--prompt-file", "y"), "--prompt"),
    "prompt file missing": (("run", "{artifact}", "--prompt-file", "{tmp}/none.txt"), "none.txt"),
    "prompt beyond the context": (("run", "{artifact}", "--prompt", "x" * 200), "128"),
    "new tokens beyond the context": (("run", "{artifact}", "--prompt", "x", "--max-new-tokens", 500), "128"),
    "far too many threads": (("run", "{artifact}", "--prompt", "x", "--threads", 4096), "leave the number out"),
    "chat on far too many threads": (("chat", "{artifact}", "--threads", 4096), "leave the number out"),
    "bench on far too many threads": (("bench", "{artifact}", "--threads", 4096), "leave the number out"),
    "validate on far too many threads": (("validate", "gemma3-tiny", "--threads", 4096), "leave the number out"),
    "evaluate on far too many threads": (
        ("evaluate", "gemma3-tiny", "--text", "{tmp}/x", "--threads", 4096),
        "leave the number out",
    ),
    "a prompt that is no UTF-8": (("run", "{artifact}", "--prompt", "caf\udce9"), "--prompt is not UTF-8"),
    "a system that is no UTF-8": (("chat", "{artifact}", "--system", "caf\udce9"), "--system is not UTF-8"),
    "a prompt file that is a folder": (("run", "{artifact}", "--prompt-file", "{artifact}"), "Is a directory"),
    "no such option": (("run", "{artifact}", "--promt", "x"), "see transom run --help"),
    "no such command": (("walk",), "see transom --help"),
    "an argument missing": (("export", "gemma3-tiny"), "Missing option '--out'"),
    "a number out of range": (("run", "{artifact}", "--max-new-tokens", 0), "'--max-new-tokens'"),
    "one file for two outputs": (
        ("validate", "gemma3-tiny", "--json", "{tmp}/a", "--html", "{tmp}/../{tmp.name}/a"),
        "is named for two outputs",
    ),
    "negative temperature": (("run", "{artifact}", "--prompt", "x", "--temperature", -1), "temperature"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(cli: Cli, artifact: Path, tmp_path: Path, case: str) -> None:
    args, hint = BAD[case]
    filled = [str(arg).format(tmp=tmp_path, artifact=artifact) for arg in args]
    code, out, err = cli(*filled)
    assert code == 2, out + err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
    assert hint in err
    assert not list(tmp_path.iterdir()), "something was left behind"


TEXT_OPTIONS: dict[str, tuple[Any, ...]] = {
    "run": ("{artifact}", "--prompt-file"),
    "ranges": ("gemma3-tiny", "--text"),
    "validate": ("{artifact}", "--text"),
    "evaluate": ("{artifact}", "--text"),
    "quantize": ("gemma3-tiny", "--scheme", "int8", "-o", "{tmp}/x", "--calibrate"),
    "qat": ("gemma3-tiny", "--scheme", "int8", "-o", "{tmp}/x", "--data"),
    "distill": ("gemma3-tiny", "--teacher", "gemma3-tiny", "-o", "{tmp}/x", "--data"),
    "learn-windows": (
        "llama3-tiny",
        "--windows",
        "8,all",
        "--budget",
        "0.5",
        "--length",
        "64",
        "-o",
        "{tmp}/x",
        "--data",
    ),
}


@pytest.mark.parametrize(
    "data", [b"caf\xe9 " * 400, "\ufeffhello".encode("utf-16-le") * 400], ids=["latin-1", "UTF-16"]
)
@pytest.mark.parametrize("command", TEXT_OPTIONS)
def test_text_that_is_not_utf8(cli: Cli, artifact: Path, tmp_path: Path, command: str, data: bytes) -> None:
    (tmp_path / "text").write_bytes(data)
    options = [str(option).format(tmp=tmp_path, artifact=artifact) for option in TEXT_OPTIONS[command]]
    code, out, err = cli(command, *options, tmp_path / "text")
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert "not UTF-8" in err and "save it as UTF-8" in err
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_text_that_is_read_is_not_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 400)
    code, _, err = cli("evaluate", "gemma3-tiny", "--text", tmp_path / "text", "--html", tmp_path / "text")
    assert code == 2 and "it is read, or stands in what is read" in err
    assert (tmp_path / "text").read_text() == "hello " * 400


@pytest.mark.parametrize("command", ["validate", "evaluate"])
@pytest.mark.parametrize("option", ["--json", "--html"])
def test_what_is_read_is_not_written_over(cli: Cli, artifact: Path, tmp_path: Path, command: str, option: str) -> None:
    (tmp_path / "text").write_text("hello " * 400)
    (tmp_path / "link").symlink_to(artifact)
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    for output in (artifact / "model.onnx.data", tmp_path / "link/manifest.json", artifact / "new"):
        code, _, err = cli(command, artifact, "--text", tmp_path / "text", option, output)
        assert code == 2 and "stands in what is read" in err
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before


def test_a_byte_order_mark_is_no_text(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfhello\r\n")
    options = ("--max-new-tokens", 2, "--json")
    marked = json.loads(cli("run", artifact, "--prompt-file", tmp_path / "text", *options)[1])
    plain = json.loads(cli("run", artifact, "--prompt", "hello\n", *options)[1])
    assert marked["tokens"] == plain["tokens"] and marked["prompt_tokens"] == plain["prompt_tokens"]


@pytest.mark.parametrize("prompt", ["[bold]a[/bold] :smile: ", "word " * 20, "[/red]"])
def test_the_prompt_is_shown_as_it_is(cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    monkeypatch.setattr(console, "width", 40)
    code, out, err = cli("run", artifact, "--prompt", prompt, "--max-new-tokens", 1)
    assert code == 0 and out.startswith(prompt), err


@pytest.mark.parametrize("content", ["[]", "3", '{"temperature": "hot"}', '{"top_k": 1.5}', '{"top_p": null}'])
def test_generation_settings_of_other_kinds(cli: Cli, artifact: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    manifest = read_manifest(folder)
    (folder / "generation_config.json").write_text(content)
    write_manifest(folder, manifest)
    code, out, err = cli("chat", folder)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err


def test_names_are_no_markup(cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "[/red] :smile:"
    shutil.copytree(artifact, folder)
    data = json.loads((folder / "manifest.json").read_text())
    data |= {"target": "[/red]", "quantization": "[/red]", "dtype": "[/red]"}
    data["source"] |= {"revision": "[/red]"}
    data["passes"][0] |= {"name": "[/red]", "notes": ["[/red]"]}
    data["entries"]["decode"]["states"][0] |= {"dtype": "[/red]"}
    (folder / "manifest.json").write_text(json.dumps(data))
    # The name stands in a table's title, which is as wide as the table.
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("inspect", folder.relative_to(tmp_path))
    assert code == 0 and "[/red] :smile:" in out and "revision" in out, err
    write_checkpoint(folder / "model", dataclasses.replace(preset("gemma3-tiny"), name="[/red]"), {})
    code, out, err = cli("show", folder / "model")
    assert code == 0, err


def test_changed_byte(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    _damage(tmp_path / "copy", "model.onnx.data", -1)
    code, _, err = cli("run", tmp_path / "copy", "--prompt", "x")
    assert code == 2
    assert "model.onnx.data" in err and "sha256" in err


def test_checkpoint_faults(cli: Cli, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "model"
    write_checkpoint(source, preset("gemma3-tiny"), random_weights(preset("gemma3-tiny"), 0))
    tensors = load_file(next(source.glob("*.safetensors")))
    for path in source.glob("*.safetensors*"):
        path.unlink()
    name = "model.layers.1.mlp.up_proj.weight"

    save_file({key: value for key, value in tensors.items() if key != name}, source / "model.safetensors")
    code, _, err = cli("export", source, "-o", tmp_path / "x")
    assert (code, "layers.1.mlp.up_proj" in err) == (2, True), err

    save_file({**tensors, name: tensors[name][:5].contiguous()}, source / "model.safetensors")
    code, _, err = cli("export", source, "-o", tmp_path / "x")
    assert (code, "layers.1.mlp.up_proj" in err) == (2, True), err

    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    )
    code, _, err = cli("show", source)
    assert (code, "mamba" in err) == (2, True), err
    assert not (tmp_path / "x").exists()


def test_truncated_gguf(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    code, _, err = cli("export", path, "-o", tmp_path / "x")
    assert code == 2
    assert "broken.gguf" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_chat_on_the_tiny_model(cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hi", "and", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, out, err = cli("chat", artifact, "--max-new-tokens", 4, "--temperature", 0)
    assert code == 0, err
    assert out.endswith("\n")


def test_a_run_tells_caches_of_every_kind() -> None:
    caches = {"local": 0, "global": 0, "summary": 9216}
    report = {"cache_bytes": caches, "prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 1.0}
    with progress_console.capture() as captured:
        _summary({**report, "peak_rss_bytes": 1, "load_s": 0.1})
    assert "0 B local + 0 B global + 9.2 kB summary" in " ".join(captured.get().split())
