"""`Prompt`: tokens among which soft tokens of images may stand, and how text and images become one. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transom.backends.runtime import Call, Float, Runtime
from transom.errors import ImageError
from transom.graphs.images import Images
from transom.images import pan_and_scan
from transom.images.decode import read_image
from transom.images.pan_and_scan import PanAndScan
from transom.images.resize import PixelSpec, check_image

Part = str | Path | NDArray[np.uint8]
"""Text, or an image: its file, or uint8 [H, W, 3]."""

MARKER = "<image>"
"""Stands in a text where an image does."""

SOFT = -1
"""Stands among token ids where a soft token does."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens of text and of images.

    Attributes:
        tokens: Ids, int64 [T]; negative where a soft token stands.
        soft: Soft tokens in their order, float32 [n, D]; None if there are none.
    """

    tokens: NDArray[np.int64]
    soft: Float | None = None

    @staticmethod
    def of(tokens: Sequence[int] | Prompt) -> Prompt:
        """A prompt of token ids."""
        return tokens if isinstance(tokens, Prompt) else Prompt(tokens=np.asarray(tokens, dtype=np.int64))

    def __len__(self) -> int:
        return self.tokens.size

    def blocks(self) -> list[tuple[int, int]]:
        """First and end of every run of soft tokens: those of an image see each other."""
        if self.soft is None:
            return []
        is_soft = np.concatenate(([False], self.tokens < 0, [False]))
        edges = np.flatnonzero(is_soft[1:] != is_soft[:-1])
        return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]

    def after(self, first: int, end: int | None = None) -> Prompt:
        """The prompt without its first tokens, or without those from `end` on; an image is left whole or out."""
        skipped = int((self.tokens[:first] < 0).sum())
        tokens = self.tokens[first:end]
        soft = None if self.soft is None else self.soft[skipped : skipped + int((tokens < 0).sum())]
        return Prompt(tokens=tokens, soft=soft)

    def before(self, end: int) -> Prompt:
        """The prompt's first tokens; an image is whole or left out."""
        soft = None if self.soft is None else self.soft[: int((self.tokens[:end] < 0).sum())]
        return Prompt(tokens=self.tokens[:end], soft=soft)

    def part(self, first: int, end: int, position: int) -> Call:
        """Tokens from `first` to `end` as a call at a position. It cuts no run of soft tokens."""
        tokens, start = self.tokens[first:end], np.array([position])
        call = Call(tokens=tokens[None], start=start, logit_positions=np.arange(0))
        if self.soft is None or not (is_soft := tokens < 0).any():
            return call
        until = position + np.arange(end - first)
        for low, high in self.blocks():
            until[max(low - first, 0) : max(high - first, 0)] = position + high - first - 1
        skipped = int((self.tokens[:first] < 0).sum())
        soft = np.zeros((1, end - first, self.soft.shape[1]), np.float32)
        soft[0, is_soft] = self.soft[skipped : skipped + int(is_soft.sum())]
        return replace(call, until=until, soft=soft)


class Encoder(Protocol):
    """What turns text into ids."""

    def encode(self, text: str, bos: bool = True) -> list[int]: ...


@dataclass(kw_only=True)
class ImageReader:
    """Makes soft tokens of images.

    Attributes:
        runtime: What encodes them.
        images: What an image is among tokens.
        known: Soft tokens by the hash of the pixels that they were made of.
    """

    runtime: Runtime
    images: Images
    known: dict[str, Float] = field(default_factory=dict)

    def soft(
        self, image: Path | NDArray[np.uint8], setting: PanAndScan | None, on_image: Callable[[int, int], None]
    ) -> list[Float]:
        """Soft tokens of the whole image, then of each part that Pan & Scan cuts, each [Q, D].

        Raises:
            ImageError: If the image cannot be read.
            SessionError: If the runtime fails.
        """
        array = read_image(image) if isinstance(image, Path) else np.asarray(image)
        check_image(array)
        spec = PixelSpec(size=self.images.size)
        boxes = pan_and_scan.boxes(array.shape[0], array.shape[1], setting)
        results = []
        for done, box in enumerate(boxes):
            on_image(done, len(boxes))
            pixels = self.runtime.pixels(array, box, spec)
            key = hashlib.sha256(pixels.tobytes()).hexdigest()
            if key not in self.known:
                self.known[key] = self.runtime.encode_image(pixels)
            results.append(self.known[key])
        on_image(len(boxes), len(boxes))
        return results


def join(
    parts: Sequence[Part],
    reader: ImageReader,
    encoder: Encoder,
    *,
    setting: PanAndScan | None = None,
    bos: bool = True,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Prompt:
    """A prompt of text and images, in their order.

    Args:
        parts: Texts and images.
        reader: Makes soft tokens.
        encoder: Makes ids.
        setting: How images are cut; None leaves them whole.
        bos: Whether the text begins with the token that begins texts.
        on_image: Called with (done, total) as the parts of an image are encoded.

    Raises:
        ImageError: If an image cannot be read.
        TokenizerError: If a text cannot.
    """
    images, pieces, soft = reader.images, list[str | int](), list[Float]()
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
            continue
        encoded = reader.soft(part, setting, on_image)
        around = pan_and_scan.prompt_text("\0", len(encoded) - 1).split("\0")
        pieces.append(around[0])
        for tokens, after in zip(encoded, around[1:], strict=True):
            middle = [images.begin_id, *[SOFT] * len(tokens), images.end_id]
            pieces += [images.text_before, *middle, images.text_after, after]
            soft.append(tokens)
    ids: list[int] = []
    text = ""
    for piece in [*pieces, None]:
        if isinstance(piece, str):
            text += piece
            continue
        # Text between two tokens of images is cut into tokens as one, as it is where they stand in it as text.
        if text or not ids:
            ids += encoder.encode(text, bos=bos and not ids)
            text = ""
        if piece is not None:
            ids.append(piece)
    return Prompt(tokens=np.array(ids, np.int64), soft=np.concatenate(soft) if soft else None)


def split_at(text: str, marker: str, images: Sequence[Any]) -> list[Any]:
    """Text with images at its markers; before it, if it has none.

    Raises:
        ImageError: If there are as many markers as images neither nor none.
    """
    texts = text.split(marker)
    if len(texts) == 1:
        return [*images, text]
    if len(texts) - 1 != len(images):
        markers = f"{len(texts) - 1} marker{'s' if len(texts) > 2 else ''} {marker}"
        raise ImageError(f"the prompt has {markers} and {len(images)} images: give one image for each marker")
    return [part for pair in zip(texts, [*images, None], strict=True) for part in pair if part is not None]
