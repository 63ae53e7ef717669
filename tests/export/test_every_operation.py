"""Every fused operation's body against every lowering that a target has of it, on random inputs.

A decoder that is nearly nothing but the operation is lowered to each target whose table has it, run there, and compared
with the graph interpreted. So a model of operations that are here needs no tests of its own on every target. The pairs
come from `graphs.ops` and from the tables: a lowering without a sample fails, and so does an operation that a target's
passes leave and its table lacks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.artifacts import CHUNK
from tests.case import run_graph
from tests.export.targets import LOWER, TABLES, decoder
from tests.tolerances import BF16_RESULTS, EXPERTS_OF_8_BITS, FP16_ATTENTION, FP32_ATTENTION, FP32_PRODUCT, FP32_SUMS
from transom.errors import QuantizationError, TargetError, TransomError, UnsupportedOpsError
from transom.formats.schemes import SCHEMES, QuantSpec, Scheme, scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.ops import Mask
from transom.passes.base import Pass, Pipeline
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.pipelines import Measure, pipeline
from transom.passes.targets import TARGETS
from transom.zoo.model import load

VOCABULARY, LONG = 50, 6
HEADS, KEY_HEADS, HEAD = 4, 2, 8
SCALE, EPS, FAR = 0.3, 1e-6, 1000

Call = tuple[int, int]
"""Position of the first new token, and how many there are."""

STATELESS: tuple[Call, ...] = ((0, LONG), (FAR, LONG), (7, 1))

Rows = Callable[..., Any]
"""`(decoder, tokens [B, T], start, *states) -> rows [B, T, D]`, or a tuple of rows and states."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """A use of an operation.

    Attributes:
        name: What is special about it.
        rows: Calls the operation.
        tensors: Weights, by the names under which `rows` reads them.
        tolerance: Largest difference from the body, relative to the largest result; 0 if every bit counts.
        dtype: Of the weights.
        scheme: What is made of the weights before.
        window: Keys that a layer sees; None for all.
        slots: Slots of the layer's caches; 0 if it has none.
        states: How many caches it has.
        summary: Sizes of the layer's summary by axis; empty if it has none.
        calls: What to run, one after the other, each with the states that the one before it left.
        own_order: Whether the target keeps the slots of its caches in an order of its own.
        refused: What the target's exporter raises, and words of it, where it does not take such a use.
    """

    name: str
    rows: Rows
    tensors: Mapping[str, torch.Tensor]
    tolerance: float
    dtype: torch.dtype = torch.float32
    scheme: Scheme | None = None
    window: int | None = None
    slots: int = 0
    states: int = 0
    summary: Mapping[str, int] = dataclasses.field(default_factory=dict)
    calls: tuple[Call, ...] = STATELESS
    own_order: bool = False
    refused: tuple[type[TransomError], str] | None = None

    def draw_states(self, generator: torch.Generator, start: int = 0) -> list[torch.Tensor]:
        """Caches that hold anything: what no token sees does not matter, and at position 0 no summary does."""
        if self.summary:
            drawn = torch.randn((1, *self.summary.values()), generator=generator)
            return [drawn if start else torch.full_like(drawn, math.nan)]
        shape = (1, KEY_HEADS, self.slots, HEAD)
        return [torch.randn(shape, generator=generator).to(self.dtype) for _ in range(self.states)]

    def graph(self) -> Graph:
        """The decoder, traced."""
        module = Decoder(self.rows, self.tensors).to(self.dtype)
        axes = {"axes": tuple(self.summary)} if self.summary else {}
        graph = decoder(module, *self.draw_states(torch.Generator()), window=self.window, **axes)
        quantize = [] if self.scheme is None else [ConvertQuantized(self.scheme)]
        return Pipeline([Canonicalize(), *quantize]).run(graph)[0]


class Decoder(nn.Module):
    """What a decoder takes and returns, around one operation."""

    def __init__(self, rows: Rows, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._rows = rows
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.clone())

    def forward(
        self, tokens: torch.Tensor, start: torch.Tensor, logit_positions: torch.Tensor, *states: torch.Tensor
    ) -> Any:
        result = self._rows(self, tokens, start, *states)
        rows, *states_after = result if isinstance(result, tuple) else (result,)
        return (rows.index_select(1, logit_positions), *states_after)


def normal(*shape: int, seed: int = 0, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * deviation + mean


def look_up(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Random rows [B, T, D], as every token has its own."""
    return nn.functional.embedding(tokens, table)


