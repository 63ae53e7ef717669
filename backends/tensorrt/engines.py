"""The engines that stand beside an artifact. Needs no torch."""

from __future__ import annotations

import dataclasses

from transom.backends.artifact import Manifest

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """An engine.

    Attributes:
        file: Its name.
        library: "tensorrt" or "tensorrt_rtx".
        version: Of the library; no other version runs the engine.
        compute: Compute capabilities, times ten; empty if it is for the GPU that built it.
        portable: Whether it runs on Ampere and newer.
        weight_streaming: Whether weights may stay in host memory.
        bytes: Its size.
        seconds: How long the build took.
    """

    file: str
    library: str
    version: str
    compute: tuple[int, ...]
    portable: bool
    weight_streaming: bool
    bytes: int
    seconds: float

    @property
    def title(self) -> str:
        """What built it, as people call it."""
        return f"{TITLES[self.library]} {self.version}"

    @property
    def where(self) -> str:
        """Which GPUs run it, in words."""
        if self.portable:
            return "Ampere and newer"
        if not self.compute:
            return "the GPU that built it"
        return f"SM {', '.join(f'{one // 10}.{one % 10}' for one in self.compute)}"


def engines(manifest: Manifest) -> list[EngineRecord]:
    """All engines of an artifact, in the order in which they were built."""
    return [
        EngineRecord(**{**entry, "compute": tuple(entry["compute"])}) for entry in manifest.details.get("engines", ())
    ]
