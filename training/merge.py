"""Merges checkpoints into one, in blocks of rows: memory is a few blocks, however large and however many the models."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from transom.backends.folder import Kind, new_folder
from transom.errors import MergeError
from transom.graphs.threads import one_thread
from transom.graphs.weight import Weight
from transom.training.averaging import Average, MergedTensor, merge_weights
from transom.training.checkpoint import MODEL_FILES, check_apart, shards_of
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.checkpoints.safetensors import DTYPES
from transom.zoo.companions import write_companions
from transom.zoo.model import Model, load

REPORT = "merge.json"
"""What a checkpoint was merged from, and how."""

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
"""Dtypes that a merge can be written in."""


def _files_of_merge(folder: Path) -> frozenset[str] | None:
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(report, dict) or not {"method", "sources", "angles_degrees"} <= report.keys():
        return None
    return frozenset({REPORT, *MODEL_FILES, *shards_of(folder)})


MERGED = Kind(title=f"a checkpoint that transom merged ({REPORT})", files=_files_of_merge)


def load_alike(names: Sequence[str]) -> list[Model]:
    """Open models that are to be merged, with their encoders of images; the tokenizer stays with the first alone.

    A tokenizer takes more memory than all that is read of the weights at a time.

    Raises:
        MergeError: If two are the same, or one differs from the first; see `check_alike`.
        TransomError: As `load` does.
    """
    places: dict[str, str] = {}
    for name in names:
        place = os.path.realpath(name) if os.path.exists(name) else name
        if place in places:
            raise MergeError(f"{name} is named twice: give every model once, and its share by --shares")
        places[place] = name
    models: list[Model] = []
    for name in names:
        model = load(name, images=True)
        if models:
            check_alike(models[0], model)
            model = dataclasses.replace(model, tokenizer=None)
        _refuse_codes(model)
        models.append(model)
    return models


def check_alike(first: Model, other: Model) -> None:
    """Raise `MergeError` if two models have not the same configuration, tensors and vocabulary, naming a difference."""
    titles = f"{first.source} and {other.source} cannot be merged"
    advice = "merge models that were trained from one start"
    if difference := _difference(first.config, other.config):
        raise MergeError(f"{titles}: {difference}: {advice}")
    for name in dict.fromkeys([*first.weights, *other.weights]):
        left, right = (model.weights[name].shape if name in model.weights else None for model in (first, other))
        if left != right:
            raise MergeError(f"{titles}: {name} is {_shape(left)} here and {_shape(right)} there: {advice}")
    if first.tokenizer is None or other.tokenizer is None:
        return
    ours, theirs = first.tokenizer.vocabulary, other.tokenizer.vocabulary
    if ours != theirs:
        differing = (piece for piece in {**ours, **theirs} if ours.get(piece) != theirs.get(piece))
        piece = min(differing, key=lambda piece: min(ours.get(piece, math.inf), theirs.get(piece, math.inf)))
        left_id, right_id = (vocabulary.get(piece, "no token") for vocabulary in (ours, theirs))
        raise MergeError(f"{titles}: the token {piece!r} is {left_id} here and {right_id} there: {advice}")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _difference(left: Any, right: Any, path: str = "") -> str:
    """The first field in which two configurations differ, in words; "" if they are equal but for the name."""
    if type(left) is not type(right) or not dataclasses.is_dataclass(left):
        return "" if left == right else f"{path or 'the family'} is {_brief(left)} here and {_brief(right)} there"
    fields = (field.name for field in dataclasses.fields(left) if path or field.name != "name")
    inner = (_difference(getattr(left, name), getattr(right, name), f"{path}.{name}".lstrip(".")) for name in fields)
    return next(filter(None, inner), "")


def _brief(value: Any) -> str:
    return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)


def _refuse_codes(model: Model) -> None:
    """Raise `MergeError` for a model that holds codes: sums of numbers on a grid leave the grid."""
    coded = next((name for name, weight in model.weights.items() if weight.encoded is not None), None)
    if coded is not None:
        encoded = model.weights[coded].encoded
        assert encoded is not None
        raise MergeError(
            f"{model.source}: {coded} is quantised ({encoded.name}), and codes with scales of their own do not "
            "average: merge the checkpoints in bfloat16 or float32 that it came from, and quantise the result"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """A merged checkpoint.

    Attributes:
        folder: Where it is.
        report: What stands in its `REPORT`.
    """

    folder: Path
    report: dict[str, Any]

    @property
    def median_angle(self) -> float | None:
        """Median angle between task vectors, in degrees; None if the method has none."""
        known = [angle for angles in self.report["angles_degrees"].values() for angle in angles if angle is not None]
        return statistics.median(known) if known else None

    @property
    def straight(self) -> int:
        """How many tensors have a pair of task vectors without an angle, which went along a straight line."""
        return sum(None in angles for angles in self.report["angles_degrees"].values())


def merge_models(
    models: Sequence[Model],
    average: Average,
    *,
    out: Path,
    start: Model | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Merge:
    """Merge models and write a Hugging Face checkpoint, with the tokenizer and companions of the first.

    Every tensor is read in blocks of rows, twice if the average needs angles, and written before the next one is read:
    where a tensor fits the system's cache of files, the second time costs no disk.

    Args:
        models: Of one configuration and vocabulary.
        average: What is done with them.
        out: Folder to write; it appears only when it is whole.
        start: The model that training began at, if the average has one.
        dtype: A key of `DTYPE_NAMES`; by default every tensor has the one that the models have, and the widest if they
            differ.
        overwrite: Whether to replace a folder that an earlier call wrote.
        on_progress: Called with ("merge", bytes read, of how many).

    Raises:
        MergeError: If models differ, or hold codes, or the average does not fit them.
        CheckpointError: If a weight is NaN or infinite; it is named with its rows.
        RangeError: If `dtype` cannot hold a number of the result.
        ArtifactError: If `out` exists, is one of the models, or cannot be written.
    """
    if len(models) != len(average.shares):
        raise MergeError(f"the average is for {len(average.shares)} models, not {len(models)}")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise MergeError(f"no dtype named {dtype!r}: choose one of {', '.join(DTYPE_NAMES)}")
    everyone = [*models, *([] if start is None else [start])]
    for model in everyone:
        check_alike(models[0], model)
        _refuse_codes(model)
        check_apart(out, model)
    total = sum(weight.bytes for model in everyone for weight in model.weights.values()) * (1 + average.has_angles)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress("merge", done, total)

    merged = merge_weights(
        average, [model.weights for model in models], None if start is None else start.weights, on_bytes=on_bytes
    )
    weights = {
        name: tensor.weight(f"the merged {name}").to(DTYPE_NAMES[dtype] if dtype else _dtype(name, models))
        for name, tensor in merged.items()
    }
    with one_thread(), new_folder(out, overwrite=overwrite, kind=MERGED) as folder:
        write_checkpoint(folder, models[0].config, weights, dtype=None)
        write_companions(models[0], folder)
        report = _report(models, average, start, weights, merged)
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return Merge(folder=out, report=report)


def _dtype(name: str, models: Sequence[Model]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (model.weights[name].dtype for model in models))


def _report(
    models: Sequence[Model],
    average: Average,
    start: Model | None,
    weights: dict[str, Weight],
    merged: dict[str, MergedTensor],
) -> dict[str, Any]:
    def identity(model: Model) -> dict[str, Any]:
        return {"source": model.source, "revision": model.revision}

    arcs = {name: tensor.arc for name, tensor in merged.items() if tensor.arc is not None}
    numbers = {key: value for key, value in (("eta", average.eta), ("mu", average.mu)) if value is not None}
    return {
        "method": average.method,
        **numbers,
        "sources": [{**identity(m), "share": share} for m, share in zip(models, average.shares, strict=True)],
        "start": None if start is None else identity(start),
        "dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}),
        "parameters": sum(math.prod(weight.shape) for weight in weights.values()),
        "angles_degrees": {
            name: [None if angle is None else math.degrees(angle) for angle in arc.angles] for name, arc in arcs.items()
        },
        "not_done": list(models[0].left_out),
    }
