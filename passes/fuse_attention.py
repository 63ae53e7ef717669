"""FuseAttention: scores, mask, softmax and values become one `transom.attention`, or `transom.full_attention`.

Precondition: `Canonicalize` has run.
Rewrite: a softmax over masked scores `q @ k.T * scale`, or `scaled_dot_product_attention` with a mask, whose mask is
found *by evaluation* to be causal, a causal window or causal within segments, each dilated or not (`graphs.ops.Mask`);
`until` may open it as far as the end of each token's image.
Repeated kv heads are folded in, and so are a soft cap `cap * tanh(scores / cap)` before the mask, and sinks: see
`passes.sinks`. In a graph without positions, such as an image encoder's, a softmax without a mask is attention over all
keys.
Skips: any other mask, a cap behind the mask, dropout, caps and sinks without a mask: the site stays as it is and is
reported, as is every softmax that is left before a product with values, whatever stands between. A window is never
guessed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.masks import MASKED, MaskReading, read_mask, structure
from transom.graphs.match import CASTS, aten, is_call, is_transpose, layer_path, skip_casts, source_line, split_scalar
from transom.graphs.node import Node, is_node
from transom.passes.base import Pass, Rewrite
from transom.passes.canonicalize import Canonicalize
from transom.passes.left_softmaxes import left_softmaxes
from transom.passes.sinks import split_rescaling, split_sinks, without_maximum

_SDPA = aten.scaled_dot_product_attention.default


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Site:
    out: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    hidden: bool
    """Whether a bool mask is True where a key is hidden."""
    scale: float
    softcap: float = 0.0
    sinks: Node | None = None
    full: bool = False
    """Whether every key is seen."""


class FuseAttention(Pass):
    """Scores, mask, softmax and values become one operation with a window."""

    after = (Canonicalize,)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Fuse every site whose mask could be read."""
        readings: dict[tuple[Any, ...], MaskReading] = {}
        reported: set[Node] = set()
        changes, skipped = 0, list[str]()
        for node in graph.calls_all():
            site = _match(node)
            if isinstance(site, str):
                skipped.append(_where(node, site))
                reported.add(node)
            if not isinstance(site, _Site):
                continue
            if site.full and "start" not in graph.input_names:
                _fuse_full(graph, site)
                changes += 1
                continue
            tokens, slots = site.q.meta["val"].shape[2], site.k.meta["val"].shape[2]
            cached = "start" in graph.input_names and str(tokens) != str(slots)
            # Layers make their masks one by one, of a few kinds: each kind is read once.
            kind = None if site.mask is None else structure(graph, site.mask)
            key = (kind, site.hidden, str(tokens), str(slots), cached)
            if key not in readings:
                readings[key] = _read(graph, site, tokens, slots, cached)
            reading = readings[key]
            if reading.mask is None:
                skipped.append(_where(node, reading.reason))
                reported.add(node)
                continue
            _fuse(graph, site, reading.mask, reading.until, cached)
            if site.out is not node:
                graph.fx.erase_node(node)
            changes += 1
        skipped += [_where(node, reason) for node, reason in left_softmaxes(graph, reported)]
        return Rewrite(changes=changes, skipped=tuple(skipped))


def _where(node: Node, reason: str) -> str:
    return f"{layer_path(node) or node.name}: {reason} [{source_line(node)}]"


