"""Writes quantised checkpoints: a Hugging Face folder of what the codes mean, and the codes beside it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from transom.backends.folder import ARTIFACT, Kind
from transom.errors import ArtifactError, CheckpointError
from transom.formats.quantized import dequantize, pack
from transom.formats.rounding import Rounded, split_groups
from transom.formats.schemes import QuantSpec
from transom.graphs.graph import Graph
from transom.graphs.weight import Codes, Lattice, Weight
from transom.zoo.checkpoints import safetensors_writer
from transom.zoo.checkpoints.lattice import LATTICE
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.checkpoints.safetensors import read_entries
from transom.zoo.companions import COMPANIONS, write_companions
from transom.zoo.model import Model

REPORT = "training.json"
"""How a checkpoint was trained."""

_WRITTEN = frozenset({LATTICE, REPORT, "config.json", "model.safetensors", "model.safetensors.index.json", *COMPANIONS})
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def _files_of_checkpoint(folder: Path) -> frozenset[str] | None:
    """What `write_quantized` and a training run write; the artifacts of a run are folders in it."""
    try:
        _, metadata = read_entries(folder / LATTICE)
    except (OSError, CheckpointError):
        return None
    if not {"scheme", "specs"} <= metadata.keys():
        return None
    names = set(_WRITTEN)
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name):
            names.add(path.name)
        elif path.is_dir() and not path.is_symlink():
            names |= {f"{path.name}/{name}" for name in ARTIFACT.files(path) or ()}
    return frozenset(names)


CHECKPOINT = Kind(title=f"a checkpoint that transom wrote ({LATTICE})", files=_files_of_checkpoint)


def check_apart(out: Path, model: Model) -> None:
    """Raise `ArtifactError` if a folder to be written is the one that the model is read from."""
    source = Path(model.source)
    if source.exists() and out.exists() and source.samefile(out):
        raise ArtifactError(f"{out} is the model that is read, so it is not replaced: choose another name")


def with_codes(weight: Weight, spec: QuantSpec, rounded: Rounded) -> Weight:
    """A weight that has the numbers of its codes, and carries them.

    Args:
        weight: What was quantised.
        spec: Its spec.
        rounded: Codes of the spec's groups.
    """
    columns = weight.shape[1]
    rounded = split_groups(rounded, spec, columns)
    packed, scales = pack(rounded.codes, spec.number), rounded.scales
    zeros = None if rounded.zero_points is None else pack(rounded.zero_points, spec.number)
    middle = 2 ** (spec.bits - 1)

    def read_codes(start: int, stop: int) -> Codes:
        codes = rounded.codes[start:stop].flatten(1)
        if spec.is_integer and spec.symmetric:
            codes = (codes.to(torch.int16) - middle).to(torch.int8)
        return codes, scales[start:stop], None if rounded.zero_points is None else rounded.zero_points[start:stop]

    def read_rows(start: int, stop: int) -> torch.Tensor:
        part = None if zeros is None else zeros[start:stop]
        return dequantize(packed[start:stop], scales[start:stop], part, spec.number)

    lattice = Lattice(
        name=spec.describe(),
        number=spec.number,
        bits=spec.bits,
        block=spec.stored_block(columns),
        symmetric=spec.symmetric,
        scale_dtype=spec.scale_dtype,
        read_rows=read_codes,
    )
    # What it was before, exactly or in parts, is not what it is now.
    return dataclasses.replace(weight, dtype=torch.float32, read_rows=read_rows, lattice=lattice, exact=None, parts=())


def write_quantized(
    folder: Path,
    model: Model,
    graph: Graph,
    specs: Mapping[str, QuantSpec],
    *,
    quant: str,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `config.json`, `model.safetensors`, `lattice.safetensors`, the tokenizer and how it generates.

    Args:
        folder: Where; it exists.
        model: The model; its weights are those that are not quantised, and the shapes of the others.
        graph: The model after `ConvertQuantized`, without packed projections: its codes are what is written.
        specs: Spec of every weight that is quantised.
        quant: Name of the scheme.
        on_bytes: Called with the number of bytes of codes written each time.
    """
    suffixes = ("codes", "scales", "zero_points")
    parts = {f"{name}.{suffix}" for name in specs for suffix in suffixes}
    safetensors_writer.write(
        {name: weight for name, weight in graph.weights.items() if name in parts},
        folder / LATTICE,
        metadata={"scheme": quant, "specs": json.dumps({name: spec.key for name, spec in specs.items()})},
        on_bytes=on_bytes,
    )
    dequantized = {name: _dequantized(graph, name, model.weights[name], spec) for name, spec in specs.items()}
    write_checkpoint(folder, model.config, {**model.weights, **dequantized}, dtype=None)
    write_companions(model, folder)


def _dequantized(graph: Graph, name: str, weight: Weight, spec: QuantSpec) -> Weight:
    codes, scales = graph.weights[f"{name}.codes"], graph.weights[f"{name}.scales"]
    zeros = graph.weights.get(f"{name}.zero_points")

    def read_rows(start: int, stop: int) -> torch.Tensor:
        part = None if zeros is None else zeros.read_rows(start, stop)
        return dequantize(codes.read_rows(start, stop), scales.read_rows(start, stop), part, spec.number)

    return dataclasses.replace(weight, dtype=torch.float32, read_rows=read_rows, lattice=None, exact=None, parts=())
