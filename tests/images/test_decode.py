"""Image files of every kind become RGB values; what is no whole image is one clear error."""

from __future__ import annotations

import io
import random
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from transom.errors import ImageError
from transom.images.decode import FORMATS, decode, read_image

Image = pytest.importorskip("PIL.Image", reason="the images extra is not installed")
ImageOps = pytest.importorskip("PIL.ImageOps")

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
GREY = RGB[:, :, 0]


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> NDArray[np.uint8]:
    values = decode(io.BytesIO(data), "photo")
    assert values.dtype == np.uint8 and values.ndim == 3 and values.shape[2] == 3 and values.flags["C_CONTIGUOUS"]
    return values


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG file as its specification writes it: Pillow writes neither 16-bit colours nor sizes that lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    pieces = [
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)) for tag, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def png_of(values: NDArray[Any], colour: int, *more: tuple[bytes, bytes]) -> bytes:
    """Rows of an array [H, W] or [H, W, C], each after a byte that says "no filter"."""
    wide = values.astype(values.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    return png(values.shape[1], values.shape[0], 8 * values.itemsize, colour, rows, *more)


def on_white(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    share = alpha / 255
    return rgb * share + 255 * (1 - share)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_colours_come_back(kind: str) -> None:
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(RGB), kind, lossless=True)), RGB)


def test_jpeg_is_what_pillow_reads() -> None:
    data = encoded(Image.fromarray(RGB), "JPEG")
    np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data))))


def test_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(Image.fromarray(RGB)))
    np.testing.assert_array_equal(read_image(path), RGB)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_turns(orientation: int, kind: str) -> None:
    """0 and 9 mean nothing, and turn nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), kind, exif=exif, lossless=True)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decoded(data), upright)
    assert upright.shape[:2] == ((7, 5) if 5 <= orientation <= 8 else (5, 7))


@pytest.mark.parametrize("kind", FORMATS)
def test_grey_is_three_equal_colours(kind: str) -> None:
    values = decoded(encoded(Image.fromarray(GREY), kind, lossless=True))
    assert (np.ptp(values.astype(int), axis=2) == 0).all()
    if kind == "PNG":
        np.testing.assert_array_equal(values[:, :, 0], GREY)


def test_black_and_white() -> None:
    bits = GREY > 127
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(bits)))[:, :, 0], np.where(bits, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(kind: str) -> None:
    data = encoded(Image.fromarray(np.concatenate([RGB, ALPHA], axis=2)), kind, lossless=True, exact=True)
    assert np.abs(decoded(data) - on_white(RGB, ALPHA)).max() <= 1


def test_alpha_is_composited_as_transformers_does() -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    image = Image.fromarray(np.concatenate([RGB, ALPHA], axis=2))
    np.testing.assert_array_equal(decoded(encoded(image)), transforms.convert_to_rgb(image, return_numpy=True))


def test_grey_with_alpha() -> None:
    values = decoded(encoded(Image.fromarray(np.concatenate([GREY[..., None], ALPHA], axis=2))))
    assert np.abs(values - on_white(GREY[..., None], ALPHA)).max() <= 1


PALETTE = bytes([255, 0, 0, 0, 200, 0, 0, 0, 100])
INDICES = (GREY % 3).astype(np.uint8)
COLOURS = np.frombuffer(PALETTE, np.uint8).reshape(3, 3)[INDICES]


def test_palettes() -> None:
    np.testing.assert_array_equal(decoded(png_of(INDICES, 3, (b"PLTE", PALETTE))), COLOURS)


def test_palettes_with_alpha() -> None:
    alpha = bytes([255, 0, 128])
    values = decoded(png_of(INDICES, 3, (b"PLTE", PALETTE), (b"tRNS", alpha)))
    assert np.abs(values - on_white(COLOURS, np.frombuffer(alpha, np.uint8)[INDICES][..., None])).max() <= 1


def test_a_transparent_colour_is_white() -> None:
    transparent = b"".join(int(value).to_bytes(2, "big") for value in RGB[2, 3])
    expected = RGB.copy()
    expected[2, 3] = 255
    np.testing.assert_array_equal(decoded(png_of(RGB, 2, (b"tRNS", transparent))), expected)


def test_cmyk() -> None:
    """Ink takes light away: red is what cyan and black leave of it."""
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[..., 0], ink[..., 3] = 255, 51
    values = decoded(encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)).astype(int)
    assert np.abs(values - [0, 204, 204]).max() <= 3


WIDE = RNG.integers(0, 65_536, (5, 7, 4), dtype=np.uint16)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_16_bits_keep_the_upper_8(colour: int, channels: int) -> None:
    values = decoded(png_of(WIDE[..., :channels], colour))
    np.testing.assert_array_equal(values, np.broadcast_to(WIDE[..., :channels] >> 8, values.shape))


@pytest.mark.parametrize(("colour", "channels"), [(4, 2), (6, 4)])
def test_16_bits_with_alpha(colour: int, channels: int) -> None:
    upper = (WIDE[..., :channels] >> 8).astype(np.uint8)
    values = decoded(png_of(WIDE[..., :channels], colour))
    assert np.abs(values - on_white(upper[..., :-1], upper[..., -1:])).max() <= 1


def test_an_animation_is_its_first_image() -> None:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    data = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    np.testing.assert_array_equal(decoded(data), RGB)


HOSTILE = {
    "empty": (b"", "photo is empty"),
    "text": (b"GIF89a is no image that is read here", "photo is no JPEG, PNG or WebP file"),
    "other format": (encoded(Image.fromarray(RGB), "BMP"), "photo is no JPEG, PNG or WebP file"),
    "bomb that Pillow warns of": (png(10_000, 10_000, 8, 2, b""), r"more than the 89,478,485 pixels that are read"),
    "bomb that Pillow refuses": (png(60_000, 60_000, 8, 2, b""), r"more than the 89,478,485 pixels that are read"),
    "wide": (png(100_000, 20, 8, 2, bytes(300_001 * 20)), "100,000 columns and 20 rows, at most 65,535 are read"),
    "high": (png(20, 100_000, 8, 0, bytes(21 * 100_000)), "20 columns and 100,000 rows, at most 65,535 are read"),
    "no pixels": (png(0, 0, 8, 2, b""), "photo is "),
    "less data than its size": (png(50, 50, 8, 2, bytes(10)), "photo is damaged"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as raised:
        decoded(data)
    assert "\n" not in str(raised.value) and ": " in str(raised.value)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files(kind: str, part: float) -> None:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises(ImageError, match=r"photo is damaged \(.*\): save it anew|photo is no JPEG, PNG or WebP file"):
        decoded(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_refused(kind: str) -> None:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)), kind)
    generator, refused = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 8)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        try:
            decoded(bytes(damaged))
        except ImageError:
            refused += 1
    assert refused


@pytest.mark.parametrize("name", [".", "missing.png"])
def test_paths_that_are_no_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(
        ImageError, match=re.escape(f"{path} cannot be read") + r" \(.*\): name a JPEG, PNG or WebP file"
    ):
        read_image(path)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImageError, match=r"images need Pillow .*: pip install 'transom\[images\]'"):
        decoded(encoded(Image.fromarray(RGB)))
