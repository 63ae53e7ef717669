"""Where two runs of one model part: the first layer and operation whose output differs while its inputs agree.

    verdict = bisect("onnxruntime", "onnx", model=MODEL)
    verdict = bisect("reference", "xla@FuseAttention", model=MODEL)
    verdict = bisect(good_graph, faulty_graph, model=model)          # graphs that AddTaps has run on
    verdict = bisect_stages("xla", model=model)                      # the first pass that changes numbers
    verdict = bisect_stages([..., Fault(), ...], model=model)        # a pipeline of one's own

Both runs go side by side, call by call, and only the sizes of their differences are kept: all values of a large model
would take gigabytes. If they part, they run once more to record the first site that differs and its inputs, and
`divergence` tests known causes on those numbers. `compare` does the same on recordings from any source. A model that
sees images has two entries, which are compared one after the other, each on inputs of its own: a fault of the encoder
is none of the decoder's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transom.backends.artifact import DECODE, Manifest
from transom.backends.session import Session
from transom.errors import ArtifactError, ContextLengthError, TargetError
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.passes.base import Pass
from transom.passes.pipelines import PIPELINES, pipeline
from transom.passes.targets import TARGETS
from transom.validation.bisection.context import Context
from transom.validation.bisection.divergence import Runs, compare, compare_runs, differences, first_divergent
from transom.validation.bisection.recording import Recording, Run, plan_calls, plan_image, record, steps, with_images
from transom.validation.bisection.sources import (
    EAGER,
    Source,
    interpreted,
    manifest_of,
    open_source,
    opened_once,
    rebuilt,
    reference_graph,
    stages_of,
    tapped,
    until,
)
from transom.validation.bisection.verdict import Verdict
from transom.validation.candidates import check_same, model_of
from transom.validation.lengths import SPAN
from transom.validation.tolerances import FLOAT32, TAPS, tolerance
from transom.zoo.model import Model, load
from transom.zoo.prompt import make_prompt

__all__ = ["Context", "Verdict", "bisect", "bisect_stages", "compare"]

SURPLUS = 128
"""Tokens that a chunk has beyond the window, at most: the taps of a large model take a megabyte a token."""

LOWERING = "lowering"
"""The stage of a fault that no pass has brought in."""


def bisect(
    a: Source,
    b: Source,
    *,
    model: Model | str | None = None,
    quant: str = "none",
    length: int | None = None,
    chunk: int | None = None,
    decode: int | None = None,
    share: float | None = None,
    vision: bool = True,
) -> Verdict:
    """Find the first site where two runs of one model differ, in each of its entries.

    Args:
        a: "reference" (the graph as traced), "eager" (the module as written), a target, TARGET@PASS (the graph after
            that pass, interpreted), an artifact's folder, a graph with taps, or an open session with taps.
        b: The other run.
        model: The model, or what `zoo.model.load` takes; by default that of an artifact.
        quant: Quantisation scheme of a run that is not read from a folder; by default that of an artifact.
        length: Tokens of the prompt; by default so many that decoding passes the wrap of a ring of slots.
        chunk: Most tokens in a call; by default more than two windows, or that of an artifact.
        decode: Tokens to decode one by one after the prompt.
        share: Share of a position's largest value up to which values agree; by default what the targets can do.
        vision: Whether a model that sees images, if both runs do, is compared with images; else its text is.

    Returns:
        The verdict of the first entry that differs; those of the other entries stand in its `others`.

    Raises:
        TargetError: If a target or pass is unknown, no model is given, or `quant` is given for folders alone.
        ArtifactError: If a folder is no artifact, folders hold different models, or the runs cannot be compared.
        ConfigError: If a folder is not of the model that is given, or its own is not found.
        ContextLengthError: If the prompt and the decoded tokens do not fit into the context.
    """
    pairs = [(source, manifest_of(source)) for source in (a, b)]
    folders = [(Path(str(source)), manifest) for source, manifest in pairs if manifest is not None]
    quant = _quant(quant, folders)
    bounded: list[Manifest | Session] = [manifest for _, manifest in folders]
    bounded += [source for source in (a, b) if isinstance(source, Session)]
    sees = vision and all(manifest.images is not None for _, manifest in folders)
    graphs = [source.task for source in (a, b) if isinstance(source, Graph)]
    plans = _plans(_model(model, folders, vision=sees), quant, bounded, length, chunk, decode, graphs)
    allowed = max(_share(source, manifest, quant) for source, manifest in pairs) if share is None else share
    verdicts = []
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(plans[0].open_once(source)) for source in (a, b)]
        for plan in plans:
            context = dataclasses.replace(plan.context, tolerance=allowed)
            first, second = map(plan.open, opened)
            verdict = plan.bisect(first, second, context)
            if verdict.diverged and any(_is_bare(manifest, plan.entry) for _, manifest in pairs):
                verdict = _with_taps(verdict, pairs, plan, context)
            if verdict.diverged and verdict.side is not None:
                blamed, other = (a, second) if verdict.side == "a" else (b, first)
                verdict = _traced(verdict, blamed, other, plan, context, TAPS if share is None else share)
            verdicts.append(verdict)
    return _joined(verdicts)


def bisect_stages(
    target: str | Sequence[Pass],
    *,
    model: Model | str,
    quant: str = "none",
    length: int | None = None,
    chunk: int | None = None,
    decode: int | None = None,
    share: float | None = None,
    vision: bool = True,
) -> Verdict:
    """Find the first pass of a pipeline, that of a target or one's own, that changes numbers, and where.

    Every stage is interpreted and compared with the graph as traced; from the pass on that quantises, with the numbers
    that the codes mean. The other arguments are those of `bisect`; passes of one's own must be built for that chunk.

    Raises:
        TargetError: If the target is unknown, or no pass changes anything.
    """
    plans = _plans(_model(model, [], vision=vision), quant, [], length, chunk, decode)
    chunk = plans[0].chunk
    passes = pipeline(target, chunk=chunk, scheme=scheme(quant)).passes if isinstance(target, str) else target
    verdicts = []
    for plan in plans:
        verdict = None
        for name, graph in stages_of(passes, plan.context.graph):
            verdict = plan.bisect(*plan.stage(graph, TAPS if share is None else share))
            if verdict.diverged:
                verdict = dataclasses.replace(verdict, stage=name)
                break
        verdicts += [] if verdict is None else [verdict]
    if not verdicts:
        raise TargetError("no pass of the list changes anything: there is nothing to compare")
    return _joined(verdicts)


def _joined(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of several entries, in the order of execution: the first that diverged."""
    first, *others = sorted(verdicts, key=lambda verdict: not verdict.diverged)
    return dataclasses.replace(first, others=tuple(others))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is run of an entry, and on what; `total` is how many tokens any entry is given at most."""

    model: Model
    chunk: int
    total: int
    calls: tuple[range, ...]
    context: Context

    @functools.cached_property
    def right(self) -> Graph:
        """The graph as traced, with the numbers that the codes of the scheme mean."""
        return reference_graph(self.context.graph, self.context.quant)

    @property
    def entry(self) -> str:
        return self.context.graph.task

    def open_once(self, source: Source) -> contextlib.AbstractContextManager[Source]:
        return opened_once(source, self.model, quant=self.context.quant, context=self.total, chunk=self.chunk)

    def open(self, source: Source) -> Run:
        quant = self.context.quant
        return open_source(source, self.model, self.entry, quant=quant, context=self.total, chunk=self.chunk)

    def interpret(self, graph: Graph) -> Run:
        return interpreted(graph, context=self.total, chunk=self.chunk)

    def stage(self, graph: Graph, share: float) -> tuple[Run, Run, Context]:
        """What a stage should give, what it gives, and in which scheme: codes may not stand in it yet."""
        is_exact = not graph.calls(ops.LINEAR_QUANTIZED, ops.EMBEDDING_QUANTIZED)
        right = self.context.graph if is_exact else self.right
        context = dataclasses.replace(self.context, tolerance=share, quant="none" if is_exact else self.context.quant)
        return self.interpret(right), self.interpret(graph), context

    def bisect(self, a: Run, b: Run, context: Context) -> Verdict:
        def recordings(taps: set[str]) -> tuple[Recording, Recording]:
            return record(a, self.calls, context, taps), record(b, self.calls, context, taps)

        return compare_runs(self._runs(a, b, context), context, recordings)

    def agree(self, a: Run, b: Run, context: Context) -> bool:
        return first_divergent(differences(self._runs(a, b, context)), context.tolerance) is None

    def _runs(self, a: Run, b: Run, context: Context) -> Runs:
        return zip(steps(a, self.calls, context), steps(b, self.calls, context), strict=True)


def _quant(quant: str, folders: Sequence[tuple[Path, Manifest]]) -> str:
    """The scheme of the runs: that of the folders, which hold one model in one scheme."""
    if not folders:
        return quant
    folder, manifest = folders[0]
    for other_folder, other in folders[1:]:
        ours, theirs = (
            {**each.model, "revision": each.source["revision"], "quantization": each.quantization}
            for each in (manifest, other)
        )
        differing = sorted(key for key in ours | theirs if key != "name" and ours.get(key) != theirs.get(key))
        if differing:
            raise ArtifactError(
                f"{folder} and {other_folder} hold different models ({', '.join(differing)} differ): compare artifacts "
                "of one model and one quantisation"
            )
        if quant != "none":
            raise TargetError(f"--quant {quant} has no effect on folders, which are made already: leave it out")
    if quant not in ("none", manifest.quantization):
        raise ArtifactError(
            f"{folder} holds the quantisation {manifest.quantization!r}, not {quant!r}: leave --quant out, or export "
            "the model again"
        )
    return manifest.quantization


def _model(model: Model | str | None, folders: Sequence[tuple[Path, Manifest]], *, vision: bool) -> Model:
    """The one model of all that is compared; without `vision` its text decoder."""
    if model is not None:
        loaded = model if isinstance(model, Model) else load(model, images=vision)
    elif folders:
        loaded = model_of(folders[0][1], folders[0][0])
    else:
        raise TargetError("targets alone do not say what to run: name a model (--model)")
    for folder, manifest in folders:
        check_same(loaded, manifest, folder)
    return loaded if vision else loaded.text()


def _plans(
    model: Model,
    quant: str,
    bounded: Sequence[Manifest | Session],
    length: int | None,
    chunk: int | None,
    decode: int | None,
    entries: Sequence[str] = (),
) -> list[_Plan]:
    """A plan an entry, in the order of execution, or those of some `entries`.

    Calls fit into the smallest chunk and context of what is there already.
    """
    window, images = model.config.longest_window or SPAN, model.config.images
    least = images.soft_tokens if images else 0
    wanted = max(min(2 * window, window + SURPLUS), least) + 5 if chunk is None else chunk
    chunk = min([wanted, model.config.context, *(each.chunk for each in bounded)])
    calls = plan_calls(window=window, chunk=chunk, length=length, decode=decode)
    total = calls[-1].stop
    if total > (room := min([model.config.context, *(each.context for each in bounded)])):
        raise ContextLengthError(f"{total} tokens do not fit into a context of {room}: give a shorter --length")
    if chunk < least:
        raise ContextLengthError(
            f"calls of {chunk} tokens do not hold the {least} of an image: give --chunk {least} or more, or --no-vision"
        )
    ids = make_prompt(model, total, None).ids[:total]
    tokens = with_images(ids, calls, images, model.config.hidden_size) if images else ids
    plans = []
    for entry in (*model.config.encoders, DECODE):
        if entries and entry not in entries:
            continue
        graph, pixels = tapped(model.trace(task=entry)), None
        if entry != DECODE:
            shape = graph.inputs["pixels"].meta["val"].shape
            pixels = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        context = Context(graph=graph, tokens=tokens if pixels is None else (), pixels=pixels, quant=quant)
        own = calls if pixels is None else plan_image(graph)
        plans.append(_Plan(model=model, chunk=chunk, total=total, calls=own, context=context))
    return plans


def _share(source: Source, manifest: Manifest | None, quant: str) -> float:
    """Up to which share a source's values agree with exact ones."""
    if manifest is not None:
        allowed = tolerance(manifest.target, dtype=manifest.dtype, quant=manifest.quantization)
    elif isinstance(source, str) and source in PIPELINES:
        allowed = tolerance(source, dtype=TARGETS[source].dtypes[0], quant=quant)
    else:
        return TAPS
    return TAPS if allowed is FLOAT32 else allowed.relative


