"""Image files to arrays: JPEG, PNG and WebP by Pillow, the extra `images`.

What a file holds becomes the RGB values that it is seen with: turned as its EXIF orientation says, transparent parts on
white, grey and palettes as colours, CMYK by Pillow's conversion, which knows no colour profiles, and of 16-bit values
the upper 8 bits. Of an animation the first image is read.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from transom.errors import ImageError

if TYPE_CHECKING:
    import PIL.Image

FORMATS = ("JPEG", "PNG", "WEBP")

MAX_SIDE = 65_535
"""Most rows and columns: what a JPEG file can say."""

_ORIENTATION = 0x0112
"""The EXIF tag."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image in a file; see `decode`."""
    try:
        with path.open("rb") as file:
            return decode(file, str(path))
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}): name a JPEG, PNG or WebP file") from None


def decode(file: BinaryIO, name: str) -> NDArray[np.uint8]:
    """The image in an open file or in bytes.

    Args:
        file: Where to read from; it can seek.
        name: What errors call it.

    Returns:
        uint8 [height, width, 3], red, green and blue.

    Raises:
        ImageError: If it is no whole image of these formats, or is too large, or if Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise ImageError(f"images need Pillow ({error}): pip install 'transom[images]'") from None
    if not file.read(1):
        raise ImageError(f"{name} is empty: name a JPEG, PNG or WebP file")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(file, formats=FORMATS)
            if max(image.size) > MAX_SIDE:
                sides = f"{image.width:,} columns and {image.height:,} rows"
                raise ImageError(f"{name} has {sides}, at most {MAX_SIDE:,} are read: crop it or scale it down")
            return _values(image)
    except ImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{name} is no JPEG, PNG or WebP file: convert it to one of them") from None
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError):
        pixels = PIL.Image.MAX_IMAGE_PIXELS
        raise ImageError(f"{name} has more than the {pixels:,} pixels that are read: scale it down") from None
    except Exception as error:
        # Pillow's readers raise errors of many kinds for damaged files, some by chance.
        raise ImageError(f"{name} is damaged ({error}): save it anew") from error


def _values(image: PIL.Image.Image) -> NDArray[np.uint8]:
    """An opened image, read and converted."""
    import PIL.Image

    turn = PIL.Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    orientation = image.getexif().get(_ORIENTATION)
    if image.mode.startswith("I"):
        # Pillow would clip these values, of 16 bits whatever the mode's name, to 255.
        image = PIL.Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return np.array(image.transpose(turns[orientation]) if orientation in turns else image)
