"""Artifacts of decoders that are no models of the zoo."""

from __future__ import annotations

from pathlib import Path

from transom.backends.artifact import DECODE, Manifest, write_manifest
from transom.export.exporter import Progress, exporter
from transom.export.options import Options
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.pipelines import pipeline


def export_toy(
    graph: Graph, target: str, folder: Path, *, context: int, chunk: int, dtype: str = "float32"
) -> Manifest:
    """Run a target's passes over a decode graph and write an artifact of it, without a tokenizer."""
    rewritten, records = pipeline(target, chunk=chunk, scheme=scheme("none")).run(graph)
    folder.mkdir()
    options = Options(target=target, dtype=dtype, context=context, chunk=chunk)
    lowered = exporter(target)(rewritten, folder, options, Progress())
    return write_manifest(
        folder,
        Manifest(
            target=target,
            model={"name": "toy"},
            source={"name": "random", "revision": "seed 0"},
            quantization="none",
            dtype=dtype,
            context=context,
            chunk=chunk,
            vocab_size=int(graph.outputs["logits"].meta["val"].shape[-1]),
            entries={DECODE: lowered.entry},
            details=lowered.details,
            stop_ids=(),
            bos_id=None,
            passes=[record.to_json() for record in records],
            not_done=(),
            libraries={},
        ),
    )
