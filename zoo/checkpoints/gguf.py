"""GGUF, the file format of llama.cpp: configuration, tokenizer and (mostly quantised) weights in one file, or in a set.

What the format leaves to convention, and where it differs from the released checkpoints, a model's file tells.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from transom.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.wording import listed
from transom.zoo.architecture import GGUFFormat
from transom.zoo.architectures import architecture, tensor_shapes
from transom.zoo.checkpoints.checkpoint import Checkpoint
from transom.zoo.checkpoints.gguf_config import read_metadata
from transom.zoo.checkpoints.gguf_header import Header, header_of
from transom.zoo.checkpoints.gguf_tensors import FREQUENCIES, HEAD, account
from transom.zoo.checkpoints.gguf_weight import gguf_package, open_weight
from transom.zoo.checkpoints.layout import TABLE
from transom.zoo.config import DecoderConfig

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
    form = architecture(config.architecture).gguf
    assert form is not None, f"{config.architecture} has no GGUF files"
    names = {name: _name_in_file(form, name) for name in shapes}
    gguf = gguf_package()
    weights = open_weights(gguf, header, names, shapes, functools.partial(form.rows, config))
    needed = {*names.values(), *([FREQUENCIES] if form.frequencies else [])}
    parts = account(gguf, header, needed, config)
    copies = {}
    if HEAD in header.tensors and HEAD not in needed:
        copies[TABLE] = (open_weight(gguf, HEAD, header.tensors[HEAD], weights[TABLE].shape),)
    return config, Checkpoint(weights=weights, copies=copies, left_out=(*parts, *lines))


def open_weights(
    gguf: ModuleType,
    header: Header,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    rows: Callable[[str], Callable[[Weight], Weight] | None],
) -> dict[str, Weight]:
    """Tensors of a file as the module's weights.

    Args:
        gguf: The package.
        header: Of the file.
        names: In the module -> in the file.
        shapes: By names in the module.
        rows: A name in the module -> what becomes of the stored rows; None if nothing.

    Raises:
        CheckpointError: If a tensor is missing, has another shape or a type that we do not read.
    """
    if missing := [names[name] for name in shapes if names[name] not in header.tensors]:
        raise CheckpointError(
            f"{header.path}: {len(missing)} of {len(shapes)} tensors are missing: {listed(missing)}: fetch it again"
        )
    weights = {}
    for name, shape in shapes.items():
        weight = open_weight(gguf, names[name], header.tensors[names[name]], shape)
        change = rows(name)
        weights[name] = weight if change is None else change(weight)
    return weights


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


def _name_in_file(form: GGUFFormat, name: str) -> str:
    module, _, last = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{form.tensors[module]}.{last}"
    _, index, rest = module.split(".", 2)
    return f"blk.{index}.{form.tensors[rest]}.{last}"
