"""Integer codes, scales and offsets inside the blocks of GGUF's types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from transom.formats import float4
from transom.formats.schemes import Format
from transom.graphs.encoded import Codes, Encoded


def read_codes(type_name: str, shape: tuple[int, ...], read_bytes: Callable[[int, int], np.ndarray]) -> Encoded | None:
    """Codes and scales of a type, and offsets of the `_1` types; None of those whose codes are not read."""
    if type_name not in _UNPACK:
        return None
    unpack, block, block_bytes, bits = _UNPACK[type_name]

    def read_rows(start: int, stop: int) -> Codes:
        with np.errstate(invalid="ignore", over="ignore"):  # scales that are no numbers are refused with their rows
            parts = unpack(read_bytes(start, stop).reshape(-1, block_bytes))
        codes, scales, *offsets = (torch.from_numpy(part.reshape(stop - start, -1)) for part in parts)
        return codes, scales, offsets[0] if offsets else None

    format: Format = "float4_e2m1fn" if type_name == "MXFP4" else "int4" if bits == 4 else "int8"
    return Encoded(
        name=type_name,
        shape=shape,
        format=format,
        bits=bits,
        block=block,
        symmetric=True,
        has_offsets=type_name.endswith("_1"),
        read_rows=read_rows,
    )


_Unpack = Callable[[np.ndarray], tuple[np.ndarray, ...]]


def _half(two_bytes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(two_bytes).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibbles of all bytes, then their high nibbles."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _four_bits(packed: np.ndarray) -> np.ndarray:
    return _nibbles(packed).astype(np.int8) - np.int8(8)


def _five_bits(packed: np.ndarray) -> np.ndarray:
    """The fifth bits of all codes stand before the others."""
    fifth = np.unpackbits(packed[:, :4], axis=-1, bitorder="little")
    codes: np.ndarray = (_nibbles(packed[:, 4:]) | fifth << 4).astype(np.int8) - np.int8(16)
    return codes


def _scale_and_offset(blocks: np.ndarray, middle: int) -> tuple[np.ndarray, np.ndarray]:
    """The file's minimum is what code 0 means. The sum is exact unless a minimum is thousands of times its scale."""
    scales, minima = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    return scales, minima + middle * scales


def _unpack_q4_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _four_bits(blocks[:, 2:]), _half(blocks[:, :2])


def _unpack_q4_1(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _four_bits(blocks[:, 4:]), *_scale_and_offset(blocks, 8)


def _unpack_q5_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _five_bits(blocks[:, 2:]), _half(blocks[:, :2])


def _unpack_q5_1(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _five_bits(blocks[:, 4:]), *_scale_and_offset(blocks, 16)


def _unpack_q8_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks[:, :2])


def _unpack_q6_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    count = len(blocks)
    low = np.stack((blocks[:, :128].reshape(count, 2, 64) & 15, blocks[:, :128].reshape(count, 2, 64) >> 4), axis=2)
    high = blocks[:, 128:192].reshape(count, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    codes = (low.reshape(count, 256) | high.reshape(count, 256) << 4).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return codes, _half(blocks[:, 208:]) * scales


def _unpack_mxfp4(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _nibbles(blocks[:, 1:]), float4.scales_of(torch.from_numpy(blocks[:, 0])).numpy()


# Type -> (reader of one block, values that share a scale, bytes of a block, bits that hold a code).
_UNPACK: dict[str, tuple[_Unpack, int, int, int]] = {
    "Q4_0": (_unpack_q4_0, 32, 18, 4),
    "Q4_1": (_unpack_q4_1, 32, 20, 4),
    "Q5_0": (_unpack_q5_0, 32, 22, 5),
    "Q5_1": (_unpack_q5_1, 32, 24, 5),
    "Q8_0": (_unpack_q8_0, 32, 34, 8),
    "Q6_K": (_unpack_q6_k, 16, 210, 6),
    "MXFP4": (_unpack_mxfp4, 32, 17, 4),
}