def _match(node: Node) -> _Site | str | None:
    """A site, the reason why something like a site is none, or None."""
    if is_call(node, _SDPA):
        return _match_sdpa(node)
    if not is_call(node, aten.matmul.default, aten.bmm.default):
        return None
    kept = _skip_dropout(node.args[0])
    weights = _skip_dropout(kept.args[0]) if is_call(kept, aten.slice.Tensor) else kept
    if not is_call(weights, aten.softmax.int, aten._softmax.default):
        return None
    if weights.args[1] not in (-1, 3):
        return "the softmax is not over the keys"
    masked, sinks = skip_casts(without_maximum(skip_casts(weights.args[0]))), None
    if kept is not weights or is_call(masked, aten.cat.default):
        split = split_sinks(masked, kept)
        if split is None:
            return "what is added to the scores or cut off from the weights is not a column of sinks"
        masked, sinks = split
    parts = _split_mask(masked)
    if isinstance(parts, str):
        return parts
    scores, mask, hidden = parts or (masked, None, False)
    scores, scale = _split_scale(scores)
    softcap = 0.0
    if is_call(scores, aten.tanh.default):
        softcap = abs(scale)
        scores, factor = _split_scale(scores.args[0])
        scale *= factor
    if not is_call(scores, aten.matmul.default):
        if parts is None:
            return "the softmax has no mask that could be recognised"
        return f"the scores come from {getattr(scores, 'target', scores)}, not from a product of queries and keys"
    # The fused operation computes float16's scores in float32 itself.
    q, k_transposed = (_before_widening(side) for side in scores.args)
    if not is_transpose(k_transposed, 2, 3):
        return "the keys are not transposed by a plain transpose of the last two axes"
    k, v = _unrepeat_both(k_transposed.args[0], node.args[1], q)
    if len({side.meta["val"].dtype for side in (q, k, v, node)}) > 1:
        return "queries, keys, values and the result are not of one dtype"
    out = node
    if sinks is None and (rescaled := split_rescaling(node, masked)) is not None:
        out, sinks = rescaled
    full = parts is None
    if full and (softcap or sinks is not None):
        return "attention over all keys has no soft cap and no sinks"
    return _Site(out=out, q=q, k=k, v=v, mask=mask, hidden=hidden, scale=scale, softcap=softcap, sinks=sinks, full=full)


def _skip_dropout(value: Any) -> Any:
    """Walk up through dropout, then through casts."""
    while is_call(value, aten.dropout.default):
        value = value.args[0]
    return skip_casts(value)


def _split_scale(scores: Any) -> tuple[Any, float]:
    """A value less all of its numeric factors and casts, and their product."""
    value, scale = skip_casts(scores), 1.0
    while (scaled := split_scalar(value, aten.mul.Tensor, aten.div.Tensor)) is not None:
        scale *= scaled[1] if value.target is aten.mul.Tensor else 1 / scaled[1]
        value = skip_casts(scaled[0])
    return value, scale


def _before_widening(value: Any) -> Any:
    """Walk up through casts from float16 to float32."""
    while is_call(value, *CASTS) and value.meta["val"].dtype == torch.float32:
        if value.args[0].meta["val"].dtype != torch.float16:
            break
        value = value.args[0]
    return value


def _match_sdpa(node: Node) -> _Site | str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v, mask, scale = (given.get(name) for name in ("query", "key", "value", "attn_mask", "scale"))
    if given.get("dropout_p"):
        return "attention dropout"
    assert q is not None
    if q.meta["val"].dim() != 4:
        return "queries without axes for batch and heads"
    scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    k, v = _unrepeat_both(k, v, q)
    full = mask is None and not given.get("is_causal")
    return _Site(out=node, q=q, k=k, v=v, mask=mask, hidden=False, scale=float(scale), full=full)


