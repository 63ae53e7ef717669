"""A folder is whole or absent, and nobody's files are lost when it is replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from transom.backends.folder import ARTIFACT, CERTIFICATE, MANIFEST, check_absent, new_folder, replace_file
from transom.errors import ArtifactError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def artifact(folder: Path, *files: str, version: int = 3, engines: tuple[str, ...] = ()) -> Path:
    """A folder with a manifest that lists some files, which it holds."""
    folder.mkdir(parents=True)
    for name in (*files, *engines):
        (folder / name).write_text("old")
    manifest = {
        "version": version,
        "target": "onnxruntime",
        "model": {"name": "tiny"},
        "source": {"name": "random", "revision": "seed 0"},
        "context": 128,
        **({"entries": {}} if version > 2 else {"caches": []}),
        "files": {name: {"sha256": "0", "bytes": 3} for name in files},
        "details": {"engines": [{"file": name} for name in engines]},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def replace(folder: Path) -> None:
    with new_folder(folder, overwrite=True) as draft:
        (draft / "new").write_text("new")


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with new_folder(target) as draft:
        (draft / "file").write_text("a")
        assert not target.exists() and draft.parent == target.parent
    assert (target / "file").read_text() == "a" and names(target.parent) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, error: type[BaseException], exists: bool) -> None:
    target = tmp_path / "model"
    if exists:
        artifact(target, "file")
    with pytest.raises(error), new_folder(target, overwrite=True) as draft:
        (draft / "file").write_text("new")
        raise error
    assert names(tmp_path) == (["model"] if exists else [])
    assert not exists or (target / "file").read_text() == "old"


def test_folders_above_one_that_fails_are_removed_too(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError), new_folder(tmp_path / "there" / "a" / "b" / "model"):
        raise ValueError
    with pytest.raises(ArtifactError), new_folder(tmp_path / "there" / "a" / ("n" * 300)):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    target = artifact(tmp_path / "model", "file")
    with pytest.raises(ArtifactError, match="exists already: choose another name, or pass --overwrite"):
        check_absent(target)
    with pytest.raises(ArtifactError, match="exists already"), new_folder(target):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["model"] and (target / "file").read_text() == "old"


def test_overwrite_is_not_advised_where_it_would_not_help(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("old")
    with pytest.raises(ArtifactError, match="exists already, and is not an artifact of transom: choose another name"):
        check_absent(tmp_path)


@pytest.mark.parametrize("version", [1, 2, 9])
def test_an_artifact_of_any_version_is_replaced(tmp_path: Path, version: int) -> None:
    target = artifact(tmp_path / "model", "model.onnx", version=version, engines=("tensorrt.engine",))
    (target / CERTIFICATE).write_text("{}")
    (target / f".{CERTIFICATE}.partial-0123abcd").write_text("{")
    replace(target)
    assert names(tmp_path) == ["model"] and names(target) == ["new"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        check_absent(tmp_path / "model")
    replace(tmp_path / "model")
    assert names(tmp_path / "model") == ["new"]


FOREIGN: dict[str, str] = {
    "a browser extension": '{"manifest_version": 3, "name": "x", "version": "2"}',
    "an empty object": "{}",
    "a list": "[1]",
    "a number": "3",
    "no JSON": "precious",
    "files that are no hashes": json.dumps(
        {"version": 2, "target": "", "model": {}, "source": {}, "context": 1, "caches": [], "files": {"thesis.txt": ""}}
    ),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_with_the_manifest_of_other_software_stays(tmp_path: Path, case: str) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / MANIFEST).write_text(FOREIGN[case])
    (target / "thesis.txt").write_text("old")
    with pytest.raises(ArtifactError, match="is not an artifact of transom, so it is not replaced"):
        replace(target)
    assert names(tmp_path) == ["model"] and names(target) == [MANIFEST, "thesis.txt"]


def in_place_of(file: Path) -> None:
    file.unlink()
    file.mkdir()


STRANGERS: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda folder: (folder / "notes.txt").write_text("old"),
    ".hidden": lambda folder: (folder / ".hidden").write_text("old"),
    "empty/": lambda folder: (folder / "empty").mkdir(),
    "deep/": lambda folder: artifact(folder / "deep", "model.onnx"),
    "link": lambda folder: (folder / "link").symlink_to("nowhere"),
    "to_folder": lambda folder: (folder / "to_folder").symlink_to(folder.parent),
    "model.onnx/": lambda folder: in_place_of(folder / "model.onnx"),
    "tensorrt.engine": lambda folder: (folder / "tensorrt.engine").write_text("old"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_not_in_the_manifest_is_named_and_stays(tmp_path: Path, name: str) -> None:
    target = artifact(tmp_path / "model", "model.onnx")
    STRANGERS[name](target)
    before = names(target)
    with pytest.raises(ArtifactError, match=rf"holds what transom did not write there \({name}\)"):
        replace(target)
    assert names(target) == before


def test_many_strangers_are_counted(tmp_path: Path) -> None:
    target = artifact(tmp_path / "model", "model.onnx")
    for index in range(9):
        (target / f"{index}.txt").write_text("old")
    with pytest.raises(ArtifactError, match=r"\(0.txt, 1.txt, 2.txt and 6 more\)"):
        check_absent(target, overwrite=True)


def test_what_comes_while_the_folder_is_written_stays(tmp_path: Path) -> None:
    target = artifact(tmp_path / "model", "model.onnx")
    with pytest.raises(ArtifactError, match=r"notes\.txt"), new_folder(target, overwrite=True):
        (target / "notes.txt").write_text("mine")
    assert names(tmp_path) == ["model"] and names(target) == [MANIFEST, "model.onnx", "notes.txt"]


def test_what_comes_at_the_very_end_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = artifact(tmp_path / "model", "model.onnx"), os.rename

    def slow(source: Path, to: Path) -> None:
        if ".replaced-" in to.name:
            (source / "notes.txt").write_text("mine")
        rename(source, to)

    monkeypatch.setattr(os, "rename", slow)
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        replace(target)
    assert names(tmp_path) == ["model"] and names(target) == [MANIFEST, "model.onnx", "notes.txt"]


def test_a_folder_of_somebody_else_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ArtifactError, match="is not an artifact"), new_folder(target, overwrite=True):
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    assert names(tmp_path) == ["model"] and names(target) == ["thesis.txt"]


def test_a_link_to_an_artifact_stays_a_link(tmp_path: Path) -> None:
    target, link = artifact(tmp_path / "model", "model.onnx"), tmp_path / "link"
    link.symlink_to(target)
    (target / "notes.txt").write_text("old")
    with pytest.raises(ArtifactError, match=r"link holds what transom did not write there \(notes\.txt\)"):
        replace(link)
    (target / "notes.txt").unlink()
    replace(link)
    assert link.is_symlink() and names(tmp_path) == ["link", "model"] and names(target) == ["new"]


def test_files_that_are_links_are_removed_and_not_what_they_lead_to(tmp_path: Path) -> None:
    target, blob = artifact(tmp_path / "model", "model.onnx"), tmp_path / "blob"
    (target / "model.onnx").rename(blob)
    (target / "model.onnx").symlink_to(blob)
    replace(target)
    assert names(target) == ["new"] and blob.read_text() == "old"


@pytest.mark.parametrize("out", [".", "../model", ".."])
def test_the_folder_that_one_stands_in_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    target = artifact(tmp_path / "model", "model.onnx")
    monkeypatch.chdir(target)
    with pytest.raises(ArtifactError, match=r"is the folder that this command was called in|is not an artifact"):
        replace(Path(out))
    assert names(target) == [MANIFEST, "model.onnx"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out in ("nowhere", "loop"):
        with pytest.raises(ArtifactError, match="is not an artifact"):
            replace(tmp_path / out)
    with pytest.raises(ArtifactError, match="cannot write"):
        replace(tmp_path / "loop" / "model")
    with pytest.raises(ArtifactError, match="cannot write"):
        replace_file(tmp_path / "loop" / "file", "text")
    assert names(tmp_path) == ["loop", "nowhere"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"), new_folder(tmp_path / "file" / "model"):
        pytest.fail("the block ran")


@pytest.mark.parametrize("name", ["n" * 250, "模" * 83])
def test_a_name_as_long_as_file_systems_take(tmp_path: Path, name: str) -> None:
    with new_folder(tmp_path / name):
        pass
    replace_file(tmp_path / name / name, "text")
    assert names(tmp_path) == [name] and (tmp_path / name / name).read_text() == "text"


def test_a_file_with_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    replace_file(tmp_path / "report", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "report").read_text() == "caf\\udce9"


def test_an_artifact_lists_only_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("old")
    target = artifact(tmp_path / "model", "model.onnx", "../thesis.txt")
    assert ARTIFACT.files(target) == frozenset((MANIFEST, CERTIFICATE, "model.onnx"))
    replace(target)
    assert (tmp_path / "thesis.txt").read_text() == "old"
