"""The list of passes of every target, to be read from top to bottom."""

from __future__ import annotations

from transom.errors import TargetError
from transom.formats.schemes import Scheme
from transom.passes.base import Pass, Pipeline
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.fold_constants import FoldConstants
from transom.passes.fuse_add_norms import FuseAddNorms
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.passes.fuse_cached_attention import FuseCachedAttention
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.fuse_norms import FuseNorms
from transom.passes.fuse_rotary import FuseRotary
from transom.passes.pack_projections import PackProjections
from transom.passes.select_logits import SelectLogits
from transom.passes.share_embedding import ShareEmbedding


def _onnxruntime(chunk: int, scheme: Scheme) -> list[Pass]:
    return [
        Canonicalize(),
        ShareEmbedding(),
        FuseAttention(),
        FuseCacheWrites(),
        FuseNorms(),
        FuseRotary(),
        SelectLogits(),
        BoundLocalCaches(chunk),
        FoldConstants(),
        ConvertQuantized(scheme),
        FuseGatedMLP(),
        PackProjections(),
        FuseCachedAttention(),
        FuseAddNorms(),
    ]


def _onnx(chunk: int, scheme: Scheme) -> list[Pass]:
    return [
        Canonicalize(),
        ShareEmbedding(),
        FuseAttention(),
        FuseCacheWrites(),
        FuseNorms(),
        FuseRotary(),
        SelectLogits(),
        BoundLocalCaches(chunk),
        FoldConstants(),
        ConvertQuantized(scheme),
        FuseGatedMLP(),
        PackProjections(),
    ]


def _xla(chunk: int, scheme: Scheme) -> list[Pass]:
    return [
        Canonicalize(),
        ShareEmbedding(),
        FuseAttention(),
        FuseCacheWrites(),
        FuseNorms(),
        FuseRotary(),
        SelectLogits(),
        # Fused first: then a window of slots is enough for chunks of any length.
        FuseCachedAttention(),
        BoundLocalCaches(chunk),
        FoldConstants(),
        ConvertQuantized(scheme),
    ]


def _tvm(chunk: int, scheme: Scheme) -> list[Pass]:
    return [
        Canonicalize(),
        ShareEmbedding(),
        FuseAttention(),
        FuseCacheWrites(),
        FuseNorms(),
        FuseRotary(),
        SelectLogits(),
        # Fused first: then a window of slots is enough for chunks of any length.
        FuseCachedAttention(),
        BoundLocalCaches(chunk),
        FoldConstants(),
        ConvertQuantized(scheme),
        FuseGatedMLP(),
        PackProjections(),
        FuseAddNorms(),
    ]


PIPELINES = {"onnxruntime": _onnxruntime, "onnx": _onnx, "xla": _xla, "tvm": _tvm, "tensorrt": _onnx}


def pipeline(target: str, *, chunk: int, scheme: Scheme) -> Pipeline:
    """The passes of a target.

    Args:
        target: A key of `PIPELINES`.
        chunk: Largest number of new tokens in one call.
        scheme: How to quantise weights.

    Raises:
        TargetError: If the target is unknown.
    """
    if target not in PIPELINES:
        raise TargetError(f"no target named {target!r}: choose one of {', '.join(PIPELINES)}")
    return Pipeline(PIPELINES[target](chunk, scheme))
