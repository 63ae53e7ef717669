"""The head of a GGUF model, which is one file or a set that was split. Needs neither torch nor the `gguf` package.

llama.cpp names the files of a set `NAME-00001-of-00003.gguf`, and each says which it is (`split.no`, from 0), of how
many (`split.count`), and how many tensors the whole set holds (`split.tensors.count`). The metadata stand in the
first. Any file of a set stands for all of it here.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from transom.errors import CheckpointError
from transom.wording import listed, shortened
from transom.zoo.checkpoints.gguf_part import Part, TensorInfo, read_part

_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.DOTALL)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
# Keys that a part may have of its own.
_OF_ONE_PART = {_NUMBER, "general.alignment"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What stands before the numbers.

    Attributes:
        path: The file, or the first of a set.
        metadata: Of that file: scalars, strings, lists of strings, and numpy arrays of numbers.
        tensors: Of all files, by name.
        parts: All files, in order.
    """

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """What the model is called: the file's name, less what tells the files of a set apart."""
        stem = self.path.stem
        return match[1] if (match := _PART_NAME.fullmatch(stem)) else stem

    @property
    def size(self) -> int:
        """Of all files together, in bytes."""
        return sum(part.size for part in self.parts)


def read_header(path: Path) -> Header:
    """Parse the head of a GGUF file, and of the other files of its set if it is part of one.

    Raises:
        CheckpointError: If a file is missing, truncated, corrupt, or not GGUF of version 2 or 3, or if the files of a
            set contradict each other.
    """
    part = read_part(path)
    count = _number(part, _COUNT, 1)
    if count <= 1:
        if _number(part, _NUMBER, 0):
            raise CheckpointError(f"{path}: {_NUMBER} says that it is part of a set, {_COUNT} not: fetch it again")
        return Header(path=path, metadata=part.metadata, tensors=part.tensors, parts=(part,))
    parts = _read_set(part, count)
    tensors: dict[str, TensorInfo] = {}
    for each in parts:
        if twice := sorted(tensors.keys() & each.tensors.keys()):
            raise CheckpointError(
                f"{each.path}: holds {twice[0]}, which {tensors[twice[0]].path.name} holds too: "
                "the files do not belong together, fetch them again"
            )
        tensors |= each.tensors
    if (expected := _number(parts[0], _TENSORS)) != len(tensors):
        raise CheckpointError(
            f"{parts[0].path}: {_TENSORS} is {expected}, but its {count} files hold {len(tensors)} tensors: "
            "fetch them again"
        )
    return Header(path=parts[0].path, metadata=parts[0].metadata, tensors=tensors, parts=parts)


def header_of(source: Path | Header) -> Header:
    """The header of a file, unless it was read before."""
    return source if isinstance(source, Header) else read_header(source)


def _read_set(part: Part, count: int) -> tuple[Part, ...]:
    """All files of the set that `part` belongs to."""
    path, number = part.path, _number(part, _NUMBER)
    match = _PART_NAME.fullmatch(path.stem)
    if match is None or path.suffix != ".gguf" or (int(match[2]), int(match[3])) != (number + 1, count):
        raise CheckpointError(
            f"{path}: says that it is file {number + 1} of {count} ({_NUMBER}, {_COUNT}), so its name must end in "
            f"-{number + 1:05}-of-{count:05}.gguf: rename it, or fetch it again"
        )
    paths = [path.with_name(f"{match[1]}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    if missing := [each.name for each in paths if not each.is_file()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of the {count} files of its set are missing: fetch {listed(missing)}"
        )
    parts = tuple(part if each == path else read_part(each) for each in paths)
    first = parts[0]
    for index, each in enumerate(parts):
        if (stated := _number(each, _NUMBER)) != index:
            raise CheckpointError(f"{each.path}: {_NUMBER} is {stated}, its name says {index}: fetch it again")
        for key, value in each.metadata.items():
            if key not in _OF_ONE_PART and not _same(value, first.metadata.get(key)):
                raise CheckpointError(
                    f"{each.path}: {key} differs from that of {first.path.name}: the files do not belong together, "
                    "fetch them again"
                )
    return parts


def _same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return (
            isinstance(left, np.ndarray)
            and isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and left.tobytes() == right.tobytes()
        )
    # Not a number is itself here.
    return type(left) is type(right) and (left == right or repr(left) == repr(right))


def _number(part: Part, key: str, default: int | None = None) -> int:
    value = part.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise CheckpointError(f"{part.path}: {key} is {shortened(repr(value))}, expected a count: fetch it again")
    return value