def _split_mask(masked: Any) -> tuple[Any, Node, bool] | str | None:
    """(scores, mask, whether a bool mask hides) of masked scores; the reason why not, or None if there is no mask."""
    if is_call(masked, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, mask, fill = masked.args
        return (scores, mask, True) if _hides(fill) else "the fill of hidden scores is not known to hide them"
    if is_call(masked, aten.where.self, aten.where.ScalarOther):
        mask, scores, fill = masked.args
        return (scores, mask, False) if _hides(fill) else "the fill of hidden scores is not known to hide them"
    if is_call(masked, aten.add.Tensor) and all(is_node(side) for side in masked.args[:2]) and not masked.kwargs:
        left, right = masked.args[:2]
        # The mask is the side with one head for all.
        if right.meta["val"].dim() < 4 or right.meta["val"].shape[1] == 1:
            return left, right, False
        return right, left, False
    return None


def _hides(fill: Any) -> bool:
    """Whether a number that takes the place of a score leaves nothing of it after the softmax."""
    if is_call(fill, aten.full.default, aten.scalar_tensor.default, aten.full_like.default):
        fill = fill.args[0 if fill.target is aten.scalar_tensor.default else 1]
    return isinstance(fill, (int, float)) and fill <= MASKED


def _unrepeat_both(k: Node, v: Node, q: Node) -> tuple[Node, Node]:
    """Keys and values without their repetition; both unchanged if only one of them has a recognised repetition."""
    unrepeated = _unrepeat(k, q), _unrepeat(v, q)
    heads = [value.meta["val"].shape[1] for value in unrepeated]
    return unrepeated if heads[0] == heads[1] else (k, v)


def _unrepeat(node: Node, q: Node) -> Node:
    """Walk up through the repetition of kv heads: every head `N / K` times in a row."""
    heads = q.meta["val"].shape[1]
    if is_call(node, aten.repeat_interleave.self_int) and len(node.args) > 2 and node.args[2] == 1:
        return node.args[0]
    if is_call(node, aten.reshape.default, aten.view.default) and is_call(node.args[0], aten.expand.default):
        grown = node.args[0].args[0]
        if is_call(grown, aten.unsqueeze.default) and grown.args[1] == 2:
            return grown.args[0]
        # x[:, :, None, :, :] is traced as slices around the unsqueeze
        while is_call(grown, aten.slice.Tensor) and grown.meta["val"].shape == grown.args[0].meta["val"].shape:
            grown = grown.args[0]
        if is_call(grown, aten.unsqueeze.default) and grown.args[1] == 2:
            base = grown.args[0]
            while is_call(base, aten.slice.Tensor) and base.meta["val"].shape == base.args[0].meta["val"].shape:
                base = base.args[0]
            if base.meta["val"].dim() == 4 and heads % base.meta["val"].shape[1] == 0:
                return base
    return node


def _read(graph: Graph, site: _Site, tokens: Any, slots: Any, cached: bool) -> MaskReading:
    if site.full:
        return MaskReading(mask=None, reason="attention without a mask sees later keys")
    if site.mask is None:
        # The is_causal flag lines queries and keys up at the first position.
        if cached or str(tokens) != str(slots):
            return MaskReading(mask=None, reason="is_causal over a cache lines positions up at the front")
        return MaskReading(mask=ops.Mask())
    mask = site.mask
    if not (site.hidden and mask.meta["val"].dtype == torch.bool):
        return read_mask(graph, mask, tokens, slots, cached=cached)
    if is_call(mask, aten.bitwise_not.default, aten.logical_not.default):
        return read_mask(graph, mask.args[0], tokens, slots, cached=cached)
    with graph.fx.inserting_after(mask):
        seen = graph.call(aten.logical_not.default, (mask,), mask)
    try:
        return read_mask(graph, seen, tokens, slots, cached=cached)
    finally:
        graph.fx.erase_node(seen)


def _fuse(graph: Graph, site: _Site, mask: ops.Mask, until: Node | None, cached: bool) -> None:
    start = graph.inputs["start"] if cached else None
    options = {"scale": site.scale, "softcap": site.softcap, **dataclasses.asdict(mask)}
    with graph.fx.inserting_before(site.out):
        args = site.q, site.k, site.v, start, until, site.sinks
        new = graph.call(ops.ATTENTION, args, site.out, options)
    _replace(graph, site.out, new)


def _fuse_full(graph: Graph, site: _Site) -> None:
    with graph.fx.inserting_before(site.out):
        new = graph.call(ops.FULL_ATTENTION, (site.q, site.k, site.v), site.out, {"scale": site.scale})
    _replace(graph, site.out, new)


def _replace(graph: Graph, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    # To torch, scaled_dot_product_attention is random (it may drop out), so it would outlive its last user.
    graph.fx.erase_node(old)
