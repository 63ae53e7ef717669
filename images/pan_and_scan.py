"""Pan & Scan: an image of unequal sides is shown whole, then in up to four parts along its longer side.

The published settings differ in the ratio of sides from which on they cut. The parts, and the words around them, are
those of Hugging Face's processor under both.
"""

from __future__ import annotations

import dataclasses
import math

from transom.images.resize import Box


@dataclasses.dataclass(frozen=True, kw_only=True)
class PanAndScan:
    """When an image is cut, and into how many parts.

    Attributes:
        min_ratio: Least ratio of the longer side to the shorter one at which an image is cut.
        min_side: Least rows and columns of a part; an image whose parts would have fewer stays whole.
        max_parts: Most parts.
    """

    min_ratio: float
    min_side: int = 256
    max_parts: int = 4


SETTINGS = {"off": None, "hf": PanAndScan(min_ratio=1.2), "google": PanAndScan(min_ratio=1.5)}
"""By name: never, as Hugging Face's processor where it is switched on, and as Google's PyTorch implementation."""


def boxes(height: int, width: int, setting: PanAndScan | None) -> list[Box]:
    """The parts of an image that a model sees: the whole first, then what Pan & Scan cuts, in reading order.

    Args:
        height: Rows of the image, at least 1.
        width: Columns of the image, at least 1.
        setting: One of `SETTINGS` or of your own; None shows the image whole.
    """
    whole = Box(0, 0, height, width)
    longer, shorter = max(height, width), min(height, width)
    if setting is None or longer / shorter < setting.min_ratio:
        return [whole]
    parts = min(math.floor(longer / shorter + 0.5), longer // setting.min_side)
    parts = min(max(parts, 2), setting.max_parts)
    side = math.ceil(longer / parts)
    if min(side, shorter) < setting.min_side:
        return [whole]
    # The last part is smaller where the parts do not divide the side.
    ranges = [(first, min(first + side, longer)) for first in range(0, parts * side, side)]
    if width >= height:
        return [whole, *(Box(0, first, height, end) for first, end in ranges)]
    return [whole, *(Box(first, 0, end, width) for first, end in ranges)]


def prompt_text(image: str, parts: int) -> str:
    """What a prompt says in place of an image.

    Args:
        image: What stands for one box: the model's own tokens of an image.
        parts: Boxes beside the whole image.
    """
    if not parts:
        return image
    crops = " ".join([image] * parts)
    return f"Here is the original image {image} and here are some crops to help you see better {crops}"
