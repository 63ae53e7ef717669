"""Where the tensors of a safetensors file stand, and their bytes. Needs no torch.

The format is a length, a JSON header and the bytes. The `safetensors` package checks all its rules, but it maps whole
files and does not tell where a tensor begins. So ranges are read straight into memory of the caller: nothing stays
mapped between two reads, and peak memory is what was asked for.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor stands: absolute bytes [start, stop) of a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_bytes(path: Path) -> bytes:
    """The header as it stands in the file.

    Raises:
        ValueError: If the file is cut within it, or is no safetensors file; the message says which, and not where.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("not a safetensors file, or cut within its header")
        return file.read(length)


def read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where every tensor stands, and the file's metadata.

    Raises:
        ValueError: If the file is truncated or corrupt; the message says what is wrong, and not where.
    """
    raw = header_bytes(path)
    base, size = 8 + len(raw), path.stat().st_size
    try:
        header = json.loads(raw.decode())
    # Brackets alone exhaust the parser.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header: not readable as JSON ({error})") from error
    try:
        entries = {
            name: Entry(
                path=path,
                dtype=item["dtype"],
                shape=tuple(item["shape"]),
                start=base + item["data_offsets"][0],
                stop=base + item["data_offsets"][1],
            )
            for name, item in header.items()
            if name != "__metadata__"
        }
        metadata = dict(header.get("__metadata__") or {})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the header is corrupt ({error!r})") from error
    expected = max((entry.stop for entry in entries.values()), default=base)
    if size != expected:
        raise ValueError(f"{size} bytes, but its header describes {expected}")
    # No gaps, no overlaps, sizes that fit shapes.
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"the header is corrupt ({error})") from error
    return entries, metadata


def read_into(buffer: NDArray[np.uint8], entry: Entry, start: int = 0) -> None:
    """Fill memory with a tensor's bytes from `start` on.

    Raises:
        ValueError: If the file has become shorter.
    """
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start + start)
        done = 0
        while done < buffer.size:
            count = file.readinto(buffer[done:].data)
            if not count:
                raise ValueError("ended while it was read: it changed since it was opened")
            done += count
