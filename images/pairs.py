"""Pairs of an image and a text: a file of JSON lines, `{"image": path, "prompt": text, "answer": text}` each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transom.errors import PairsError
from transom.json_object import parse_object
from transom.wording import listed

FIELDS = ("image", "prompt", "answer")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image, what is asked of it, and the answer.

    Attributes:
        image: The image's file, which was there when the pairs were read.
        prompt: Text before the answer. Where it has no marker of an image, the image stands before it.
        answer: Text that a model should go on with; it is not empty.
    """

    image: Path
    prompt: str
    answer: str


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, in its order. Empty lines are passed over, and so are fields beside those of a pair.

    Args:
        path: The file, UTF-8. A relative path of an image starts from its folder.

    Raises:
        PairsError: If the file cannot be read or has no pair, or if a line is no JSON object, lacks a field, has one
            that is no text, or names an image that is not there.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise PairsError(f"{path} cannot be read ({error.strerror or error}): name a file of JSON lines") from None
    pairs = [_pair(line, f"{path}, line {number}", path.parent) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise PairsError(f"{path} has no pairs: write a JSON object with {', '.join(FIELDS)} in each line")
    return pairs


def _pair(line: bytes, where: str, folder: Path) -> Pair:
    values = parse_object(line, where, PairsError, "write a JSON object in each line")
    if missing := [name for name in FIELDS if name not in values]:
        raise PairsError(f"{where}: {listed(missing)} missing: a pair has {', '.join(FIELDS)}")
    if wrong := [name for name in FIELDS if not isinstance(values[name], str)]:
        raise PairsError(f"{where}: {listed(wrong)} must be text: put it in quotes")
    if empty := [name for name in ("image", "answer") if not values[name]]:
        raise PairsError(f"{where}: {listed(empty)} is empty: fill it in")
    image = folder / values["image"]
    try:
        is_there = image.is_file()
    except (OSError, ValueError):
        is_there = False
    if not is_there:
        raise PairsError(f"{where}: there is no image {image}: paths are relative to the folder of the pairs")
    return Pair(image=image, prompt=values["prompt"], answer=values["answer"])
