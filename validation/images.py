"""What targets are shown beside text: images for their encoders, and prompts of text and images.

Prompts hold the oracle's soft tokens, so that the decoder is judged by itself; the encoder is judged on the images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from transom.backends.prompt import SOFT, Prompt
from transom.backends.runtime import Float
from transom.backends.session import Session
from transom.errors import SessionError
from transom.graphs.images import Images
from transom.images import pan_and_scan
from transom.images.decode import read_image
from transom.images.resize import Box, PixelSpec, pixels
from transom.validation.compare import Measurement, measure
from transom.validation.judge import beyond, judge
from transom.validation.lengths import AROUND
from transom.validation.oracle import Oracle, Reading
from transom.validation.result import EncoderResult, ImageRun, ImagesResult, length_values
from transom.validation.tolerances import SoftTolerance, Tolerance

DRAWN = 3
"""Images that are drawn for an encoder, but for a large one."""

LARGE = 448
"""Pixels a side from which an encoder takes so long that one image must do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that all targets are shown.

    Attributes:
        name: For people.
        array: uint8 [H, W, 3].
        pixels: What an encoder reads of it, float32 [1, 3, S, S], by the rule in numpy.
    """

    name: str
    array: NDArray[np.uint8]
    pixels: Float

    @property
    def box(self) -> Box:
        """All of it."""
        return pan_and_scan.boxes(self.array.shape[0], self.array.shape[1], None)[0]

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {"name": self.name, "sha256": hashlib.sha256(self.array.tobytes()).hexdigest()}


def pictures(images: Images, files: Sequence[Path] = (), seed: int = 0) -> list[Picture]:
    """The images in some files; without any, images that are drawn here from a seed.

    Raises:
        ImageError: If a file cannot be read.
    """
    if files:
        arrays = [(str(file), read_image(file)) for file in files]
    else:
        draw = np.random.default_rng(seed)
        count = 1 if images.size > LARGE else DRAWN
        # Sides that are no multiples of the encoder's: both are scaled, one up and one down.
        sides = images.size * 3 // 4 + 1, images.size * 5 // 4 + 1
        arrays = [(f"drawn image {index + 1}", _drawn(*sides, draw)) for index in range(count)]
    spec = PixelSpec(size=images.size)
    shown = []
    for name, array in arrays:
        box = pan_and_scan.boxes(array.shape[0], array.shape[1], None)[0]
        words = f"{name} ({array.shape[1]} x {array.shape[0]})"
        shown.append(Picture(name=words, array=array, pixels=pixels(array, box, spec)))
    return shown


def _drawn(rows: int, columns: int, draw: np.random.Generator) -> NDArray[np.uint8]:
    """Waves, a box and noise: no two parts of it look the same."""
    y_HW, x_HW = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    colours = []
    for _ in range(3):
        waves = [
            np.sin(2 * np.pi * (draw.uniform(-3, 3) * x_HW + draw.uniform(-3, 3) * y_HW + draw.uniform()))
            for _ in range(3)
        ]
        colours.append(128 + 32 * np.sum(waves, 0))
    values_HWC = np.stack(colours, -1)
    top, left = int(draw.uniform(0, 0.6) * rows), int(draw.uniform(0, 0.6) * columns)
    values_HWC[top : top + rows // 3, left : left + columns // 3] = draw.uniform(0, 255, 3)
    values_HWC += draw.normal(0, 16, values_HWC.shape)
    return values_HWC.clip(0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCase:
    """A prompt of text and images.

    Attributes:
        name: In words.
        pieces: Counts of tokens of text, and None where an image stands.
        steps: Most tokens to feed at once, one run each; None feeds all, which the session then cuts.
        decoded: Tokens at its end that are fed one by one in a run of their own.
    """

    name: str
    pieces: tuple[int | None, ...]
    steps: tuple[int | None, ...] = (None,)
    decoded: int = 0

    def length(self, images: Images) -> int:
        """Tokens in all."""
        return sum(images.soft_tokens + 2 if piece is None else piece for piece in self.pieces)

    def positions(self, images: Images) -> int:
        """Tokens of all runs."""
        return self.length(images) * (len(self.steps) + bool(self.decoded))


def image_cases(
    images: Images, *, window: int | None, rings: Sequence[int], chunk: int, context: int
) -> tuple[list[ImageCase], list[str]]:
    """The cases that a context holds, and in words those that it does not.

    Args:
        images: What an image is among tokens.
        window: Keys that a local layer sees; None where all layers are global.
        rings: Slots of local layers' caches.
        chunk: Most new tokens in one call.
        context: Most tokens in the caches.
    """
    soft = images.soft_tokens
    between = sorted({min(soft + 1, chunk), chunk - 1} - {chunk} if chunk > soft else ())
    cases = [
        ImageCase(name="one image", pieces=(3, None, 2 * AROUND), decoded=2 * AROUND),
        ImageCase(name="two images side by side", pieces=(2, None, None, 5), steps=(1, *between, None)),
        ImageCase(name="images among text", pieces=(5, None, 7, None, 4), steps=(soft, None)),
    ]
    if window is not None:
        before = max(1, window - soft // 2 - 1)
        cases.append(ImageCase(name="an image across the window's edge", pieces=(before, None, 2 * AROUND)))
    for slots in rings:
        name = f"the wrap of a ring of {slots:,} slots"
        across = slots * math.ceil((soft // 2 + 2) / slots)
        cases.append(ImageCase(name=f"an image across {name}", pieces=(across - soft // 2 - 1, None, AROUND)))
        # The image ends where decoding begins, so that a window holds some of it.
        wrap = slots * math.ceil((soft + 3 + AROUND) / slots)
        pieces = (wrap - AROUND - soft - 2, None, 2 * AROUND)
        cases.append(
            ImageCase(name=f"decoding behind an image over {name}", pieces=pieces, steps=(), decoded=2 * AROUND)
        )
    missed = [case.name for case in cases if case.length(images) > context]
    return [case for case in cases if case.name not in missed], [
        f"{name}: the context ends before it" for name in missed
    ]


class ImageOracle:
    """The oracle's soft tokens of some pictures, and its readings of prompts with them.

    Args:
        oracle: Of a model that sees images, with a quantisation's numbers.
        images: What an image is among tokens.
        shown: What is encoded, once, here.
        text: Token ids of the text between images; they are repeated where they do not reach.
        on_image: Called with (done, total).
    """

    def __init__(
        self,
        oracle: Oracle,
        images: Images,
        shown: Sequence[Picture],
        text: Sequence[int],
        on_image: Callable[[int, int], None],
    ) -> None:
        self.images, self.shown = images, tuple(shown)
        self._oracle, self._text, self.soft = oracle, text, list[Float]()
        self._known: dict[tuple[int | None, ...], tuple[Prompt, Reading]] = {}
        for done, picture in enumerate(shown):
            on_image(done, len(shown))
            self.soft.append(oracle.encode_image(picture.pixels))
        on_image(len(shown), len(shown))

    def read(self, case: ImageCase) -> tuple[Prompt, Reading]:
        """A case as a prompt, and what the oracle says of it."""
        if case.pieces not in self._known:
            ids, until, soft = list[int](), list[int](), list[Float]()
            words = 0
            for piece in case.pieces:
                if piece is not None:
                    ids += [self._text[(words + index) % len(self._text)] for index in range(piece)]
                    words += piece
                    until += range(len(until), len(ids))
                    continue
                tokens = self.soft[len(soft) % len(self.soft)]
                soft.append(tokens)
                ids += [self.images.begin_id, *[SOFT] * len(tokens), self.images.end_id]
                until += [len(until), *[len(ids) - 2] * len(tokens), len(ids) - 1]
            prompt = Prompt(tokens=np.array(ids, np.int64), soft=np.concatenate(soft))
            self._known[case.pieces] = prompt, self._oracle.read_images(prompt, until)
        return self._known[case.pieces]


def validate_images(
    session: Session,
    oracle: ImageOracle,
    cases: Sequence[ImageCase],
    *,
    logit_bound: Tolerance,
    soft_bound: SoftTolerance,
    on_progress: Callable[[str, int, int], None],
) -> tuple[ImagesResult, list[str]]:
    """Encode all pictures and run all cases; returns the numbers and why the target fails.

    Progress is (what, done, total).

    Raises:
        SessionError: If the target's runtime fails, or its soft tokens have another shape.
    """
    failures, encoded, runs = list[str](), list[EncoderResult](), list[ImageRun]()
    for done, (picture, expected) in enumerate(zip(oracle.shown, oracle.soft, strict=True)):
        on_progress("images", done, len(oracle.shown))
        result, lines = _encode(session, picture, expected, oracle.images, soft_bound)
        encoded.append(result)
        failures += lines
    on_progress("images", len(encoded), len(oracle.shown))
    total, ran = sum(case.positions(oracle.images) for case in cases), 0

    def advance(count: int) -> None:
        nonlocal ran
        ran += count
        on_progress("prompts with images", ran, total)

    for case in cases:
        prompt, reading = oracle.read(case)
        for kind, step, measurement in _runs(session, case, prompt, reading, advance):
            where = f"{case.name}, {_fed(kind, step, session.chunk)}"
            failures += judge(kind, measurement.differences, logit_bound, where=where)
            runs.append(ImageRun(case=case.name, step=step or session.chunk, **length_values(kind, measurement)))
    return ImagesResult(tolerance=soft_bound, encoded=tuple(encoded), runs=tuple(runs)), failures


def _runs(
    session: Session, case: ImageCase, prompt: Prompt, reading: Reading, advance: Callable[[int], None]
) -> Iterator[tuple[str, int | None, Measurement]]:
    for step in case.steps:
        most = len(prompt) if step is None else step
        yield "prefill", step, measure(session, prompt, reading.logits, step=most, on_tokens=advance)
    if case.decoded:
        first = len(prompt) - case.decoded
        yield "decode", 1, measure(session, prompt, reading.logits, step=1, first=first, on_tokens=advance)


def _fed(kind: str, step: int | None, chunk: int) -> str:
    if kind == "decode":
        return "the tokens behind it one by one"
    return f"in calls of {chunk if step is None else step:,}" if step != 1 else "one token a call but for images"


def _encode(
    session: Session, picture: Picture, expected: Float, images: Images, bound: SoftTolerance
) -> tuple[EncoderResult, list[str]]:
    failures = []
    theirs = session.runtime.pixels(picture.array, picture.box, PixelSpec(size=images.size))
    # Also where one is NaN, which equals nothing.
    different = int((theirs != picture.pixels).sum())
    if different:
        failures.append(f"{picture.name}: {different:,} of {theirs.size:,} pixel values are not those of the rule")
    began = time.perf_counter()
    actual = session.runtime.encode_image(picture.pixels)
    seconds = time.perf_counter() - began
    if actual.shape != expected.shape:
        raise SessionError(
            f"{session.runtime.title} makes soft tokens {list(actual.shape)} of {picture.name}, the model "
            f"{list(expected.shape)}: export it again"
        )
    differences = np.abs(actual.astype(np.float64) - expected).max(-1)
    relative = differences / np.maximum(np.abs(expected).max(-1), np.finfo(np.float32).tiny)
    if (bad := beyond(relative, bound.relative, 0)) is not None:
        first, value, count = bad
        failures.append(
            f"{picture.name}: soft tokens differ from number {first} on, by {value:.1e} of their largest value; "
            f"{bound.relative:.0e} is allowed, {count} of {len(relative)} are beyond it"
        )
    return EncoderResult(
        image=picture.name,
        pixels_different=different,
        max_abs=float(differences.max()),
        max_rel=float(relative.max()),
        worst=int(np.argmax(relative)),
        seconds=seconds,
    ), failures