def by_heads(x_BTD: torch.Tensor) -> torch.Tensor:
    """[B, T, N, H]."""
    return x_BTD.view(*x_BTD.shape[:2], x_BTD.shape[2] // HEAD, HEAD)


def by_rows(x_BTNH: torch.Tensor) -> torch.Tensor:
    """[B, T, N * H]."""
    return x_BTNH.reshape(*x_BTNH.shape[:2], x_BTNH.shape[2] * HEAD)


Samples = Callable[[str], Iterator[Sample]]
"""Uses of an operation that a target must take or refuse, by its name."""

SAMPLES: dict[Any, Samples] = {}


def samples_of(operation: Any) -> Callable[[Samples], Samples]:
    def register(function: Samples) -> Samples:
        SAMPLES[operation] = function
        return function

    return register


@samples_of(ops.RMS_NORM)
def _rms_norm(target: str) -> Iterator[Sample]:
    def of_rows(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
        return ops.RMS_NORM(look_up(self.table, tokens), self.weight, EPS)

    def of_heads(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
        return by_rows(ops.RMS_NORM(by_heads(look_up(self.table, tokens)), self.weight, EPS))

    table = normal(VOCABULARY, 4 * HEAD, deviation=3)
    # A `1 + w` norm comes with its 1 folded in, so weights lie around 1 as well as around 0.
    for mean in (0.0, 1.0):
        tensors = {"table": table, "weight": normal(4 * HEAD, seed=1, mean=mean)}
        yield Sample(name=f"weights around {mean:g}", rows=of_rows, tensors=tensors, tolerance=FP32_SUMS)
    heads = {"table": table, "weight": normal(HEAD, seed=1)}
    yield Sample(name="heads", rows=of_heads, tensors=heads, tolerance=FP32_SUMS)
    if "bfloat16" in TARGETS[target].dtypes:
        yield Sample(name="bfloat16", rows=of_rows, tensors=tensors, tolerance=BF16_RESULTS, dtype=torch.bfloat16)


@samples_of(aten.layer_norm.default)
def _layer_norm(target: str) -> Iterator[Sample]:
    """Rows far from zero, with a bias and without; heads without a weight."""

    def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor, biased: bool) -> Any:
        bias = self.bias if biased else None
        return nn.functional.layer_norm(look_up(self.table, tokens), self.weight.shape, self.weight, bias, EPS)

    def of_heads(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
        return by_rows(nn.functional.layer_norm(by_heads(look_up(self.table, tokens)), (HEAD,), eps=EPS))

    tensors = {"table": normal(VOCABULARY, 24, mean=3), "weight": normal(24, seed=1), "bias": normal(24, seed=2)}
    for biased in (False, True):
        yield Sample(
            name="bias" if biased else "no bias",
            rows=functools.partial(rows, biased=biased),
            tensors=tensors,
            tolerance=FP32_SUMS,
        )
    yield Sample(name="heads", rows=of_heads, tensors={"table": tensors["table"]}, tolerance=FP32_SUMS)


@samples_of(ops.ADD_RMS_NORM)
def _add_rms_norm(target: str) -> Iterator[Sample]:
    def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
        x, residual = look_up(self.table, tokens), look_up(self.residuals, tokens)
        normed, total = ops.ADD_RMS_NORM(x, residual, self.weight, EPS)
        # Both results show, and which is which.
        return normed - total

    tables = {"table": normal(VOCABULARY, 24), "residuals": normal(VOCABULARY, 24, seed=1)}
    yield Sample(name="rows", rows=rows, tensors={**tables, "weight": normal(24, seed=2)}, tolerance=FP32_SUMS)


@samples_of(ops.ROTARY)
def _rotary(target: str) -> Iterator[Sample]:
    def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor, heads_first: bool, interleaved: bool) -> Any:
        x_BTNH = by_heads(look_up(self.table, tokens))
        positions_T = torch.arange(tokens.shape[1]) + start
        angles_TF = positions_T.float().unsqueeze(-1) * self.frequencies
        # As queries that grow with the logarithm of their position are rotated.
        growth_T1 = (1 + 0.1 * torch.log(1 + torch.floor(positions_T.float() / 4))).unsqueeze(-1)
        cos, sin = angles_TF.cos() * growth_T1, angles_TF.sin() * growth_T1
        if heads_first:
            return by_rows(ops.ROTARY(x_BTNH.transpose(1, 2), cos, sin, True, interleaved).transpose(1, 2))
        return by_rows(ops.ROTARY(x_BTNH, cos, sin, False, interleaved))

    tensors = {"table": normal(VOCABULARY, HEADS * HEAD), "frequencies": torch.logspace(0, -2, HEAD // 2)}
    for heads_first, interleaved in itertools.product((False, True), repeat=2):
        yield Sample(
            name=("heads first" if heads_first else "heads last") + (", neighbours" if interleaved else ""),
            rows=functools.partial(rows, heads_first=heads_first, interleaved=interleaved),
            tensors=tensors,
            tolerance=FP32_SUMS,
            refused=(UnsupportedOpsError, "heads before tokens") if heads_first and target == "tvm" else None,
        )


@samples_of(ops.GATED)
def _gated(target: str) -> Iterator[Sample]:
    packed = normal(VOCABULARY, 2 * 20, deviation=4)
    packed[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -1e-30])
    for activation in ops.ACTIVATIONS:

        def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor, activation: str = activation) -> Any:
            return ops.GATED(look_up(self.table, tokens), activation)

        yield Sample(name=activation, rows=rows, tensors={"table": packed}, tolerance=FP32_SUMS)


@samples_of(ops.ROUND_ACTIVATIONS)
def _round_activations(target: str) -> Iterator[Sample]:
    def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor, format: str) -> Any:
        # Half of what is out of the largest code's reach is clamped, and some becomes subnormal.
        return ops.ROUND_ACTIVATIONS(look_up(self.table, tokens), 2.0**-7, format)

    for format in sorted(TARGETS[target].activations):
        table = normal(VOCABULARY, 40, deviation=5)
        table[:, :8] *= 1e-4
        yield Sample(
            name=format,
            rows=functools.partial(rows, format=format),
            tensors={"table": table},
            tolerance=0,
        )


def specs(target: str) -> dict[str, QuantSpec]:
    """Every format of every scheme that a target holds, by what it is."""
    formats = {spec.describe(): spec for one in SCHEMES.values() for spec in one.specs}
    able = TARGETS[target]
    return {name: spec for name, spec in formats.items() if spec.format in able.formats and not able.refuses(spec)}


@samples_of(ops.LINEAR_QUANTIZED)
def _linear_quantized(target: str) -> Iterator[Sample]:
    def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
        return nn.functional.linear(look_up(self.table, tokens), self.matrix)

    def tied(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
        return nn.functional.linear(look_up(self.table, tokens), self.table)

    for name, spec in specs(target).items():
        tensors = {"table": normal(VOCABULARY, 256), "matrix": normal(24, 256, seed=1, mean=0.2)}
        linears = Scheme(name="sample", linears=(spec,))
        yield Sample(name=name, rows=rows, tensors=tensors, tolerance=FP32_PRODUCT, scheme=linears)
        table = Scheme(name="sample", table=spec)
        yield Sample(
            name=f"tied, {name}",
            rows=tied,
            tensors={"table": normal(VOCABULARY, 256, mean=0.2)},
            tolerance=FP32_PRODUCT,
            scheme=table,
            refused=_refused_table(target, spec),
        )


EXPERTS, CHOSEN, EXPERT = 5, 2, 32
"""Experts of a mixture, those that a token chooses, and the width of one."""


def _mixture(activation: str, *, biases: bool) -> tuple[Rows, dict[str, torch.Tensor]]:
    """A router and experts, each with a factor; some experts are chosen by no token, and one by all."""

    def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
        x = look_up(self.table, tokens)
        logits, choices = nn.functional.linear(x, self.choose).topk(CHOSEN)
        more = (self.gate_up_bias, self.down_bias) if biases else (None, None)
        weights = logits.softmax(-1) * self.factors[choices]
        return ops.EXPERTS(x, choices, weights, self.gate_up, self.down, *more, activation)

    width, hidden = 64, EXPERT
    tensors = {
        "table": normal(VOCABULARY, width, mean=0.3),
        "choose": normal(EXPERTS, width, seed=3) + torch.tensor([-1.0, 0, 0, 1, 0])[:, None],
        "factors": normal(EXPERTS, seed=6, mean=1.0, deviation=0.2),
        "gate_up": normal(EXPERTS * 2 * hidden, width, seed=1, mean=0.1, deviation=0.4),
        "down": normal(EXPERTS * width, hidden, seed=2, mean=0.1),
    }
    if biases:
        tensors |= {"gate_up_bias": normal(EXPERTS * 2 * hidden, seed=4, deviation=2)}
        tensors |= {"down_bias": normal(EXPERTS * width, seed=5)}
    return rows, tensors


@samples_of(ops.EXPERTS)
def _experts(target: str) -> Iterator[Sample]:
    for activation in ("silu", "gelu_tanh", ops.CLAMPED_SWIGLU):
        rows, tensors = _mixture(activation, biases=activation == ops.CLAMPED_SWIGLU)
        yield Sample(name=activation, rows=rows, tensors=tensors, tolerance=FP32_PRODUCT)


@samples_of(ops.EXPERTS_QUANTIZED)
def _experts_quantized(target: str) -> Iterator[Sample]:
    for name, spec in specs(target).items():
        # Runtimes that have an operator for it have it for some activations.
        for activation in ("gelu_tanh", ops.CLAMPED_SWIGLU):
            rows, tensors = _mixture(activation, biases=activation == ops.CLAMPED_SWIGLU)
            wide = spec.format in ("int8", "float4_e2m1fn")
            operator = target == "onnxruntime" and activation == ops.CLAMPED_SWIGLU and wide
            yield Sample(
                name=f"{activation}, {name}",
                rows=rows,
                tensors=tensors,
                tolerance=EXPERTS_OF_8_BITS if operator else FP32_PRODUCT,
                scheme=Scheme(name="sample", linears=(dataclasses.replace(spec, modules="gate_up|down"),)),
            )


@samples_of(ops.EMBEDDING_QUANTIZED)
def _embedding_quantized(target: str) -> Iterator[Sample]:
    def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
        return look_up(self.table, tokens)

    for name, spec in specs(target).items():
        yield Sample(
            name=name,
            rows=rows,
            tensors={"table": normal(VOCABULARY, 256, mean=0.2)},
            tolerance=0,
            scheme=Scheme(name="sample", table=spec),
            refused=_refused_table(target, spec),
        )


def _refused_table(target: str, spec: QuantSpec) -> tuple[type[TransomError], str] | None:
    return (QuantizationError, "4-bit") if target == "onnx" and spec.format == "int4" else None


def calls(target: str, slots: int, window: int | None) -> tuple[Call, ...]:
    """From the first token on past two ends of a ring, or to the end of a cache that grows; then far past them."""
    result: list[Call] = []
    start = 0
    for count in (LONG, LONG, 1, LONG, 1, 1, LONG, LONG, 1, 1):
        result.append((start, count))
        start += count
    if window is None:
        assert start < slots
        result.append((slots - LONG, LONG))
    else:
        assert start > 2 * slots
        result += [(FAR, LONG), (FAR + LONG, 1)]
    if target != "tensorrt" or window is None:
        return tuple(result)
    # It writes no call across the end of a ring: sessions cut calls there.
    cut: list[Call] = []
    for start, count in result:
        before = min(count, slots - start % slots)
        cut += [(start, before), (start + before, count - before)]
    return tuple(call for call in cut if call[1])


@samples_of(ops.WRITE_CACHE)
def _write_cache(target: str) -> Iterator[Sample]:
    for slots, heads_first in ((LONG, True), (11, True), (11, False)):

        def rows(
            self: Any, tokens: torch.Tensor, start: torch.Tensor, cache: torch.Tensor, first: bool = heads_first
        ) -> Any:
            x = look_up(self.table, tokens)
            new = by_heads(x)
            return x, ops.WRITE_CACHE(cache, new.transpose(1, 2) if first else new, start, heads_first=first)

        yield Sample(
            name=f"{slots} slots, heads {'first' if heads_first else 'last'}",
            rows=rows,
            tensors={"table": normal(VOCABULARY, KEY_HEADS * HEAD)},
            tolerance=0,
            window=slots,
            slots=slots,
            states=1,
            calls=calls(target, slots, slots),
            refused=(UnsupportedOpsError, "may have heads before tokens") if target == "tvm" and heads_first else None,
        )


MASKS = (Mask(window=3), Mask(window=9), Mask())
"""Windows shorter and longer than a call, and none."""

DILATED = (Mask(segment=10, dilation=4), Mask(window=8, dilation=3), Mask(dilation=3))
"""Dilations that do not divide what they are in, and one of everything."""

GROWN = 48
"""Slots of a cache without a window."""


def _tables(heads: int) -> dict[str, torch.Tensor]:
    widths = {"queries": heads, "keys": KEY_HEADS, "values": KEY_HEADS}
    tables = {name: normal(VOCABULARY, width * HEAD, seed=seed) for seed, (name, width) in enumerate(widths.items())}
    # Below all scores, among them, and above.
    return {**tables, "sinks": torch.linspace(-6, 6, heads)}


def _caps(weights: Any) -> dict[str, Any]:
    """A cap that most scores feel, and sinks."""
    return {"sinks_N": weights.sinks, "softcap": 1.5}


def _words(mask: Mask) -> str:
    bound = f"segments of {mask.segment}" if mask.segment else f"window {mask.window or None}"
    return bound + f", one of {mask.dilation}" * (mask.dilation > 1)


@samples_of(ops.ATTENTION)
def _attention(target: str) -> Iterator[Sample]:
    uses = [(False, mask, torch.float32) for mask in (*MASKS, *DILATED)]
    uses += [(True, Mask(window=9), torch.float32), (True, Mask(), torch.float32)]
    if "float16" in TARGETS[target].dtypes:
        uses.append((True, Mask(window=9), torch.float16))
    for cap, mask, dtype in uses:

        def rows(
            self: Any,
            tokens: torch.Tensor,
            start: torch.Tensor,
            *caches: torch.Tensor,
            mask: Mask = mask,
            cap: bool = cap,
        ) -> Any:
            q, k, v = (
                by_heads(look_up(table, tokens)).transpose(1, 2) for table in (self.queries, self.keys, self.values)
            )
            k_cache, v_cache = (
                ops.WRITE_CACHE(*pair, start, heads_first=True) for pair in zip(caches, (k, v), strict=True)
            )
            options = {**dataclasses.asdict(mask), **(_caps(self) if cap else {})}
            out_BNTH = ops.ATTENTION(q, k_cache, v_cache, start, scale=SCALE, **options)
            return by_rows(out_BNTH.transpose(1, 2)), k_cache, v_cache

        # Written before they are read, new keys must leave room for those that the first of them sees.
        window = mask.reach or None
        slots = GROWN if window is None else window + LONG - 1
        yield Sample(
            name=f"{_words(mask)}{', cap and sinks' * cap}{', float16' * (dtype == torch.float16)}",
            rows=rows,
            tensors=_tables(HEADS),
            tolerance=FP16_ATTENTION if dtype == torch.float16 else FP32_ATTENTION,
            dtype=dtype,
            window=window,
            slots=slots,
            states=2,
            calls=calls(target, slots, window),
        )

    def without_cache(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
        q, k, v = (by_heads(look_up(table, tokens)).transpose(1, 2) for table in (self.queries, self.keys, self.values))
        return by_rows(ops.ATTENTION(q, k, v, None, scale=SCALE, window=3).transpose(1, 2))

    yield Sample(
        name="no cache",
        rows=without_cache,
        tensors=_tables(HEADS),
        tolerance=FP32_ATTENTION,
        refused=(UnsupportedOpsError, "over caches only") if target == "tensorrt" else None,
    )


@samples_of(ops.FULL_ATTENTION)
def _full_attention(target: str) -> Iterator[Sample]:
    for heads in (HEADS, KEY_HEADS):

        def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor) -> Any:
            q, k, v = (
                by_heads(look_up(table, tokens)).transpose(1, 2) for table in (self.queries, self.keys, self.values)
            )
            return by_rows(ops.FULL_ATTENTION(q, k, v, scale=SCALE).transpose(1, 2))

        yield Sample(
            name=f"{heads} heads",
            rows=rows,
            tensors=_tables(heads),
            tolerance=FP32_ATTENTION,
        )


@samples_of(ops.ATTEND)
def _attend(target: str) -> Iterator[Sample]:
    uses = [
        *((HEADS, mask, False) for mask in (*MASKS, *DILATED)),
        (KEY_HEADS, Mask(window=9), False),
        (HEADS, Mask(window=9), True),
        (HEADS, Mask(), True),
    ]
    for heads, mask, cap in uses:

        def rows(
            self: Any,
            tokens: torch.Tensor,
            start: torch.Tensor,
            *caches: torch.Tensor,
            mask: Mask = mask,
            cap: bool = cap,
        ) -> Any:
            q, k, v = (by_heads(look_up(table, tokens)) for table in (self.queries, self.keys, self.values))
            options = {**dataclasses.asdict(mask), **(_caps(self) if cap else {})}
            out_BTNH = ops.ATTEND(q, k, v, *caches, start, scale=SCALE, **options)
            after = (ops.WRITE_CACHE(*pair, start, heads_first=False) for pair in zip(caches, (k, v), strict=True))
            return by_rows(out_BTNH), *after

        # ONNX Runtime moves a windowed cache's slots when it is full, which takes room.
        window = mask.reach or None
        own_order = target == "onnxruntime" and window is not None
        slots = GROWN if window is None else window + LONG - 1 if own_order else window
        yield Sample(
            name=f"{heads} heads, {_words(mask)}{', cap and sinks' * cap}",
            rows=rows,
            tensors=_tables(heads),
            tolerance=FP32_ATTENTION,
            window=window,
            slots=slots,
            states=2,
            calls=tuple(call for call in calls(target, slots, window) if not own_order or call[0] < FAR),
            own_order=own_order,
            refused=(TargetError, "written first") if target == "onnxruntime" and mask in DILATED else None,
        )


AFTER = (
    *((start, count) for start, count in ((0, LONG), (LONG, 1), (LONG + 1, 1), (LONG + 2, LONG))),
    (FAR, 2),
    (0, 1),
)
"""Calls of what keeps a summary: from anything at position 0, one after the other, from far on, and from 0 again."""


@samples_of(ops.CAUSAL_CONVOLUTION)
def _causal_convolution(target: str) -> Iterator[Sample]:
    for taps, biased in ((4, True), (2, False)):

        def rows(
            self: Any, tokens: torch.Tensor, start: torch.Tensor, before: torch.Tensor, biased: bool = biased
        ) -> Any:
            bias = self.bias if biased else None
            return ops.CAUSAL_CONVOLUTION(look_up(self.table, tokens), before, start, self.weight, bias)

        bias = {"bias": normal(40, seed=2)} if biased else {}
        yield Sample(
            name=f"{taps} taps",
            rows=rows,
            tensors={"table": normal(VOCABULARY, 40), "weight": normal(40, 1, taps, seed=1), **bias},
            tolerance=FP32_SUMS,
            summary={"inputs": taps - 1, "channels": 40},
            calls=AFTER,
        )


@samples_of(ops.STATE_SPACE)
def _state_space(target: str) -> Iterator[Sample]:
    width = 16
    for groups in (1, 2):

        def rows(
            self: Any, tokens: torch.Tensor, start: torch.Tensor, state: torch.Tensor, groups: int = groups
        ) -> Any:
            B, T = tokens.shape
            keys, queries = (look_up(table, tokens).view(B, T, groups, width) for table in (self.keys, self.queries))
            x, steps = by_heads(look_up(self.table, tokens)), look_up(self.steps, tokens)
            y, state = ops.STATE_SPACE(x, steps, self.rates, keys, queries, self.skip, state, start)
            return by_rows(y), state

        tensors = {
            "table": normal(VOCABULARY, HEADS * HEAD),
            "keys": normal(VOCABULARY, groups * width, seed=1),
            "queries": normal(VOCABULARY, groups * width, seed=2),
            # From heads that forget nearly nothing to such as keep nearly nothing.
            "steps": normal(VOCABULARY, HEADS, seed=3).exp(),
            "rates": torch.tensor([-6.0, -2.0, 0.0, 3.0]),
            "skip": normal(HEADS, seed=4),
        }
        # More tokens than a piece, where no memory was planned for fewer.
        long = () if target == "tvm" else ((FAR, 2 * ops.PIECE + 3),)
        yield Sample(
            name=f"{groups} groups",
            rows=rows,
            tensors=tensors,
            tolerance=FP32_SUMS,
            summary={"heads": HEADS, "width": HEAD, "state": width},
            calls=(*AFTER, *long),
        )


@samples_of(ops.TOKEN_SHIFT)
def _token_shift(target: str) -> Iterator[Sample]:
    def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor, before: torch.Tensor) -> Any:
        return ops.TOKEN_SHIFT(look_up(self.table, tokens), before, start)

    tensors, summary = {"table": normal(VOCABULARY, 40)}, {"rows": 1, "channels": 40}
    yield Sample(name="rows", rows=rows, tensors=tensors, tolerance=0, summary=summary, calls=AFTER)


@samples_of(ops.DELTA_RULE)
def _delta_rule(target: str) -> Iterator[Sample]:
    """With what a model adds of every head: a number of it, spread over its values."""

    def rows(self: Any, tokens: torch.Tensor, start: torch.Tensor, state: torch.Tensor) -> Any:
        tables = (self.queries, self.logs, self.keys, self.values, self.removals, self.rates)
        q, logs, k, v, u, rates = (by_heads(look_up(table, tokens)) for table in tables)
        v = nn.functional.relu(v)
        y, state = ops.DELTA_RULE(q, logs, k, v, u, rates, state, start)
        return by_rows(y + (q * k).sum(-1, keepdim=True) * v), state

    wide = HEADS * HEAD
    names = ("queries", "keys", "values", "removals")
    tensors = {name: normal(VOCABULARY, wide, seed=seed) for seed, name in enumerate(names)}
    # From channels that forget nothing to such as keep nearly nothing; a removal of no length replaces nothing.
    tensors["logs"] = -normal(VOCABULARY, wide, seed=4, mean=-2.0, deviation=2.0).exp()
    tensors["rates"] = normal(VOCABULARY, wide, seed=5).sigmoid()
    tensors["removals"][::7] = 0
    summary = {"heads": HEADS, "values": HEAD, "width": HEAD}
    calls = (*AFTER, (FAR, 2 * ops.DELTA_PIECE + 3))
    yield Sample(name="heads", rows=rows, tensors=tensors, tolerance=FP32_SUMS, summary=summary, calls=calls)


OPERATIONS = {operation for operation, body in ops.BODIES.items() if body.__module__.startswith(f"{ops.__name__}.")} | {
    aten.layer_norm.default
}
"""Those of `graphs.ops`, and torch's own that is as large; what training and observers add is for no target."""

PAIRS = {(operation, target) for target, table in TABLES.items() for operation in OPERATIONS & table.keys()}
"""Every lowering of a fused operation: the operation, and the target."""

USES = [
    (operation, target, sample)
    for operation, target in sorted(PAIRS, key=str)
    if operation in SAMPLES
    for sample in SAMPLES[operation](target)
]


@pytest.mark.parametrize(
    ("operation", "target", "sample"),
    USES,
    ids=[f"{operation.__name__.split('.')[0]}-{target}-{sample.name}" for operation, target, sample in USES],
)
def test_a_lowering_gives_the_numbers_of_the_body(operation: Any, target: str, sample: Sample, tmp_path: Path) -> None:
    graph = sample.graph()
    assert graph.calls(operation)
    if sample.refused is not None:
        kind, words = sample.refused
        with pytest.raises(kind, match=words):
            LOWER[target](graph, tmp_path)
        return
    program, generator = LOWER[target](graph, tmp_path), torch.Generator().manual_seed(2)
    states = sample.draw_states(generator)
    own_states, position = states, 0
    for start, count in sample.calls:
        if start != position:
            own_states = states = sample.draw_states(generator, start)
        tokens = torch.randint(0, VOCABULARY, (1, count), generator=generator)
        positions = torch.arange(count)
        expected, *states = run_graph(graph, tokens, torch.tensor(start), positions, *states)
        logits, *own_states = program(tokens, start, positions, own_states)
        where = f"start {start}, {count} tokens"
        largest = float(expected.abs().max())
        error = float((logits.float() - expected[0].float()).abs().max())
        assert error <= sample.tolerance * largest, f"{where}: {error} of {largest}"
        if not sample.own_order:
            for actual_state, state in zip(own_states, states, strict=True):
                if operation in (ops.STATE_SPACE, ops.DELTA_RULE):
                    assert (actual_state - state).abs().max() <= sample.tolerance * state.abs().max(), where
                else:
                    assert torch.equal(actual_state, state), where
        position = start + count


def test_every_lowering_is_tried() -> None:
    assert {(operation, target) for operation, target, sample in USES if sample.refused is None} == PAIRS
    assert SAMPLES.keys() == OPERATIONS, "an operation that no pair is of would be overlooked"


def test_what_passes_leave_is_lowered(traced: Graph) -> None:
    """And some list of passes makes every operation, so that none is left out of what is looked at here."""
    operations: set[Any] = set()

    def note(_: Pass, graph: Graph) -> None:
        operations.update(node.target for node in graph.calls_all())

    measure = Measure(scales=lambda graph: {f"layers.{layer}.mlp.down_proj.input": 1.0 for layer in range(6)})
    encoder = load("gemma3-vision-tiny", images=True).trace(task="encode_image")
    mixture = load("gpt-oss-tiny").trace()
    summaries = [load(name).trace() for name in ("mamba2-tiny", "rwkv7-tiny")]
    for target, able in TARGETS.items():
        spec: QuantSpec = next(iter(specs(target).values()))
        activations: Any = next(iter(able.activations), None)
        everything = Scheme(name="sample", linears=(spec,), table=spec, activations=activations)
        passes = pipeline(target, chunk=CHUNK, scheme=everything, measure=measure)
        for whole in (traced, encoder, mixture):
            graph, _ = passes.run(whole, on_pass=note)
            if target in TABLES:
                assert {node.target for node in graph.calls_all()} & OPERATIONS <= TABLES[target].keys(), target
        for whole in summaries:
            graph, _ = pipeline(target, chunk=CHUNK, scheme=scheme("none")).run(whole, on_pass=note)
            if target in TABLES:
                assert {node.target for node in graph.calls_all()} <= {*TABLES[target], operator.getitem}, target
    assert operations >= OPERATIONS
