"""The list of passes of every target, to be read from top to bottom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from transom.errors import TargetError
from transom.formats.schemes import Scheme
from transom.passes.attend_before_writes import AttendBeforeWrites
from transom.passes.base import Measurement, Pass, Pipeline
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.fold_constants import FoldConstants
from transom.passes.fuse_add_norms import FuseAddNorms
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.passes.fuse_experts import FuseExperts
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.fuse_norms import FuseNorms
from transom.passes.fuse_rotary import FuseRotary
from transom.passes.guard_ranges import GuardRanges
from transom.passes.pack_projections import PackProjections
from transom.passes.quantize_activations import QuantizeActivations
from transom.passes.select_logits import SelectLogits
from transom.passes.share_embedding import ShareEmbedding

Passes = Sequence[Pass | None]
"""Entries that are None are left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """Measurements that passes ask for when a list has reached them; a pass whose measurement is None is left out.

    Attributes:
        ranges: What `GuardRanges` asks for.
        scales: What `QuantizeActivations` asks for.
    """

    ranges: Measurement | None = None
    scales: Measurement | None = None


def _onnxruntime(chunk: int, scheme: Scheme, measure: Measure) -> Passes:
    return [
        *_recognise(measure),
        SelectLogits(),
        BoundLocalCaches(chunk),
        FoldConstants(),
        ConvertQuantized(scheme),
        FuseGatedMLP(),
        PackProjections(),
        AttendBeforeWrites(at_once=True),
        FuseAddNorms(),
        _round_activations(scheme, measure),
    ]


def _onnx(chunk: int, scheme: Scheme, measure: Measure) -> Passes:
    return [
        *_recognise(measure),
        SelectLogits(),
        BoundLocalCaches(chunk),
        FoldConstants(),
        ConvertQuantized(scheme),
        FuseGatedMLP(),
        PackProjections(),
        _round_activations(scheme, measure),
    ]


def _xla(chunk: int, scheme: Scheme, measure: Measure) -> Passes:
    return [
        *_recognise(measure),
        SelectLogits(),
        # First: then a window of slots is enough for chunks of any length.
        AttendBeforeWrites(),
        BoundLocalCaches(chunk),
        FoldConstants(),
        ConvertQuantized(scheme),
        _round_activations(scheme, measure),
    ]


def _tvm(chunk: int, scheme: Scheme, measure: Measure) -> Passes:
    return [
        *_recognise(measure),
        SelectLogits(),
        # First: then a window of slots is enough for chunks of any length.
        AttendBeforeWrites(),
        BoundLocalCaches(chunk),
        FoldConstants(),
        ConvertQuantized(scheme),
        FuseGatedMLP(),
        PackProjections(),
        FuseAddNorms(),
    ]


def _tensorrt(chunk: int, scheme: Scheme, measure: Measure) -> Passes:
    return [
        *_recognise(measure),
        SelectLogits(),
        BoundLocalCaches(chunk, whole_calls=True),
        FoldConstants(),
        ConvertQuantized(scheme),
        FuseGatedMLP(),
        PackProjections(),
        _round_activations(scheme, measure),
    ]


def _recognise(measure: Measure) -> Passes:
    """What every list begins with: the numbers made safe, then the model's plain tensor code called by its names."""
    return [
        GuardRanges(measure.ranges) if measure.ranges else None,
        Canonicalize(),
        ShareEmbedding(),
        FuseAttention(),
        FuseCacheWrites(),
        FuseNorms(),
        FuseRotary(),
        FuseExperts(),
    ]


def _round_activations(scheme: Scheme, measure: Measure) -> Pass | None:
    return QuantizeActivations(measure.scales, scheme.activations) if measure.scales and scheme.activations else None


PIPELINES: dict[str, Callable[[int, Scheme, Measure], Passes]] = {
    "onnxruntime": _onnxruntime,
    "onnx": _onnx,
    "xla": _xla,
    "tvm": _tvm,
    "tensorrt": _tensorrt,
}


def pipeline(target: str, *, chunk: int, scheme: Scheme, measure: Measure | None = None) -> Pipeline:
    """The passes of a target.

    Args:
        target: A key of `PIPELINES`.
        chunk: Largest number of new tokens in one call.
        scheme: How to quantise weights, and what to round activations to.
        measure: What passes ask for; without it, those that need a measurement are left out.

    Raises:
        TargetError: If the target is unknown.
    """
    if target not in PIPELINES:
        raise TargetError(f"no target named {target!r}: choose one of {', '.join(PIPELINES)}")
    listed = PIPELINES[target](chunk, scheme, measure or Measure())
    return Pipeline([entry for entry in listed if entry is not None])


def live_pipeline(chunk: int) -> Pipeline:
    """Passes for the dialect of `onnxruntime` where weights go on changing.

    No matrix is stacked or converted, so that none has to be copied before a call.
    """
    listed = [
        *_recognise(Measure()),
        SelectLogits(),
        BoundLocalCaches(chunk),
        FoldConstants(),
        AttendBeforeWrites(at_once=True),
        FuseAddNorms(),
    ]
    return Pipeline([entry for entry in listed if entry is not None])
