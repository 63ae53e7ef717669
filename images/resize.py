"""From an image to a vision model's pixels, bit for bit as Hugging Face's processors with torchvision on a CPU.

An image is narrowed first (columns), then shortened (rows), and each pass rounds to uint8. An output of a pass is a
weighted sum of inputs: the triangle filter, widened by the scale where the image shrinks, with weights rounded to
multiples of a power of two, as in torch's kernels of uint8. Every sum here is exact, so its order is free.

Axes: H rows and W columns of the image, S rows or columns of the result, B blocks, N outputs of a block (B * N = S),
K taps: input values that a block reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.errors import ImageError

BLOCK = 32
"""Most outputs of one product, in which each is multiplied with the inputs of all: few, but not too few for BLAS."""

POWERS = 2.0 ** np.arange(23)
"""Weights are multiples of 1 / power: of the largest power at which they are below `WEIGHT_LIMIT` multiples."""

WEIGHT_LIMIT = 2.0**15

_FLOAT32_POWER = 2.0**16
"""Up to this power, sums of weighted uint8 values are exact in float32: they have at most 24 bits."""


class Box(NamedTuple):
    """A part of an image, in pixels; `bottom` and `right` are the first row and column after it."""

    top: int
    left: int
    bottom: int
    right: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """What a vision model reads.

    Attributes:
        size: Rows and columns.
        mean: What is subtracted from red, green and blue, where 1 is full brightness.
        std: What they are divided by after that.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def scaled(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and std on the scale of uint8 values, float32 [3] both."""
        full = np.float32(255)
        return np.array(self.mean, np.float32) * full, np.array(self.std, np.float32) * full


class Taps(NamedTuple):
    """How the S outputs of a pass follow from its inputs.

    Attributes:
        first: First input that each block reads, int64 [B].
        weights: [B, N, K], float32 where that holds all sums exactly, else float64; a block's outputs are their
            product with the inputs `first` to `first + K`.
    """

    first: NDArray[np.int64]
    weights: NDArray[Any]


def block_size(size: int) -> int:
    """N: the largest divisor of a size that is at most `BLOCK`."""
    return max(count for count in range(1, BLOCK + 1) if size % count == 0)


def taps(count: int, size: int) -> Taps:
    """The antialiased bilinear filter from `count` inputs to `size` outputs."""
    scale = count / size
    reach = max(scale, 1.0)
    centres_BN = (scale * (np.arange(size) + 0.5)).reshape(-1, block_size(size))
    # From the first tap of a block's first output to the last one of its last output, with room for rounding.
    read = min(count, int(scale * (centres_BN.shape[1] - 1) + 2 * reach) + 2)
    first_B = np.clip(np.floor(centres_BN[:, 0] - reach + 0.5).astype(np.int64), 0, count - read)
    inputs_BK = first_B[:, None] + np.arange(read)
    distances_BNK = (inputs_BK[:, None] - centres_BN[:, :, None] + 0.5) * (1 / reach)
    weights_BNK = np.maximum(1 - np.abs(distances_BNK), 0)
    weights_BNK /= weights_BNK.sum(axis=-1, keepdims=True)
    power = POWERS[np.floor(weights_BNK.max() * POWERS + 0.5) < WEIGHT_LIMIT].max()
    exact = np.float32 if power <= _FLOAT32_POWER else np.float64
    return Taps(first_B, (np.floor(weights_BNK * power + 0.5) / power).astype(exact))


def resize(image_HWC: NDArray[np.uint8], box: Box, size: int) -> NDArray[np.uint8]:
    """A part of an image in another size; proportions are not kept.

    Beside the result, blocks are all that memory holds.

    Args:
        image_HWC: uint8 [H, W, 3].
        box: Which part.
        size: S, rows and columns of the result.

    Returns:
        uint8 [3, S, S].

    Raises:
        ImageError: If the image has another shape or dtype, or the box is empty or leaves it.
    """
    check_image(image_HWC)
    height, width, _ = image_HWC.shape
    if not (0 <= box.top < box.bottom <= height and 0 <= box.left < box.right <= width):
        raise ImageError(f"{box} is no part of an image of {height} rows and {width} columns: choose one inside it")
    region_HWC = image_HWC[box.top : box.bottom, box.left : box.right]
    rows, columns = taps(region_HWC.shape[0], size), taps(region_HWC.shape[1], size)
    shortened = []
    for first, weights_NK in zip(*rows, strict=True):
        narrow_KCS = _narrowed(region_HWC[first : first + weights_NK.shape[1]], columns)
        sums = weights_NK @ narrow_KCS.reshape(len(narrow_KCS), -1).astype(weights_NK.dtype)
        shortened.append(_rounded(sums).reshape(-1, 3, size))
    return np.concatenate(shortened).transpose(1, 0, 2)


def _narrowed(rows_KWC: NDArray[np.uint8], columns: Taps) -> NDArray[np.uint8]:
    """Some rows of an image with S columns, uint8 [K, 3, S]."""
    narrowed = []
    for first, weights_NK in zip(*columns, strict=True):
        read = weights_NK.shape[1]
        values = rows_KWC[:, first : first + read].transpose(0, 2, 1).astype(weights_NK.dtype, order="C")
        narrowed.append(_rounded(values.reshape(-1, read) @ weights_NK.T).reshape(len(rows_KWC), 3, -1))
    return np.concatenate(narrowed, axis=2)


def pixels(image_HWC: NDArray[np.uint8], box: Box, spec: PixelSpec) -> NDArray[np.float32]:
    """What a vision model reads of a part of an image.

    Args:
        image_HWC: uint8 [H, W, 3].
        box: Which part.
        spec: Size, mean and std.

    Returns:
        float32 [1, 3, S, S].

    Raises:
        ImageError: If the image has another shape or dtype, or the box is empty or leaves it.
    """
    mean_C, std_C = (values[:, None, None] for values in spec.scaled())
    return ((resize(image_HWC, box, spec.size).astype(np.float32) - mean_C) / std_C)[None]


def _rounded(sums: NDArray[Any]) -> NDArray[np.uint8]:
    return np.clip(np.floor(sums + 0.5), 0, 255).astype(np.uint8)


def check_image(image: NDArray[Any]) -> None:
    """Raise `ImageError` for what is not uint8 [height, width, 3], or holds no pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        shape = f"{image.dtype} {list(image.shape)}"
        raise ImageError(f"an image is {shape}, expected uint8 [height, width, 3]: convert it")
