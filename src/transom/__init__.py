"""transom: local:global transformers, traced once, lowered to many runtimes, their numbers proved equal.

    model = transom.load("PRESET, FOLDER OR FILE.gguf")
    artifact = transom.compile(model, target="onnxruntime", quant="int8", out="artifact")
    session = transom.open("artifact")
    print(session.tokenizer.decode(list(session.generate("The capital of France is"))))

Importing this package imports no runtime and no torch; each function brings what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transom.backends.session import Session
    from transom.compiler import Artifact
    from transom.export.ranges import Ranges
    from transom.graphs.graph import Graph
    from transom.passes.base import Pass
    from transom.validation.bisection.sources import Source
    from transom.validation.bisection.verdict import Verdict
    from transom.validation.evaluation.result import Evaluation
    from transom.validation.result import Validation
    from transom.zoo.model import Model

__all__ = ["bisect", "compile", "evaluate", "load", "open", "ranges", "trace", "validate"]
__version__ = "0.1.0"


def load(
    name_or_path: str | Path,
    *,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
    images: bool = False,
    mmproj: str | Path | None = None,
    adapter: str | Path | None = None,
    rope_scaling: str | None = None,
) -> Model:
    """Open a model by preset name, Hugging Face folder, .gguf file or hub id; see `transom.zoo.model.load`."""
    from transom.zoo.model import load as load_model

    return load_model(
        name_or_path,
        weights=weights,
        seed=seed,
        images=images,
        mmproj=mmproj,
        adapter=adapter,
        rope_scaling=rope_scaling,
    )


def trace(model: Model, *, task: Literal["decode", "score"] = "decode") -> Graph:
    """A model's graph, which it remembers: clone it before editing it; see `transom.graphs.trace.trace`."""
    return model.trace(task=task)


def compile(
    model: Model,
    *,
    out: str | Path,
    target: str = "onnxruntime",
    quant: str | None = None,
    context: int | None = None,
    chunk: int | None = None,
    dtype: str | None = None,
    topology: str | None = None,
    cpu: str | None = None,
    rope_scaling: str | None = None,
    before: Sequence[Pass] = (),
    traced: Graph | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Artifact:
    """Lower a model to a target and write the artifact.

    `Options.of`, `compile_model` and, for `rope_scaling`, `Model.scaled` explain the arguments.
    """
    from transom.compiler import compile_model
    from transom.export.options import Options

    if rope_scaling is not None:
        model = model.scaled(rope_scaling)
    options = Options.of(
        model, target=target, quant=quant, context=context, chunk=chunk, dtype=dtype, topology=topology, cpu=cpu
    )
    return compile_model(
        model, options, before=before, traced=traced, out=Path(out), overwrite=overwrite, on_progress=on_progress
    )


def open(folder: str | Path, *, threads: int | None = None, verify: bool = True) -> Session:
    """Open an artifact to run it, with its tokenizer if it has one; see `transom.backends.opening.open_session`."""
    from transom.backends.opening import open_session
    from transom.zoo.tokenizer import Tokenizer

    # The tokenizer is read after the session, which checks the hashes of all files first.
    session = open_session(Path(folder), threads=threads, verify=verify)
    if (Path(folder) / "tokenizer.json").is_file():
        session.tokenizer = Tokenizer.from_folder(Path(folder))
    return session


def validate(model_or_dirs: str | Path | Model | Sequence[str | Path | Model], **options: Any) -> Validation:
    """Hold targets or artifacts against the plain module; see `transom.validation.validate.validate_sources`."""
    from transom.validation.validate import validate_sources

    return validate_sources(model_or_dirs, **options)


def bisect(a: Source, b: Source, **options: Any) -> Verdict:
    """Find the first layer and operation where two runs of one model differ; see `transom.validation.bisection`."""
    from transom.validation.bisection.bisect import bisect as find

    return find(a, b, **options)


def evaluate(model_or_dirs: str | Path | Model | Sequence[str | Path | Model], **options: Any) -> Evaluation:
    """Weigh schemes against size and speed; see `transom.validation.evaluation.evaluate.evaluate_sources`."""
    from transom.validation.evaluation.evaluate import evaluate_sources

    return evaluate_sources(model_or_dirs, **options)


def ranges(model: Model, *, text: str | Path | None = None, **options: Any) -> Ranges:
    """How large a model's numbers get on a text; see `transom.validation.ranges.ranges_of`."""
    from transom.validation.ranges import ranges_of

    return ranges_of(model, text=None if text is None else Path(text), **options)
