from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.zoo.gguf_bytes import File, tiny
from transom.errors import CheckpointError
from transom.zoo.checkpoints.gguf import open_gguf, revision
from transom.zoo.checkpoints.gguf_header import read_header
from transom.zoo.model import load, resolve_config
from transom.zoo.tokenizer import Tokenizer

COUNT = 3


def split(folder: Path, change: Callable[[int, File], object] = lambda index, file: None) -> list[Path]:
    """The tiny model in three files, the first without tensors, as llama.cpp's own tool can make it."""
    whole = tiny()
    shares: list[slice] = [slice(0, 0), slice(0, 11), slice(11, None)]
    paths = []
    for index, share in enumerate(shares):
        part = File(list(whole.metadata) if index == 0 else [], whole.tensors[share])
        part.set("split.no", ("u16", index)).set("split.count", ("u16", COUNT))
        part.set("split.tensors.count", ("i32", len(whole.tensors)))
        change(index, part)
        path = folder / f"tiny-model-{index + 1:05}-of-{COUNT:05}.gguf"
        path.write_bytes(part.encode())
        paths.append(path)
    return paths


@pytest.mark.parametrize("given", range(COUNT))
def test_any_file_stands_for_the_set(tmp_path: Path, given: int) -> None:
    paths = split(tmp_path)
    (single := tmp_path / "tiny-model.gguf").write_bytes(tiny().encode())
    expected, whole = open_gguf(single)
    config, opened = open_gguf(paths[given])
    assert config == expected and config.name == "tiny-model"
    assert resolve_config(paths[given]) == expected
    for name, weight in whole.weights.items():
        assert torch.equal(opened.weights[name].read(), weight.read()), name
    assert Tokenizer.from_gguf(paths[given]).encode("hello") == Tokenizer.from_gguf(single).encode("hello")
    model = load(paths[given])
    assert model.source == str(paths[given]) and model.tokenizer is not None
    assert model.revision == revision(paths[0])
    assert read_header(paths[given]).size == sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize("limit", [2**30, 0])
def test_the_revision_covers_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("transom.zoo.checkpoints.gguf._HASHED_WHOLE", limit)
    paths = split(tmp_path)
    before = revision(paths[1])
    assert before.startswith("sha256:" if limit else "head-sha256:")

    def other_name(index: int, part: File) -> None:
        if index == 2:
            part.set("general.alignment", ("u32", 32))

    split(tmp_path, other_name)
    assert revision(paths[1]) != before


@pytest.mark.parametrize("gone", [0, 2])
def test_a_missing_file_is_named(tmp_path: Path, gone: int) -> None:
    paths = split(tmp_path)
    paths[gone].unlink()
    with pytest.raises(CheckpointError, match=rf"1 of the 3 files .* are missing: fetch {paths[gone].name}$"):
        load(paths[1])


def _set(index: int, key: str, value: tuple[str, object] | None) -> Callable[[int, File], object]:
    return lambda at, part: part.set(key, value) if at == index else None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set(1, "split.no", ("u16", 2)), "split.no is 2, its name says 1"),
        (_set(1, "split.no", None), "split.no is None, expected a count"),
        (_set(2, "split.count", ("u16", 4)), "split.count differs from that of tiny-model-00001-of-00003.gguf"),
        (_set(2, "split.tensors.count", ("i32", 4)), "split.tensors.count differs"),
        (_set(1, "gemma3.attention.sliding_window", ("u32", 4)), "gemma3.attention.sliding_window differs"),
        (_set(1, "gemma3.final_logit_softcapping", ("f32", 3.0)), "gemma3.final_logit_softcapping differs"),
        (_set(0, "split.tensors.count", None), "split.tensors.count differs"),
        (lambda at, part: part.set("split.tensors.count", ("i32", 99)), "is 99, but its 3 files hold 28 tensors"),
        (lambda at, part: part.set("split.tensors.count", None), "split.tensors.count is None"),
        (lambda at, part: part.add("output_norm.weight", np.zeros(32)) if at == 2 else None, "holds too"),
    ],
)
def test_files_that_contradict_each_other(tmp_path: Path, change: Callable[[int, File], object], words: str) -> None:
    paths = split(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        load(paths[0])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_a_set_must_keep_its_name(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for name in ("tiny.gguf", "tiny-model-00002-of-00003.gguf", "tiny-model-00001-of-00004.gguf"):
        other = tmp_path / "elsewhere" / name
        other.parent.mkdir(exist_ok=True)
        shutil.copy(paths[0], other)
        with pytest.raises(CheckpointError, match=r"file 1 of 3 .* must end in -00001-of-00003\.gguf"):
            read_header(other)


def test_the_same_metadata_in_every_file(tmp_path: Path) -> None:
    def repeat(index: int, part: File) -> None:
        if index:
            part.metadata += tiny().metadata

    paths = split(tmp_path, repeat)
    assert open_gguf(paths[2])[0].name == "tiny-model"


def test_a_set_of_one(tmp_path: Path) -> None:
    file = tiny().set("split.no", ("u16", 0)).set("split.count", ("u16", 1)).set("split.tensors.count", ("i32", 28))
    (path := tmp_path / "tiny-00001-of-00001.gguf").write_bytes(file.encode())
    config, _ = open_gguf(path)
    (single := tmp_path / "tiny.gguf").write_bytes(tiny().encode())
    assert config == dataclasses.replace(open_gguf(single)[0], name="tiny")
    path.write_bytes(file.set("split.count", ("u16", 0)).set("split.no", ("u16", 1)).encode())
    with pytest.raises(CheckpointError, match=r"split\.no says that it is part of a set"):
        open_gguf(path)
