"""Where two runs of one model part: the first layer and operation whose output differs while its inputs agree.

    verdict = bisect("onnxruntime", "onnx", model=MODEL)
    verdict = bisect("reference", "xla@FuseAttention", model=MODEL)
    verdict = bisect(good_graph, faulty_graph, model=model)          # graphs that AddTaps has run on
    verdict = bisect_stages("xla", model=model)                      # the first pass that changes numbers
    verdict = bisect_stages([..., Fault(), ...], model=model)        # a pipeline of one's own

Both runs go side by side, call by call, and only the sizes of their differences are kept: all values of a large model
would take gigabytes. If they part, they run once more to record the first site that differs and its inputs, and
`divergence` tests known causes on those numbers. `compare` does the same on recordings from any source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from transom.backends.artifact import Manifest
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.errors import ArtifactError, ContextLengthError, TargetError
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.add_taps import AddTaps
from transom.passes.base import Pass, Pipeline
from transom.passes.pipelines import PIPELINES, pipeline
from transom.passes.targets import TARGETS
from transom.validation.bisection.context import Context
from transom.validation.bisection.divergence import agreement, compare, differences, explain, first_divergent
from transom.validation.bisection.recording import Call, plan_calls, record, steps
from transom.validation.bisection.sources import (
    EAGER,
    Source,
    is_quantized,
    manifest_of,
    open_source,
    rebuilt,
    reference_graph,
    stage_graph,
    tapped,
)
from transom.validation.bisection.verdict import Verdict
from transom.validation.inputs import check_same, model_of
from transom.validation.lengths import SPAN
from transom.validation.tolerances import FLOAT32, TAPS, tolerance
from transom.zoo.model import Model, load
from transom.zoo.prompt import make_prompt

__all__ = ["Context", "Verdict", "bisect", "bisect_stages", "compare", "explain"]

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
) -> Verdict:
    """Find the first site where two runs of one model differ.

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

    Raises:
        TargetError: If a target or pass is unknown, no model is given, or `quant` is given for folders alone.
        ArtifactError: If a folder is no artifact, folders hold different models, or the runs cannot be compared.
        ConfigError: If a folder is not of the model that is given, or its own is not found.
        ContextLengthError: If the prompt and the decoded tokens do not fit into the context.
    """
    manifests = [manifest_of(source) for source in (a, b)]
    folders = [
        (Path(source), manifest)
        for source, manifest in zip((a, b), manifests, strict=True)
        if manifest is not None and isinstance(source, (str, Path))
    ]
    quant = _quant(quant, folders)
    loaded = _model(model, folders)
    bounded: list[Manifest | Session] = [manifest for _, manifest in folders]
    bounded += [source for source in (a, b) if isinstance(source, Session)]
    plan = _plan(loaded, quant, bounded, length, chunk, decode)
    shares = [_share(source, manifest, quant) for source, manifest in zip((a, b), manifests, strict=True)]
    context = dataclasses.replace(plan.context, tolerance=max(shares) if share is None else share)
    bare = [manifest is not None and not manifest.decode.taps for manifest in manifests]
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(plan.open(source)) for source in (a, b))
        verdict = _bisect(first, second, plan.calls, context)
        if verdict.diverged and any(bare):
            verdict = _with_taps(verdict, (a, b), manifests, plan, context)
        if not verdict.diverged or verdict.side is None:
            return verdict
        blamed, other = (a, second) if verdict.side == "a" else (b, first)
        if blamed == EAGER:
            # Causes are tested on the graph as traced, but it is the module that says what the model is.
            cause = f"the graph as traced is not what the module computes; if it were right, {verdict.cause}"
            return dataclasses.replace(verdict, side="b" if verdict.side == "a" else "a", cause=cause)
        # What is interpreted in float32 agrees as closely as taps do, however far a runtime may be off.
        within = TAPS if share is None else share
        return dataclasses.replace(verdict, stage=_stage(blamed, other, plan, context, within))


def bisect_stages(
    target: str | Sequence[Pass],
    *,
    model: Model | str,
    quant: str = "none",
    length: int | None = None,
    chunk: int | None = None,
    decode: int | None = None,
    share: float | None = None,
) -> Verdict:
    """Find the first pass of a pipeline that changes numbers, and where.

    Every stage is interpreted and compared with the graph as traced; from the pass on that quantises, with the numbers
    that the codes mean.

    Args:
        target: A target, or passes of one's own.
        model: The model, or what `zoo.model.load` takes.
        quant: Quantisation scheme.
        length: As for `bisect`.
        chunk: As for `bisect`; passes of one's own must be built for the same chunk.
        decode: As for `bisect`.
        share: As for `bisect`.

    Raises:
        TargetError: If the target is unknown.
    """
    loaded = _model(model, [])
    plan = _plan(loaded, quant, [], length, chunk, decode)
    passes = pipeline(target, chunk=plan.chunk, scheme=scheme(quant)).passes if isinstance(target, str) else target
    context = dataclasses.replace(plan.context, tolerance=TAPS if share is None else share)
    traced, verdict = context.graph, None
    stages: list[tuple[str, Graph]] = []

    def on_pass(ran: Pass, graph: Graph) -> None:
        stages.append((ran.name, graph.clone()))

    _, records = Pipeline([ran for ran in passes if not isinstance(ran, AddTaps)]).run(traced, on_pass=on_pass)
    for (name, graph), done in zip(stages, records, strict=True):
        if not done.changes:
            continue
        means = quant if is_quantized(graph) else "none"
        right, quantized_context = reference_graph(traced, means), dataclasses.replace(context, quant=means)
        verdict = _bisect(plan.interpret(right), plan.interpret(graph), plan.calls, quantized_context)
        if verdict.diverged:
            return dataclasses.replace(verdict, stage=name)
    if verdict is None:
        raise TargetError("no pass of the list changes anything: there is nothing to compare")
    return verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is run."""

    model: Model
    chunk: int
    calls: tuple[Call, ...]
    context: Context

    @property
    def total(self) -> int:
        return self.calls[-1].start + self.calls[-1].count

    def open(self, source: Source) -> contextlib.AbstractContextManager[Session]:
        quant = self.context.quant
        return open_source(source, self.model, quant=quant, context=self.total, chunk=self.chunk)

    def interpret(self, graph: Graph) -> Session:
        return ReferenceSession(graph, context=self.total, chunk=self.chunk)