def _is_bare(manifest: Manifest | None, entry: str) -> bool:
    """Whether it is an artifact that was exported without taps."""
    return manifest is not None and not manifest.entries[entry].taps


def _with_taps(
    verdict: Verdict, pairs: Sequence[tuple[Source, Manifest | None]], plan: _Plan, context: Context
) -> Verdict:
    """Results of artifacts without taps differ: look into them by making them again with taps."""
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(
                rebuilt(manifest, plan.model) if manifest and _is_bare(manifest, plan.entry) else plan.open_once(source)
            )
            for source, manifest in pairs
        )
        again = plan.bisect(plan.open(first), plan.open(second), context)
    if again.diverged:
        return again
    cause = (
        f"the {context.result_words} differ, but not those of the same artifacts made again with taps: a folder holds "
        "something else than this version exports; export it again with --taps"
    )
    return dataclasses.replace(verdict, op=context.result_words, layer=None, cause=cause, side=None)


def _traced(verdict: Verdict, blamed: Source, other: Run, plan: _Plan, context: Context, share: float) -> Verdict:
    """A verdict with the pass that brought the fault in."""
    if blamed == EAGER:
        # Causes are tested on the graph as traced, but it is the module that says what the model is.
        cause = f"the graph as traced is not what the module computes; if it were right, {verdict.cause}"
        return dataclasses.replace(verdict, side="b" if verdict.side == "a" else "a", cause=cause)
    # What is interpreted in float32 agrees as closely as taps do, however far a runtime may be off.
    return dataclasses.replace(verdict, stage=_stage(blamed, other, plan, context, share))


def _stage(blamed: Source, other: Run, plan: _Plan, context: Context, share: float) -> str | None:
    """The first pass after which a target's graph, interpreted, no longer says what the model means.

    The graph as traced is compared with the other run first: if it differs, no pass can be told to be at fault.
    """
    if not isinstance(blamed, str) or blamed.partition("@")[0] not in PIPELINES:
        return None
    target, _, last = blamed.partition("@")
    if not plan.agree(other, plan.interpret(plan.right), context):
        return None
    passes = pipeline(target, chunk=plan.chunk, scheme=scheme(context.quant)).passes
    stages = stages_of(until(passes, last, target) if last else passes, context.graph)
    if not stages or plan.agree(*plan.stage(stages[-1][1], share)):
        # A stage is never lowered: what is wrong with one has been brought in by a pass.
        return None if last else LOWERING
    return next(name for name, graph in stages if not plan.agree(*plan.stage(graph, share)))
