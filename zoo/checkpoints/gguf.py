"""GGUF, the file format of llama.cpp: configuration, tokenizer and (mostly quantised) weights in one file, or in a set.

What the format leaves to convention, and where it differs from the released checkpoints, a model's file tells.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from transom.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.wording import listed
from transom.zoo.architecture import GGUFFormat
from transom.zoo.architectures import architecture, tensor_shapes
from transom.zoo.checkpoints.checkpoint import Checkpoint
from transom.zoo.checkpoints.gguf_config import gguf_format, read_metadata
from transom.zoo.checkpoints.gguf_header import Header, header_of
from transom.zoo.checkpoints.gguf_tensors import FREQUENCIES, HEAD, account
from transom.zoo.checkpoints.gguf_weight import gguf_package, open_weight
from transom.zoo.checkpoints.layout import TABLE
from transom.zoo.checkpoints.stacked import side_by_side
from transom.zoo.config import DecoderConfig

_EXPERTS = "_exps."
"""In names of tensors that have an axis of experts."""

_IN_LAYER = "N."
"""Before a name in a layer that stands elsewhere too; see `GGUFFormat.tensors`."""

_HASHED_WHOLE = 2**30
"""Models up to this many bytes are identified by all their bytes: about half a second at most."""


def open_gguf(source: Path | Header) -> tuple[DecoderConfig, Checkpoint]:
    """Read the head of a GGUF file or set; the tensors stay where they are until read.

    Args:
        source: The file, any file of a set, or what `read_header` made of it.

    Returns:
        The configuration, named after the file, and float32 weights. Those that the file holds as integers times a
        scale (Q4_0, Q5_0, Q8_0, Q6_K) carry their codes.

    Raises:
        CheckpointError: If a file is damaged or missing, a tensor is missing, has the wrong shape or a type that we do
            not read, or would change the model's numbers in a way that it does not know, or the `gguf` package is not
            installed.
        ConfigError: If the file's metadata is incomplete or describes a model that the zoo does not hold.
    """
    header = header_of(source)
    config, lines = read_metadata(header)
    shapes = tensor_shapes(config)
    family = architecture(config.architecture)
    form = gguf_format(family)
    names = {name: _names_in_file(form, name, header) for name in shapes}
    gguf = gguf_package()
    weights = open_weights(
        gguf, header, names, shapes, functools.partial(form.rows, config), functools.partial(form.shapes, config)
    )
    needed = {*itertools.chain(*names.values()), *([FREQUENCIES] if form.frequencies else [])}
    unread = {name for name in header.tensors if family.huggingface.unread(config, _name_in_module(form, name))}
    parts = account(gguf, header, needed, config, unread - needed)
    copies = {}
    if HEAD in header.tensors and HEAD not in needed:
        copies[TABLE] = (open_weight(gguf, HEAD, header.tensors[HEAD], weights[TABLE].shape),)
    return config, Checkpoint(weights=weights, copies=copies, left_out=(*parts, *lines))


def open_weights(
    gguf: ModuleType,
    header: Header,
    names: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    rows: Callable[[str], Callable[[Weight], Weight] | None],
    stored: Callable[[str], tuple[int, ...] | None] = lambda name: None,
) -> dict[str, Weight]:
    """Tensors of a file as the module's weights.

    Args:
        gguf: The package.
        header: Of the file.
        names: In the module -> in the file, where gates and ups of experts are two tensors. Tensors of the module that
            go by one name stand there one below the other, in the module's order.
        shapes: By names in the module.
        rows: A name in the module -> what becomes of the stored rows; None if nothing.
        stored: A name in the module -> the shape in the file; None if it is the module's.

    Raises:
        CheckpointError: If a tensor is missing, has another shape or a type that we do not read.
    """
    needed = dict.fromkeys(in_file for name in shapes for in_file in names[name])
    if missing := [in_file for in_file in needed if in_file not in header.tensors]:
        raise CheckpointError(
            f"{header.path}: {len(missing)} of {len(needed)} tensors are missing: {listed(missing)}: fetch it again"
        )
    sharers: dict[tuple[str, ...], list[str]] = {}
    for name in shapes:
        sharers.setdefault(tuple(names[name]), []).append(name)
    weights = {}
    for name, shape in shapes.items():
        together = sharers[tuple(names[name])]
        weight = _open(gguf, header, names[name], (len(together) * shape[0], *shape[1:]), stored(name))
        if len(together) > 1:
            first = together.index(name) * shape[0]
            weight = weight.slice_rows(first, first + shape[0])
        change = rows(name)
        weights[name] = weight if change is None else change(weight)
    return weights


def _open(
    gguf: ModuleType, header: Header, names: Sequence[str], shape: tuple[int, ...], stored: tuple[int, ...] | None
) -> Weight:
    parts, count = [], 1
    for name in names:
        info = header.tensors[name]
        if _EXPERTS in name and len(info.shape) > 1:
            count = info.shape[0]
            info = dataclasses.replace(info, shape=(count * info.shape[1], *info.shape[2:]))
        parts.append(open_weight(gguf, name, info, (shape[0] // len(names), *shape[1:]), stored))
    return parts[0] if len(parts) == 1 else side_by_side(parts, count)


def revision(source: Path | Header) -> str:
    """Identity of a file or set: SHA-256 of it, or of its heads and size when it is larger than 1 GiB."""
    header = header_of(source)
    digest = hashlib.sha256()
    whole = header.size <= _HASHED_WHOLE
    for part in header.parts:
        left = part.size if whole else part.data_start
        with part.path.open("rb") as file:
            while left and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
    return f"sha256:{digest.hexdigest()}" if whole else f"head-sha256:{digest.hexdigest()}:{header.size}"


def _names_in_file(form: GGUFFormat, name: str, header: Header) -> tuple[str, ...]:
    head, rest = "", name
    if name.startswith("layers.") and name.rpartition(".")[0] not in form.tensors:
        _, index, rest = name.split(".", 2)
        head = f"blk.{index}."
    module, _, last = rest.rpartition(".")
    if head and _IN_LAYER + module in form.tensors:
        module = _IN_LAYER + module
    # A tensor goes by its own name, or by its module's.
    names = form.tensors.get(rest) or f"{form.tensors[module]}.{last}"
    if rest in form.apart and f"{head}{names}" not in header.tensors:
        names = form.apart[rest]
    return tuple(head + one for one in ((names,) if isinstance(names, str) else names))


def _name_in_module(form: GGUFFormat, name: str) -> str:
    """What the module would call a tensor of the file; "" for one that goes by no name of the family."""
    modules = {
        in_file: module.removeprefix(_IN_LAYER) for module, in_file in form.tensors.items() if isinstance(in_file, str)
    }
    head, rest = "", name
    if name.startswith("blk."):
        _, index, rest = name.split(".", 2)
        head = f"layers.{index}."
    stem, _, last = rest.rpartition(".")
    return (
        head + (modules[rest] if rest in modules else f"{modules[stem]}.{last}")
        if {rest, stem} & modules.keys()
        else ""
    )
