"""Artifacts whose folder or files are links, as caches of downloads and large disks have them, run on every target."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import transom
from tests.artifacts import Export
from transom.backends.onnxruntime.data import lies_elsewhere
from transom.errors import ArtifactError


def hub_cache(artifact: Path, root: Path) -> Path:
    """Every file is a link to one that is named by its hash."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in artifact.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def large_files_elsewhere(artifact: Path, root: Path) -> Path:
    """Data is on another disk, under another name."""
    copy = root / "copy of grüße"
    shutil.copytree(artifact, copy)
    for path in copy.iterdir():
        if path.suffix in (".data", ".safetensors", ".so"):
            moved = root / "disk" / f"moved-{path.name}"
            moved.parent.mkdir(exist_ok=True)
            path.rename(moved)
            path.symlink_to(moved)
    return copy


def cache_on_another_disk(artifact: Path, root: Path) -> Path:
    """A cache of links of which one leads on."""
    snapshot = hub_cache(artifact, root)
    largest = max((root / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    (root / "disk").mkdir()
    largest.symlink_to(largest.rename(root / "disk" / "largest"))
    return snapshot


def linked_folder(artifact: Path, root: Path) -> Path:
    (root / "link").symlink_to(artifact)
    return root / "link"


LAYOUTS: list[Callable[[Path, Path], Path]] = [
    hub_cache, large_files_elsewhere, cache_on_another_disk, linked_folder,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", ["onnxruntime", "onnx", "xla", "tvm", "tensorrt"])
def test_links_run(
    target: str,
    layout: Callable[[Path, Path], Path],
    exported: Export,
    text: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = exported(target, "none").folder
    folder = layout(artifact, tmp_path)
    expected = transom.open(artifact, threads=1).prefill(text[:40])
    monkeypatch.chdir(folder.parent)
    assert np.array_equal(transom.open(folder.name, threads=1).prefill(text[:40]), expected)
    monkeypatch.chdir(folder)
    assert np.array_equal(transom.open(".", threads=1).prefill(text[:40]), expected)


def test_what_needs_the_detour(exported: Export, tmp_path: Path) -> None:
    artifact = exported("onnxruntime", "none").folder
    for layout, detour in zip(LAYOUTS, (False, True, True, False), strict=True):
        root = tmp_path / layout.__name__
        root.mkdir()
        assert lies_elsewhere(layout(artifact, root) / "model.onnx", ["model.onnx.data"]) is detour


def test_a_link_that_leads_nowhere(exported: Export, tmp_path: Path) -> None:
    folder = large_files_elsewhere(exported("onnxruntime", "none").folder, tmp_path)
    shutil.rmtree(tmp_path / "disk")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data is missing"):
        transom.open(folder, threads=1)
