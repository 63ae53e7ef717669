"""The folder: whole or absent, and every damage is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import transom
from tests.artifacts import CHUNK, Export
from transom import compiler
from transom.backends.artifact import Manifest, read_manifest, write_manifest
from transom.backends.folder import MANIFEST
from transom.backends.tensorrt.engines import engines
from transom.errors import ArtifactError, ContextLengthError, QuantizationError, SessionError, TargetError
from transom.zoo.model import Model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_survives_a_round_trip(exported: Export, tiny: Model) -> None:
    folder = exported("onnxruntime", "int8").folder
    manifest = read_manifest(folder)
    assert sorted(manifest.files) == [name for name in names(folder) if name != MANIFEST]
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "generation_config.json"} <= set(manifest.files)
    assert (manifest.target, manifest.quantization, manifest.context, manifest.chunk) == (
        "onnxruntime", "int8", 512, CHUNK
    )  # fmt: skip
    assert manifest.source == {"name": "random", "revision": "seed 0"}
    assert [state.slots for state in manifest.decode.states[:6]] == [16 + CHUNK - 1] * 4 + [None] * 2
    assert [state.window for state in manifest.decode.states[:6]] == [16] * 4 + [None] * 2
    assert manifest.model["name"] == tiny.config.name and manifest.not_done == []
    again = Manifest(**{**manifest.__dict__})
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    try:
        assert write_manifest(copy, again) == read_manifest(copy) == manifest
        assert (copy / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    finally:
        shutil.rmtree(copy)


def change_byte(folder: Path) -> None:
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[12345] ^= 1
    (folder / "model.onnx.data").write_bytes(data)


def truncate(folder: Path) -> None:
    data = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(data[:-1])


def remove(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def edit(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(change(data)))

    return apply


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:100])


def empty(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def binary(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")


def list_file(data: Any, name: str, size: object = 1) -> Any:
    return data | {"files": data["files"] | {name: {"sha256": "0", "bytes": size}}}


def with_entry(data: Any, **fields: object) -> Any:
    return data | {"entries": {"decode": data["entries"]["decode"] | fields}}


def with_state(data: Any, **fields: object) -> Any:
    first, *others = data["entries"]["decode"]["states"]
    return with_entry(data, states=[first | fields, *others])


def nest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 100_000)


def crlf(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def pointer(folder: Path) -> None:
    (folder / "model.onnx.data").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a changed byte": (change_byte, "is not what was exported"),
    "a truncated file": (truncate, "bytes, not"),
    "a missing file": (remove, "tokenizer.json is missing"),
    "a newer version": (
        edit(lambda data: data | {"version": 4}),
        "version 4, this transom reads 3: export",
    ),
    "an older version": (
        edit(lambda data: data | {"version": 2}),
        "version 2, this transom reads 3: export",
    ),
    "no version": (edit(lambda data: {key: data[key] for key in data if key != "version"}), "is of version None"),
    "half a manifest": (cut_manifest, "not readable as JSON"),
    "no manifest": (empty, "holds no manifest.json"),
    "a binary manifest": (binary, "not UTF-8 .byte 0xff at 0"),
    "a list": (edit(lambda data: [data]), "must hold a JSON object, got list"),
    "a number": (edit(lambda data: 3), "must hold a JSON object, got int"),
    "an unknown field": (edit(lambda data: data | {"more": 1}), "malformed"),
    "a missing field": (edit(lambda data: {key: data[key] for key in data if key != "entries"}), "malformed"),
    "a state without a name": (edit(lambda data: with_entry(data, states=[{}])), "malformed"),
    "no entry that decodes": (edit(lambda data: data | {"entries": {}}), "there is no entry 'decode'"),
    "a state without a width": (
        edit(lambda data: with_state(data, sizes=[None, 2, 52, None])),
        "width of cache.0.key has",
    ),
    "a size too many": (
        edit(lambda data: with_state(data, sizes=[None, 2, 52, 32, 1])),
        "has 5 sizes for the axes batch,",
    ),
    "two states of one name": (edit(lambda data: with_state(data, name="cache.1.key")), "have one name"),
    "a port of another name": (
        edit(lambda data: with_entry(data, inputs={})),
        "its ports and states are not the model's",
    ),
    "files without hashes": (edit(lambda data: data | {"files": {"model.onnx": {}}}), "malformed"),
    "files that are a list": (edit(lambda data: data | {"files": ["model.onnx"]}), "malformed"),
    "no files": (edit(lambda data: data | {"files": None}), "malformed"),
    "a file of another folder": (edit(lambda data: list_file(data, "../copy/tokenizer.json")), "is not in the folder"),
    "a file by its whole path": (edit(lambda data: list_file(data, "/etc/hostname")), "is not in the folder"),
    "the folder as a file": (edit(lambda data: list_file(data, "..")), "is not in the folder"),
    "a payload that is not listed": (
        edit(lambda data: with_entry(data, payload="other")),
        "'other' is not among its files",
    ),
    "a context that is text": (edit(lambda data: data | {"context": "512"}), "context is '512', not a whole number"),
    "a context that is true": (edit(lambda data: data | {"context": True}), "context is True, not a whole number"),
    "a context of nothing": (edit(lambda data: data | {"context": 0}), "context is 0, not 1 or more"),
    "a negative window": (edit(lambda data: with_state(data, window=-1)), "window of cache.0.key is -1, not 1 or more"),
    "a width that is text": (
        edit(lambda data: with_state(data, sizes=[None, 2, 52, "32"])),
        r"entries.decode.states\[0\].sizes\[3\] is '32', not a",
    ),
    "a stop token that is text": (edit(lambda data: data | {"stop_ids": ["1"]}), r"stop_ids\[0\] is '1', not a whole"),
    "a source without a name": (edit(lambda data: data | {"source": {"revision": "1"}}), "source has no 'name'"),
    "a pass that is a list": (edit(lambda data: data | {"passes": [[]]}), r"passes\[0\] is \[\], not an object"),
    "a size that is text": (
        edit(lambda data: list_file(data, "tokenizer.json", "1")),
        "bytes is '1', not a whole",
    ),
    "taps that are an object": (edit(lambda data: with_entry(data, taps={})), "taps is {}, not a list"),
    "a version that is text": (edit(lambda data: data | {"version": "2"}), "version '2', this transom reads 3"),
    "nested too deep": (nest, "not readable as JSON"),
    "caches of another model": (
        edit(lambda data: with_state(data, sizes=[None, 2, 52, 64])),
        r"is \[None, 2, 52, 64\], the model's \['batch', 2, 52, 32",
    ),
    "a cache of another type": (edit(lambda data: with_state(data, dtype="float16")), "is float16, the model's tensor"),
    "a cache of another name": (
        edit(lambda data: with_state(data, name="x")),
        "its ports and states are not the model's inputs",
    ),
    "a vocabulary of another model": (edit(lambda data: data | {"vocab_size": 300}), "of 300, the logits have 512"),
    "calls longer than the slots": (edit(lambda data: data | {"chunk": 500}), "fewer slots than a call has tokens"),
    "taps that the model lacks": (
        edit(lambda data: with_entry(data, taps=[{"name": "x", "layer": None, "op": "y"}])),
        "its ports, states and taps are not the model's outputs",
    ),
    "line ends that git changed": (crlf, "git changed its line ends"),
    "a pointer of git lfs": (pointer, "git lfs pull"),
}


ENGINE: dict[str, Any] = {
    "file": "tensorrt.engine",
    "library": "tensorrt",
    "version": "11",
    "compute": [89],
    "gpu": "",
    "portable": False,
    "weight_streaming": False,
    "bytes": 1,
    "seconds": 1.0,
    "sha256": "0",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_an_artifact_error(name: str, exported: Export, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    folder = tmp_path / "copy"
    shutil.copytree(exported("onnxruntime", "int8").folder, folder)
    transom.open(folder, threads=1)
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        transom.open(folder, threads=1)


def test_a_changed_byte_goes_unnoticed_only_on_request(exported: Export, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported("onnxruntime", "int8").folder, folder)
    change_byte(folder)
    transom.open(folder, threads=1, verify=False)
    truncate(folder)
    with pytest.raises(ArtifactError, match="bytes, not"):
        transom.open(folder, threads=1, verify=False)


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        transom.open(tmp_path / "nothing")


def test_a_payload_that_the_runtime_refuses(exported: Export, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported("onnxruntime", "int8").folder, folder)
    (folder / "model.onnx").write_bytes(b"no protobuf")
    write_manifest(folder, read_manifest_unchecked(folder))
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load"):
        transom.open(folder, threads=1)


def read_manifest_unchecked(folder: Path) -> Manifest:
    data = json.loads((folder / MANIFEST).read_text())
    data.pop("version")
    return Manifest(**data)


@pytest.mark.parametrize("target", ["xla", "tvm"])
def test_details_that_a_session_misses(target: str, exported: Export, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported("onnxruntime", "int8").folder, folder)
    edit(lambda data: data | {"target": target})(folder)
    with pytest.raises(ArtifactError, match=f"lacks what the target '{target}' needs"):
        transom.open(folder)


def test_a_runtime_that_fails_is_one_line(exported: Export, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported("tvm", "none").folder, folder)
    edit(lambda data: data["details"]["parameters"].pop() and data)(folder)
    session = transom.open(folder, threads=1)
    with pytest.raises(SessionError, match=r"^TVM failed at position 0 \(.*\): export the model again") as refusal:
        session.prefill([5, 6, 7])
    assert len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)


ENGINES: dict[str, Any] = {
    "an object": {},
    "no fields": [{}],
    "text": ["x"],
    "another place": [{**ENGINE, "file": "../x.engine"}],
    "another library": [{**ENGINE, "library": "abacus"}],
    "a size that is text": [{**ENGINE, "bytes": "1"}],
}


@pytest.mark.parametrize("case", ENGINES)
def test_engines_that_are_malformed(case: str, exported: Export, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported("onnxruntime", "int8").folder, folder)
    edit(lambda data: data | {"details": {"engines": [ENGINE]}})(folder)
    assert [engine.file for engine in engines(read_manifest(folder))] == [ENGINE["file"]]
    edit(lambda data: data | {"details": {"engines": ENGINES[case]}})(folder)
    with pytest.raises(ArtifactError, match=r"is malformed \(details\.engines"):
        engines(read_manifest(folder))


def test_a_target_that_nothing_runs(exported: Export, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported("onnxruntime", "int8").folder, folder)
    edit(lambda data: data | {"target": "abacus"})(folder)
    with pytest.raises(TargetError, match="'abacus', which this transom cannot run"):
        transom.open(folder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "abacus"}, TargetError, "no target named 'abacus'"),
        ({"target": "onnx", "dtype": "bfloat16"}, TargetError, "computes in float32, not in 'bfloat16'"),
        ({"target": "tvm", "quant": "fp8_activations"}, TargetError, "rounds no activations"),
        ({"target": "onnx", "topology": "v5e:1x1"}, TargetError, "takes no topology: only xla does"),
        ({"target": "xla", "cpu": "aarch64"}, TargetError, "takes no cpu: only tvm does"),
        ({"quant": "int3"}, QuantizationError, "'int3'"),
        ({"context": 513}, ContextLengthError, "513"),
        ({"context": 0}, ContextLengthError, "0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tiny: Model, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        transom.compile(tiny, out=tmp_path / "model", **options)
    assert names(tmp_path) == []


def test_a_failing_export_leaves_nothing(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "write_companions", fail)
    with pytest.raises(KeyboardInterrupt):
        transom.compile(tiny, out=tmp_path / "model")
    assert names(tmp_path) == []


def test_progress_counts_passes_and_bytes(tiny: Model, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    transom.compile(tiny, out=tmp_path / "model", context=64, on_progress=lambda *step: steps.append(step))
    assert {stage for stage, _, _ in steps} == {"trace", "passes", "weights"}
    for stage in ("trace", "passes", "weights"):
        done = [(count, total) for name, count, total in steps if name == stage]
        assert done == sorted(done) and done[-1][0] == done[-1][1]
    manifest = read_manifest(tmp_path / "model")
    assert (manifest.context, manifest.chunk) == (64, 64)