def _quant(quant: str, folders: Sequence[tuple[Path, Manifest]]) -> str:
    """The scheme of the runs: that of the folders, which hold one model in one scheme."""
    if not folders:
        return quant
    folder, manifest = folders[0]
    for other_folder, other in folders[1:]:
        ours, theirs = ({**each.model, "revision": each.source["revision"]} for each in (manifest, other))
        ours["quantization"], theirs["quantization"] = manifest.quantization, other.quantization
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


def _model(model: Model | str | None, folders: Sequence[tuple[Path, Manifest]]) -> Model:
    """The one model of all that is compared."""
    if model is not None:
        loaded = model if isinstance(model, Model) else load(model)
    elif folders:
        loaded = model_of(folders[0][1], folders[0][0])
    else:
        raise TargetError("targets alone do not say what to run: name a model (--model)")
    for folder, manifest in folders:
        check_same(loaded, manifest, folder)
    return loaded


def _plan(
    model: Model,
    quant: str,
    bounded: Sequence[Manifest | Session],
    length: int | None,
    chunk: int | None,
    decode: int | None,
) -> _Plan:
    """Fit the calls into the smallest chunk and context of what is there already."""
    window = model.config.longest_window or SPAN
    wanted = min(2 * window, window + SURPLUS) + 5 if chunk is None else chunk
    chunk = min([wanted, model.config.context, *(each.chunk for each in bounded)])
    calls = plan_calls(window=window, chunk=chunk, length=length, decode=decode)
    total = calls[-1].start + calls[-1].count
    if total > (room := min([model.config.context, *(each.context for each in bounded)])):
        raise ContextLengthError(f"{total} tokens do not fit into a context of {room}: give a shorter --length")
    tokens = make_prompt(model, total, None).ids[:total]
    context = Context(graph=tapped(model.trace()), tokens=tokens, quant=quant)
    return _Plan(model=model, chunk=chunk, calls=calls, context=context)


