"""The exact codes beside a checkpoint that was quantised or trained for quantisation: `codes.safetensors`.

The folder's `model.safetensors` holds what the codes mean, so that anything can read it; a compiler must not round
those numbers again, as scales found anew are other scales. For every quantised weight NAME the file has NAME.codes,
NAME.scales and, if it has them, NAME.zero_points or NAME.offsets, as `formats.quantized` lays them out; its metadata
name the scheme and the spec of every weight.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from transom.errors import CheckpointError, QuantizationError
from transom.formats.quantized import unpack
from transom.formats.schemes import QuantSpec, scheme
from transom.graphs.encoded import Codes, Encoded
from transom.graphs.weight import Weight
from transom.safetensors_file import Entry
from transom.zoo.checkpoints.safetensors import read_bytes, read_entries

CODES_FILE = "codes.safetensors"
_FORMER = "lattice.safetensors"
"""What the file was called before."""

_ROWS_CHECKED = 8


def attach(folder: Path, weights: Mapping[str, Weight]) -> tuple[dict[str, Weight], str]:
    """Give a folder's weights the codes that stand beside them.

    Args:
        folder: A checkpoint.
        weights: Its weights by name.

    Returns:
        The weights, and the name of the scheme that the codes are of; "none" if the folder has no codes.

    Raises:
        CheckpointError: If the codes are damaged, or are not those of the weights, or the first rows are not finite.
    """
    path, coded = (
        next((folder / name for name in (CODES_FILE, _FORMER) if (folder / name).is_file()), None),
        dict(weights),
    )
    if path is None:
        return coded, "none"
    entries, metadata = read_entries(path)
    try:
        quant, specs = metadata["scheme"], json.loads(metadata["specs"])
        scheme(quant)
        for name, key in specs.items():
            shape = coded[name].shape
            encoded = _encoded(name, entries, QuantSpec.of_key(key), shape).refuse_nonfinite(f"{path}: {name}")
            _check(path, name, encoded, coded[name])
            coded[name] = dataclasses.replace(coded[name], encoded=encoded)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, QuantizationError) as error:
        raise CheckpointError(f"{path}: not the codes of this checkpoint ({error}): quantise it again") from error
    return coded, quant


def _encoded(name: str, entries: Mapping[str, Entry], spec: QuantSpec, shape: tuple[int, ...]) -> Encoded:
    rows, columns = shape
    block = spec.stored_block(columns)
    blocks = columns // block
    parts = {
        "codes": ((rows, blocks, block * spec.bits // 8), "F8_E4M3" if spec.format == "float8_e4m3fn" else "U8"),
        "scales": ((rows, blocks), "F32"),
    }
    if not spec.symmetric:
        parts["zero_points"] = ((rows, -(-blocks * spec.bits // 8)), "U8")
    if spec.has_offsets:
        parts["offsets"] = ((rows, blocks), "F32")
    for part, (wanted, dtype) in parts.items():
        entry = entries[f"{name}.{part}"]
        if entry.shape != wanted or entry.dtype != dtype:
            raise ValueError(f"{name}.{part} is {entry.dtype} {list(entry.shape)}, expected {dtype} {list(wanted)}")
    return Encoded.of(spec, shape, functools.partial(_read_codes, name, entries, spec, blocks))


def _read_codes(name: str, entries: Mapping[str, Entry], spec: QuantSpec, blocks: int, start: int, stop: int) -> Codes:
    def part(suffix: str, dtype: torch.dtype) -> torch.Tensor:
        entry = entries[f"{name}.{suffix}"]
        row = math.prod(entry.shape[1:]) * dtype.itemsize
        return read_bytes(entry, start * row, stop * row).view(dtype).view(stop - start, *entry.shape[1:])

    packed = part("codes", torch.uint8).flatten(1)
    codes = unpack(packed, spec.format, packed.shape[1] * 8 // spec.bits)
    scales = part("scales", torch.float32)
    if spec.format == "float8_e4m3fn":
        return codes.view(torch.float8_e4m3fn), scales, None
    if not spec.is_integer:
        return codes, scales, None
    if spec.symmetric:
        offsets = part("offsets", torch.float32) if spec.has_offsets else None
        return (codes - 2 ** (spec.bits - 1)).view(torch.int8), scales, offsets
    return codes, scales, unpack(part("zero_points", torch.uint8), spec.format, blocks)


def _check(path: Path, name: str, encoded: Encoded, weight: Weight) -> None:
    """Weights that were trained on after they were quantised would be lost without a word."""
    rows = min(_ROWS_CHECKED, weight.shape[0])
    wanted = weight.read_rows(0, rows)
    if not torch.equal(encoded.decode(encoded.read_rows(0, rows)).to(wanted.dtype), wanted):
        raise CheckpointError(
            f"{path}: {name} is not what its codes mean: the checkpoint was changed after it was quantised; remove "
            f"{path.name} or quantise it again"
        )
