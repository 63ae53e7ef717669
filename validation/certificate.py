"""The certificate: `validation.json` beside an artifact's manifest, and whether it still speaks of that artifact.

Needs no torch. The manifest names a hash of every other file, and the certificate names the manifest's: so it holds
for exactly the bytes that were validated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transom.backends.folder import CERTIFICATE, MANIFEST, replace_file
from transom.errors import ArtifactError

VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a folder's certificate says.

    Attributes:
        state: "none"; "valid"; "stale": it was given to another manifest; "damaged": it cannot be read.
        passed: The verdict; None unless it could be read.
        date: When it was given; None unless it could be read.
    """

    state: Literal["none", "valid", "stale", "damaged"]
    passed: bool | None = None
    date: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """A line for people."""
        if self.state == "none":
            return "not validated"
        if self.state == "damaged":
            return f"{CERTIFICATE} cannot be read: run transom validate again"
        verdict = "passed" if self.passed else "failed"
        if self.state == "stale":
            return f"{verdict} on {self.date}, but the manifest has changed since: run transom validate again"
        return f"{verdict} on {self.date}"


def check_writable(folder: Path) -> None:
    """Raise `ArtifactError` if no file can be created in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot write to {folder} ({error.strerror or error}): make it writable first") from error


def write_certificate(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a certificate for an artifact as it is now; a reader sees the old one or the new one, never a part.

    The content is plain data, with "passed" and "date".

    Raises:
        ArtifactError: If the folder cannot be written.
    """
    try:
        data = {"version": VERSION, "manifest_sha256": _manifest_hash(folder), **content}
    except OSError as error:
        raise ArtifactError(f"cannot read {folder / MANIFEST}: {error.strerror or error}") from error
    replace_file(folder / CERTIFICATE, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_certificate(folder: Path) -> Certificate:
    """What an artifact's certificate says, and whether it is this artifact's."""
    path = folder / CERTIFICATE
    if not path.exists():
        return Certificate(state="none")
    try:
        data = json.loads(path.read_text())
        passed, date, version = bool(data["passed"]), str(data["date"]), data["version"]
        same = data["manifest_sha256"] == _manifest_hash(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Certificate(state="damaged")
    if version != VERSION:
        return Certificate(state="damaged")
    return Certificate(state="valid" if same else "stale", passed=passed, date=date)


def _manifest_hash(folder: Path) -> str:
    """Hash all but the engines, which are built from the artifact and change nothing of it."""
    data = json.loads((folder / MANIFEST).read_text())
    data["details"].pop("engines", None)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
