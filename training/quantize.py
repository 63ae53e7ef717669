"""Post-training quantisation: a model's checkpoint becomes one that holds codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from transom.backends.folder import new_folder
from transom.errors import QuantizationError
from transom.formats.schemes import is_table, scheme
from transom.graphs.graph import Graph
from transom.passes.base import Pipeline, rewrites
from transom.passes.canonicalize import Canonicalize
from transom.passes.conversion import Conversion
from transom.passes.convert_quantized import Converted, ConvertQuantized, scheme_spec
from transom.passes.fuse_experts import FuseExperts
from transom.passes.share_embedding import ShareEmbedding
from transom.training.calibrate import calibrate
from transom.training.checkpoint import CHECKPOINT, check_apart, write_quantized
from transom.training.text import read_sequences
from transom.zoo.model import Model

PtqMethod = Literal["nearest", "mse", "gptq"]
METHODS: dict[str, str] = {
    "nearest": "every number to the nearest on its grid; codes of the checkpoint are kept where the grid can hold them",
    "mse": "as nearest, with the scale of every block that makes the squared error least",
    "gptq": "column by column, errors made up for on the text of --calibrate",
}

SEQUENCE = 512
"""Tokens of a calibration sequence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantised checkpoint.

    Attributes:
        folder: Where it is.
        quant: Name of its scheme.
        conversions: What became of every weight.
    """

    folder: Path
    quant: str
    conversions: tuple[Conversion, ...]


def quantize_model(
    model: Model,
    *,
    quant: str,
    out: Path,
    method: PtqMethod = "nearest",
    text: Path | None = None,
    samples: int = 16,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Quantized:
    """Quantise a model's weights and write them as a checkpoint that every target takes without rounding again.

    Args:
        model: What to quantise.
        quant: Name of a scheme.
        out: Folder to write; it appears only when it is whole.
        method: A key of `METHODS`.
        text: Text to calibrate on, for "gptq".
        samples: Sequences of `SEQUENCE` tokens of it that are used, at most.
        overwrite: Whether to replace a folder that an earlier call wrote.
        on_progress: Called with (stage, done, total).

    Raises:
        QuantizationError: If the scheme or method is unknown, the method lacks a text, or a weight cannot be held.
        TokenizerError: If the text cannot be read.
        ArtifactError: If `out` exists or cannot be written.
    """
    quant_scheme = scheme(quant)
    if method not in METHODS:
        raise QuantizationError(f"no method named {method!r}: choose one of {', '.join(METHODS)}")
    if not quant_scheme.specs:
        raise QuantizationError(f"the scheme {quant!r} quantises nothing: choose another one")
    if method == "gptq" and text is None:
        raise QuantizationError("gptq needs a text to calibrate on: give --calibrate FILE")
    check_apart(out, model)
    with new_folder(out, overwrite=overwrite, kind=CHECKPOINT) as folder:
        sequences = None
        if method == "gptq" and text is not None:
            sequences = read_sequences(model, text, min(SEQUENCE, model.config.context))[:samples]
        graph = score_graph(model)
        calibrated: dict[str, Conversion] = {}
        if sequences is not None:
            linears = {}
            for name, weight in graph.weights.items():
                if not is_table(name) and (spec := scheme_spec(quant_scheme, name, weight)):
                    linears[name] = spec
            rounded, calibrated = calibrate(
                graph, linears, sequences, on_progress=lambda done, total: on_progress("calibrate", done, total)
            )
            graph.weights.update(rounded)
        converted = write_converted(graph, model, folder, quant=quant, method=method, on_progress=on_progress)
    conversions = tuple(calibrated.get(record.weight, record) for record in converted)
    return Quantized(folder=out, quant=quant, conversions=conversions)


def score_graph(model: Model) -> Graph:
    """A model's `score` graph before any fusion, its table shared by embedding and head."""
    graph, _ = Pipeline([Canonicalize(), ShareEmbedding()]).run(model.trace(task="score"))
    return graph


def write_converted(
    graph: Graph,
    model: Model,
    folder: Path,
    *,
    quant: str,
    method: str = "nearest",
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[Conversion, ...]:
    """Convert a `score` graph's weights and write the checkpoint; weights that carry codes keep them.

    Returns:
        What became of every weight.
    """
    convert = ConvertQuantized(scheme(quant), "mse" if method == "mse" else "nearest")
    converted, records = Pipeline([FuseExperts(), convert]).run(graph)
    (result,) = rewrites(records, Converted)
    total, written = sum(weight.bytes for name, weight in converted.weights.items() if name.endswith("codes")), 0

    def on_bytes(count: int) -> None:
        nonlocal written
        written += count
        on_progress("write", min(written, total), total)

    others = {name: graph.weights.get(name, weight) for name, weight in model.weights.items()}
    write_quantized(
        folder,
        dataclasses.replace(model, weights=others),
        converted,
        result.specs,
        quant=quant,
        on_bytes=on_bytes,
    )
    return result.conversions
