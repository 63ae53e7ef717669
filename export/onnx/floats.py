"""Weights of narrow floats in ONNX: bytes that are looked up in a table of 256 numbers, or pairs of numbers.

It gives the same numbers for every kind of narrow float, with operators that every runtime has. One that folds
constants, such as ONNX Runtime, widens weights of linears to float32 when it loads them: narrow are the file, and the
embedding.
"""

from __future__ import annotations

import numpy as np
import torch

from transom.export.onnx.emitter import Emitter
from transom.export.onnx.lowerings import INT32
from transom.formats import float4, sfp8
from transom.formats.quantized import block_of, unpack
from transom.graphs.node import Node

_BYTES = torch.arange(256, dtype=torch.int16).to(torch.uint8)

FLOATS: dict[str, torch.Tensor] = {
    "float8_e4m3fn": _BYTES.view(torch.float8_e4m3fn).float(),
    "sfp8": sfp8.decode(_BYTES),
    "float4_e2m1fn": float4.decode(unpack(_BYTES[:, None], "float4_e2m1fn", 2)),
}
"""What every byte means, float32 [256], or [256, 2] where it is two codes, by format."""


def looked_up(emitter: Emitter, codes: Node, scales: Node, format: str, *, rows: Node | None = None) -> str:
    """Numbers of a matrix of narrow floats: all of it, float32 [R, K], or some rows, float32 [..., K].

    Args:
        emitter: Of the export.
        codes: [R, G, C].
        scales: [R, G].
        format: A key of `FLOATS`.
        rows: Which rows, int64 [...].
    """
    blocks, block = int(codes.meta["val"].shape[1]), block_of(codes.meta["val"], format)
    named_codes = emitter.graph.weight_of(codes)
    assert named_codes is not None
    name, weight = named_codes
    parts = [
        emitter.initializer(name, weight.map_rows(lambda part: part.view(torch.uint8), dtype=torch.uint8)),
        emitter.value(scales),
    ]
    if rows is not None:
        parts = [emitter.op("Gather", part, emitter.value(rows), axis=0) for part in parts]
    # Lookups want an index type that bytes are not.
    indices = emitter.op("Cast", parts[0], to=INT32)
    values = emitter.op("Gather", emitter.constant(FLOATS[format].numpy()), indices, axis=0)
    leading = [0] * (1 if rows is None else rows.meta["val"].dim())
    if FLOATS[format].dim() > 1:
        values = emitter.op("Reshape", values, emitter.constant(np.array([*leading, blocks, block])))
    scaled = emitter.op("Mul", values, emitter.op("Unsqueeze", parts[1], emitter.constant(np.array([-1]))))
    return str(emitter.op("Reshape", scaled, emitter.constant(np.array([*leading, blocks * block]))))
