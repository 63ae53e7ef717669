"""Writes quantised checkpoints: a Hugging Face folder of what the codes mean, and the codes beside it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from transom.backends.folder import ARTIFACT, Kind
from transom.errors import ArtifactError, CheckpointError
from transom.formats.rounding import Rounded, split_groups
from transom.formats.schemes import QuantSpec
from transom.graphs.encoded import Codes, Encoded, codes_of
from transom.graphs.graph import Graph
from transom.graphs.weight import Weight
from transom.training.state import METRICS
from transom.zoo.checkpoints import safetensors_writer
from transom.zoo.checkpoints.codes import CODES_FILE
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.checkpoints.safetensors import read_entries
from transom.zoo.companions import COMPANIONS, write_companions
from transom.zoo.model import Model

REPORT = "training.json"
"""How a checkpoint was trained."""

RECIPE = "recipe.toml"
"""Every number of a run that `transom align` made, as it reads them."""

MODEL_FILES = frozenset({"config.json", "model.safetensors", "model.safetensors.index.json", *COMPANIONS})
"""What `write_checkpoint` and `write_companions` may write, beside shards."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def shards_of(folder: Path) -> set[str]:
    """Names of the files in a folder that are called as shards of a model are."""
    return {path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)}


def checkpoint_files(folder: Path) -> set[str]:
    """Names of what a checkpoint in a folder may consist of, and of what tells how it was trained."""
    return {CODES_FILE, REPORT, RECIPE, METRICS, *MODEL_FILES, *shards_of(folder)}


def _files_of_checkpoint(folder: Path) -> frozenset[str] | None:
    """What `write_quantized` and a training run write; the artifacts of a run are folders in it."""
    try:
        _, metadata = read_entries(folder / CODES_FILE)
    except (OSError, CheckpointError):
        return None
    if not {"scheme", "specs"} <= metadata.keys():
        return None
    names = checkpoint_files(folder)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            names |= {f"{path.name}/{name}" for name in ARTIFACT.files(path) or ()}
    return frozenset(names)


def _files_of_trained(folder: Path) -> frozenset[str] | None:
    """What `write_trained` writes."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(report, dict) or not {"settings", "source"} <= report.keys():
        return None
    return frozenset(checkpoint_files(folder))


TRAINED = Kind(title=f"a checkpoint that transom trained ({REPORT})", files=_files_of_trained)

CHECKPOINT = Kind(title=f"a checkpoint that transom wrote ({CODES_FILE})", files=_files_of_checkpoint)


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
    codes, scales, zeros = codes_of(split_groups(rounded, spec, weight.shape[1]), spec)

    def read_codes(start: int, stop: int) -> Codes:
        return codes[start:stop], scales[start:stop], None if zeros is None else zeros[start:stop]

    return _decoded(weight, Encoded.of(spec, weight.shape, read_codes), carries=True)


def _decoded(weight: Weight, encoded: Encoded, *, carries: bool) -> Weight:
    """A weight with the numbers of codes; what it was before, in another dtype, is not what it is now."""

    def read_rows(start: int, stop: int) -> torch.Tensor:
        return encoded.decode(encoded.read_rows(start, stop))

    return dataclasses.replace(
        weight, dtype=torch.float32, read_rows=read_rows, encoded=encoded if carries else None, exact=None
    )


def write_quantized(
    folder: Path,
    model: Model,
    graph: Graph,
    specs: Mapping[str, QuantSpec],
    *,
    quant: str,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `config.json`, `model.safetensors`, `codes.safetensors`, the tokenizer and how it generates.

    Args:
        folder: Where; it exists.
        model: The model; its weights are those that are not quantised, and the shapes of the others.
        graph: The model after `ConvertQuantized`, without packed projections: its codes are what is written.
        specs: Spec of every weight that is quantised.
        quant: Name of the scheme.
        on_bytes: Called with the number of bytes of codes written each time.
    """
    suffixes = ("codes", "scales", "zero_points", "offsets")
    parts = {f"{name}.{suffix}" for name in specs for suffix in suffixes}
    safetensors_writer.write(
        {name: weight for name, weight in graph.weights.items() if name in parts},
        folder / CODES_FILE,
        metadata={"scheme": quant, "specs": json.dumps({name: spec.key for name, spec in specs.items()})},
        on_bytes=on_bytes,
    )
    dequantized = {}
    for name in specs:
        encoded = graph.weights[f"{name}.codes"].part_of
        assert encoded is not None, f"{name} was not encoded"
        dequantized[name] = _decoded(model.weights[name], encoded, carries=False)
    write_checkpoint(folder, model.config, {**model.weights, **dequantized}, dtype=None)
    write_companions(model, folder)


def write_trained(folder: Path, model: Model, report: Mapping[str, Any], *, dtype: torch.dtype) -> None:
    """Write a trained model that is not quantised: a Hugging Face folder and `training.json`.

    Args:
        folder: Where; it exists.
        model: With the weights that were trained.
        report: How it was trained: `settings`, `source` and more.
        dtype: Of the weights.
    """
    write_checkpoint(folder, model.config, model.weights, dtype=dtype)
    write_companions(model, folder)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
