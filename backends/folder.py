"""Folders and files that appear whole, and never in place of what somebody else wrote. Needs no torch.

A folder is written under another name and renamed when it is whole: what stands under its own name is never half
made. A writer that fails or is interrupted removes its draft; one that is killed leaves a hidden `.NAME.partial-*`.

A folder is replaced only if transom wrote all that is in it. Then exactly those files are removed, one by one, so that
a file that somebody puts there meanwhile stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from transom.errors import ArtifactError
from transom.wording import listed

MANIFEST, CERTIFICATE = "manifest.json", "validation.json"

_SHOWN = 3
"""So many others in a folder are named; the others are counted."""

_NAME_BYTES = 200
"""Of a name, as much as leaves room for what a draft adds; file systems take 255."""

_DRAFT = re.compile(r"\..+\.partial-[0-9a-f]{8}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of folder that transom writes, and may replace.

    Attributes:
        title: In words, with an article.
        files: All that transom wrote into such a folder, as paths that begin there; None if the folder is of another
            kind.
    """

    title: str
    files: Callable[[Path], frozenset[str] | None]


def _files_of_artifact(folder: Path) -> frozenset[str] | None:
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not _is_manifest(data):
        return None
    # Engines are built later, and noted in the details.
    details = data.get("details")
    built = details.get("engines") if isinstance(details, dict) else None
    engines = [entry.get("file") for entry in built if isinstance(entry, dict)] if isinstance(built, list) else []
    names = (MANIFEST, CERTIFICATE, *data["files"], *(name for name in engines if isinstance(name, str)))
    return frozenset(name for name in names if is_plain(name))


def is_plain(name: str) -> bool:
    """Whether a name is that of a file right in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def _is_manifest(data: Any) -> bool:
    """Whether this is a manifest of transom, of any version: other software has files of that name too."""
    kinds = {
        "version": int,
        "target": str,
        "model": dict,
        "source": dict,
        "context": int,
        "files": dict,
    }
    if not isinstance(data, dict) or not all(isinstance(data.get(key), kind) for key, kind in kinds.items()):
        return False
    # Up to version 2, what are entries now stood in the manifest itself.
    if not isinstance(data.get("entries"), dict) and not isinstance(data.get("caches"), list):
        return False
    return all(isinstance(entry, dict) and {"sha256", "bytes"} <= entry.keys() for entry in data["files"].values())


ARTIFACT = Kind(title="an artifact of transom", files=_files_of_artifact)


def check_absent(path: Path, *, overwrite: bool = False, kind: Kind = ARTIFACT) -> None:
    """Raise `ArtifactError` if something of that name exists and must not be replaced.

    With `overwrite`, what is replaced is a folder of the kind that holds nothing else, or an empty one.
    """
    if not os.path.lexists(path):
        return
    try:
        reason = _reason_to_keep(path, kind)
    except OSError as error:
        raise ArtifactError(f"cannot read {path} ({error.strerror or error}): choose another name") from error
    if overwrite and reason:
        raise ArtifactError(f"{path} {reason}, so it is not replaced: choose another name")
    if reason:
        raise ArtifactError(f"{path} exists already, and {reason}: choose another name")
    if not overwrite:
        raise ArtifactError(f"{path} exists already: choose another name, or pass --overwrite")


def _reason_to_keep(path: Path, kind: Kind) -> str:
    """Why something must not be replaced, as the rest of a sentence about it; "" if it may be."""
    if not path.is_dir():
        return f"is not {kind.title}"
    if os.listdir(path):
        known = kind.files(path)
        if known is None:
            return f"is not {kind.title}"
        if others := list(_others(path, known)):
            return f"holds what transom did not write there ({listed(others, _SHOWN)})"
    with contextlib.suppress(FileNotFoundError):
        # Who stands in a folder that is replaced is left in one that has no name any more.
        if Path(os.path.realpath(os.getcwd())).is_relative_to(os.path.realpath(path)):
            return "is the folder that this command was called in, or holds that one"
    return ""


def _others(folder: Path, known: Collection[str], inside: str = "") -> Iterator[str]:
    """What is in a folder and not known, as paths that begin there; a folder that is not known stands for all in it."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = f"{inside}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            if any(path.startswith(f"{name}/") for path in known):
                yield from _others(folder / entry.name, known, f"{name}/")
            else:
                yield f"{name}/"
        elif entry.is_dir() or (name not in known and not _DRAFT.fullmatch(entry.name)):
            yield name


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False, kind: Kind = ARTIFACT) -> Iterator[Path]:
    """A folder that takes the name `path` only when the block ends without an error.

    Raises:
        ArtifactError: If something of that name exists and must not be replaced, see `check_absent`, or its parent
            cannot be written, or the disk is full.
    """
    check_absent(path, overwrite=overwrite, kind=kind)
    path = Path(os.path.realpath(path))
    draft = _beside(path, "partial")
    parents = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name that is too long is refused now, and not when all is written.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)
        draft.mkdir()
    except OSError as error:
        _remove_empty(parents)
        raise ArtifactError(f"cannot write to {path.parent} ({error.strerror}): choose another place") from error
    try:
        yield draft
        check_absent(path, overwrite=overwrite, kind=kind)
        if os.path.lexists(path):
            _replace(path, draft, kind)
        else:
            os.rename(draft, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        _remove_empty(parents)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that hold nothing, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _replace(path: Path, draft: Path, kind: Kind) -> None:
    retired = _beside(path, "replaced")
    os.rename(path, retired)
    try:
        # From here on nobody finds it under its name, so what is found now is all that there is.
        if reason := _reason_to_keep(retired, kind):
            raise ArtifactError(f"{path} {reason}, so it is not replaced: choose another name")
        known = kind.files(retired) or frozenset()
        os.rename(draft, path)
    except BaseException:
        if not os.path.lexists(path):
            os.rename(retired, path)
        raise
    if not _remove(retired, known):
        raise ArtifactError(f"{path} is written, but something was put into the folder that it replaces: see {retired}")


def _remove(folder: Path, known: Collection[str]) -> bool:
    """Remove what is known, and each folder that is then empty; returns whether all is gone."""
    for inside, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(inside) / name
            if path.relative_to(folder).as_posix() in known or _DRAFT.fullmatch(name):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.rmdir(inside)
    return not folder.exists()


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file; a reader sees the old one or the new one, never a part.

    Raises:
        ArtifactError: If it cannot be written.
    """
    # A link stays a link; what is no file, such as a terminal, has no draft. Names of files may hold what is no UTF-8.
    path = Path(os.path.realpath(path))
    draft = _beside(path, "partial")
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        draft.write_bytes(data)
        os.replace(draft, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # Where the folder's name is a file's, there is no draft either.
        with contextlib.suppress(OSError):
            draft.unlink()


def _beside(path: Path, purpose: str) -> Path:
    """A hidden name in the same folder that nothing has."""
    name = os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])
    return path.with_name(f".{name}.{purpose}-{uuid.uuid4().hex[:8]}")
