"""Writes weights as one safetensors file, block by block: peak memory is a few row blocks, however large the model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from transom.graphs.weight import Weight, read_blocks

ALIGNMENT = 64
"""Offset of tensors in the file, in bytes, so that a runtime can use a mapped file as it stands."""

NAMES: dict[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def stored_names(weights: Mapping[str, Weight]) -> dict[str, str]:
    """Name in the file by the graph's name: weights that share a recipe stand there once."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(weight), name) for name, weight in weights.items()}


def write(
    weights: Mapping[str, Weight],
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write every weight once.

    The format has no gaps, so tensors whose size is no multiple of `ALIGNMENT` come last, where they cannot push
    others off it; a reader must copy those that stand behind one.

    Args:
        weights: By name.
        path: File to write.
        metadata: Words to keep with them.
        on_bytes: Called with the number of bytes written each time.
    """
    stored = {name: weights[name] for name in dict.fromkeys(stored_names(weights).values())}
    stored = dict(sorted(stored.items(), key=lambda item: item[1].bytes % ALIGNMENT != 0))
    with open(path, "wb") as file:
        offsets = list(itertools.accumulate((weight.bytes for weight in stored.values()), initial=0))[:-1]
        header = _header(stored, offsets, metadata)
        file.write(header)
        places = {name: len(header) + offset for name, offset in zip(stored, offsets, strict=True)}
        for name, _, block in read_blocks(stored):
            raw = block.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.seek(places[name])
            file.write(raw.data)
            places[name] += raw.nbytes
            on_bytes(raw.nbytes)


def _header(stored: Mapping[str, Weight], offsets: Sequence[int], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for (name, weight), offset in zip(stored.items(), offsets, strict=True):
        entries[name] = {
            "dtype": NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + weight.bytes],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
