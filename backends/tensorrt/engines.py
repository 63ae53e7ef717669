"""The engines that stand beside an artifact. Needs no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transom.backends.artifact import DECODE, Manifest, hash_of, update_details
from transom.backends.folder import MANIFEST, is_plain
from transom.backends.records import checked
from transom.errors import ArtifactError

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}

_BLACKWELL = 120
"""An RTX engine for this compute capability, times ten, runs on later ones too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """An engine.

    Attributes:
        file: Its name.
        library: "tensorrt" or "tensorrt_rtx".
        version: Of the library; no other version runs the engine.
        compute: Compute capabilities, times ten, that it was built for; empty if that is not known.
        gpu: The model of GPU that it was built on and is for; "" if it is not bound to one.
        portable: Whether it runs on Ampere and newer.
        weight_streaming: Whether weights may stay in host memory.
        bytes: Its size.
        seconds: How long the build took.
        sha256: Of the file.
        entry: Which entry of the artifact it runs.
    """

    file: str
    library: str
    version: str
    compute: tuple[int, ...]
    gpu: str
    portable: bool
    weight_streaming: bool
    bytes: int
    seconds: float
    sha256: str
    entry: str = DECODE

    @property
    def title(self) -> str:
        """What built it, as people call it."""
        return f"{TITLES[self.library]} {self.version}"

    @property
    def where(self) -> str:
        """Which GPUs run it, in words."""
        if self.portable:
            return "Ampere and newer"
        if self.library == "tensorrt":
            return self.gpu or "the GPU that built it"
        return f"SM {', '.join(f'{one // 10}.{one % 10}' for one in self.compute)}"

    def fits(self, compute: int, gpu: str) -> bool:
        """Whether it is for a GPU of a compute capability, times ten, and a name."""
        if self.portable:
            return compute >= 80
        if self.library == "tensorrt":
            return self.gpu in ("", gpu)
        return any(one == compute or one == _BLACKWELL < compute for one in self.compute)

    def stands(self, folder: Path) -> bool:
        """Whether its file is there, whole."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.bytes and hash_of(path) == self.sha256


def engines(manifest: Manifest) -> list[EngineRecord]:
    """All engines of an artifact, in the order in which they were built.

    Raises:
        ArtifactError: If what the manifest says of them is malformed.
    """
    try:
        listed: tuple[EngineRecord, ...] = checked(
            manifest.details.get("engines", ()), tuple[EngineRecord, ...], "details.engines"
        )
        for engine in listed:
            if engine.library not in TITLES or not is_plain(engine.file):
                raise ValueError(f"details.engines has {engine.file!r} of the library {engine.library!r}")
    except ValueError as error:
        raise ArtifactError(f"{MANIFEST} is malformed ({error}): export the model again") from error
    return list(listed)


def note_engine(folder: Path, record: EngineRecord) -> None:
    """Put an engine into the manifest, in place of one of the same name.

    Raises:
        ArtifactError: If the manifest cannot be read or written.
    """

    def change(details: dict[str, object]) -> None:
        listed = details.get("engines")
        others = [entry for entry in listed if entry["file"] != record.file] if isinstance(listed, list) else []
        details["engines"] = [*others, dataclasses.asdict(record)]

    update_details(folder, change)