def _share(source: Source, manifest: Manifest | None, quant: str) -> float:
    """Up to which share a source's values agree with exact ones."""
    if manifest is not None:
        allowed = tolerance(manifest.target, dtype=manifest.dtype, quant=manifest.quantization)
    elif isinstance(source, str) and source in PIPELINES:
        allowed = tolerance(source, dtype=TARGETS[source].dtypes[0], quant=quant)
    else:
        return TAPS
    return TAPS if allowed is FLOAT32 else allowed.relative


def _bisect(a: Session, b: Session, calls: Sequence[Call], context: Context) -> Verdict:
    runs = zip(*(steps(session, calls, context.tokens, context.axes()) for session in (a, b)), strict=True)
    tap_differences = differences(runs)
    first = first_divergent(tap_differences, context.tolerance)
    if first is None:
        return agreement(tap_differences, context.tolerance)
    where = context.site(first.tap)
    names = {where.tap, *where.inputs}
    again_a, again_b = (record(session, calls, context, names) for session in (a, b))
    return dataclasses.replace(explain(where, first, again_a, again_b, context), compared=len(tap_differences))


def _with_taps(
    verdict: Verdict, sources: Sequence[Source], manifests: Sequence[Manifest | None], plan: _Plan, context: Context
) -> Verdict:
    """Logits of artifacts without taps differ: look into them by making them again with taps."""
    with contextlib.ExitStack() as stack:

        def opened(source: Source, manifest: Manifest | None) -> Session:
            is_bare = manifest is not None and not manifest.decode.taps
            return stack.enter_context(rebuilt(manifest, plan.model) if is_bare and manifest else plan.open(source))

        first, second = (opened(source, manifest) for source, manifest in zip(sources, manifests, strict=True))
        again = _bisect(first, second, plan.calls, context)
    if again.diverged:
        return again
    cause = (
        "the logits differ, but not those of the same artifacts made again with taps: a folder holds something else "
        "than this version exports; export it again with --taps"
    )
    return dataclasses.replace(verdict, op="logits", layer=None, cause=cause, side=None)


def _stage(blamed: Source, other: Session, plan: _Plan, context: Context, share: float) -> str | None:
    """The first pass after which a target's graph, interpreted, no longer says what the model means.

    Every stage is compared with the graph as traced, from the pass on that quantises with the numbers that the codes
    mean. That graph is compared with the other run first: if it differs, no pass can be told to be at fault.
    """
    if not isinstance(blamed, str) or blamed.partition("@")[0] not in PIPELINES:
        return None
    target, _, last = blamed.partition("@")
    passes = pipeline(target, chunk=plan.chunk, scheme=scheme(context.quant)).passes
    names = [current.name for current in passes]
    names = names[: names.index(last) + 1] if last else names
    traced = context.graph

    def agree(a: Session, b: Session, within: float) -> bool:
        runs = zip(*(steps(session, plan.calls, context.tokens, context.axes()) for session in (a, b)), strict=True)
        return first_divergent(differences(runs), within) is None

    @functools.cache
    def right(quant: str) -> Session:
        return plan.interpret(reference_graph(traced, quant))

    if not agree(other, right(context.quant), context.tolerance):
        return None
    guilty = None
    for name in reversed(names):
        graph = stage_graph(traced, passes, name, target)
        means = context.quant if is_quantized(graph) else "none"
        if agree(right(means), plan.interpret(graph), share):
            break
        guilty = name
    # A stage is never lowered: what is wrong with one has been brought in by a pass.
    return guilty or (None if last else LOWERING)
