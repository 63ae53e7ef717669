"""What a model will need, from its configuration alone: parameters, weight bytes, cache bytes.

The cache holds, for one sequence, `2 * kv heads * head_dim` numbers a layer and position: positions as far as the
context in a global layer, as far as the window in a local one. That is the bare formula; the slots that a runtime
really allocates stand in its artifact's manifest.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transom.errors import ConfigError
from transom.formats.schemes import QuantSpec, scheme
from transom.zoo.config import LARGEST, DecoderConfig, LayerKind

CACHE_DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Bytes of one number in the cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Cache of one layer.

    Attributes:
        index: Counted from 0.
        kind: Local or global.
        window: Keys that it sees, itself included; None for all.
        slots: Positions that the cache holds.
        bytes: Keys and values, all sequences of the batch.
    """

    index: int
    kind: LayerKind
    window: int | None
    slots: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a model at one context length; all sizes in bytes.

    Attributes:
        model: Name of the configuration.
        parameters: Numbers in the text decoder; the embedding counts once, as it is also the head.
        quant: Name of a scheme; without one, weights stay in bfloat16, as released.
        weight_dtype: What the bulk of the weights is stored as.
        weight_bytes: All weights.
        context: Positions, in tokens.
        batch: Sequences.
        cache_dtype: A key of `CACHE_DTYPES`.
        cache_bytes_bounded: Caches when local layers hold no more than their window.
        cache_bytes_global_only: Caches when every layer grows with the context.
        layers: The bounded caches one by one.
    """

    model: str
    parameters: int
    quant: str
    weight_dtype: str
    weight_bytes: int
    context: int
    batch: int
    cache_dtype: str
    cache_bytes_bounded: int
    cache_bytes_global_only: int
    layers: tuple[LayerPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain dicts, lists and numbers."""
        return dataclasses.asdict(self) | {"layers": [dataclasses.asdict(layer) for layer in self.layers]}


def plan(
    config: DecoderConfig, *, context: int, quant: str = "none", cache_dtype: str = "bf16", batch: int = 1
) -> Plan:
    """Plan a model's memory without building it.

    Args:
        config: The model.
        context: Positions that the caches must hold, in tokens.
        quant: Name of a scheme; without one, weights stay in bfloat16, as released.
        cache_dtype: A key of `CACHE_DTYPES`.
        batch: Sequences held at a time.

    Raises:
        ConfigError: If a size is not positive, or the cache's dtype is unknown.
        QuantizationError: If the scheme is unknown.
    """
    if not 1 <= context <= LARGEST["context"] or not 1 <= batch <= LARGEST["context"]:
        raise ConfigError(
            f"context and batch must be positive, and at most {LARGEST['context']:,}, got {context} and {batch}"
        )
    if cache_dtype not in CACHE_DTYPES:
        raise ConfigError(f"unknown cache dtype {cache_dtype!r}: choose one of {', '.join(CACHE_DTYPES)}")
    slot_bytes = 2 * config.num_kv_heads * config.head_dim * CACHE_DTYPES[cache_dtype] * batch
    layers = []
    for index, kind in enumerate(config.layer_kinds):
        window = config.layer_window(index)
        slots = context if window is None else min(context, window)
        layers.append(LayerPlan(index=index, kind=kind, window=window, slots=slots, bytes=slots * slot_bytes))
    return Plan(
        model=config.name,
        parameters=parameters(config),
        quant=quant,
        weight_dtype="bf16" if quant == "none" else quant,
        weight_bytes=_weight_bytes(config, quant),
        context=context,
        batch=batch,
        cache_dtype=cache_dtype,
        cache_bytes_bounded=sum(layer.bytes for layer in layers),
        cache_bytes_global_only=config.num_layers * context * slot_bytes,
        layers=tuple(layers),
    )


def parameters(config: DecoderConfig) -> int:
    """Numbers in the text decoder, the tied embedding counted once."""
    linears = sum(outputs * inputs for outputs, inputs in _linears(config).values())
    return config.vocab_size * config.hidden_size + config.num_layers * linears + _norm_values(config)


def _linears(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every projection of one layer, by name."""
    D, F = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (q, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, q),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }


def _norm_values(config: DecoderConfig) -> int:
    return config.num_layers * (4 * config.hidden_size + 2 * config.head_dim) + config.hidden_size


def _weight_bytes(config: DecoderConfig, quant: str) -> int:
    if quant == "none":
        return 2 * parameters(config)

    def stored(spec: QuantSpec | None, outputs: int, inputs: int) -> int:
        return 2 * outputs * inputs if spec is None else spec.bytes(outputs, inputs)

    formats = scheme(quant)
    linears = sum(stored(formats.of(name), *shape) for name, shape in _linears(config).items())
    table = stored(formats.table, config.vocab_size, config.hidden_size)
    return config.num_layers * linears + table + 4 * _norm_values(config)
