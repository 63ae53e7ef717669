"""What a model will need, from its empty module: parameters, weight bytes, cache bytes.

The cache holds, for one sequence, a key and a value a kv head, layer and position: positions as far as the context in a
global layer, as far as the window in a local one. That is the bare formula; the slots that a runtime really allocates
stand in its artifact's manifest.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transom.errors import ConfigError
from transom.formats.schemes import scheme
from transom.zoo.architectures import build_empty
from transom.zoo.config import LARGEST, DecoderConfig, LayerKind
from transom.zoo.layers import Decoder

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
class Caches:
    """Caches of a model at one context length, in bytes.

    Attributes:
        bounded: When local layers hold no more than their window.
        global_only: When every layer grows with the context.
        layers: The bounded ones one by one.
    """

    bounded: int
    global_only: int
    layers: tuple[LayerPlan, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a model at one context length; all sizes in bytes.

    Attributes:
        model: Name of the configuration.
        parameters: Numbers in the model; a tied embedding counts once.
        encoder_parameters: Those of them that only images need.
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
    encoder_parameters: int
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
    caches = plan_caches(config, context=context, cache_dtype=cache_dtype, batch=batch)
    module = build_empty(config)
    return Plan(
        model=config.name,
        parameters=_numbers(module),
        encoder_parameters=0 if config.images is None else _numbers(module) - parameters(config.text),
        quant=quant,
        weight_dtype="bf16" if quant == "none" else quant,
        weight_bytes=_weight_bytes(module, quant),
        context=context,
        batch=batch,
        cache_dtype=cache_dtype,
        cache_bytes_bounded=caches.bounded,
        cache_bytes_global_only=caches.global_only,
        layers=caches.layers,
    )


def plan_caches(config: DecoderConfig, *, context: int, cache_dtype: str = "bf16", batch: int = 1) -> Caches:
    """The caches alone, which need no module; arguments and errors are those of `plan`."""
    if not 1 <= context <= LARGEST["context"] or not 1 <= batch <= LARGEST["context"]:
        raise ConfigError(
            f"context and batch must be positive, and at most {LARGEST['context']:,}, got {context} and {batch}"
        )
    if cache_dtype not in CACHE_DTYPES:
        raise ConfigError(f"unknown cache dtype {cache_dtype!r}: choose one of {', '.join(CACHE_DTYPES)}")
    layers, grown = [], 0
    for index, layer in enumerate(config.layers):
        slots = context if layer.window is None else min(context, layer.window)
        slot = layer.numbers * CACHE_DTYPES[cache_dtype] * batch
        layers.append(LayerPlan(index=index, kind=layer.kind, window=layer.window, slots=slots, bytes=slots * slot))
        grown += context * slot
    return Caches(bounded=sum(layer.bytes for layer in layers), global_only=grown, layers=tuple(layers))


def parameters(config: DecoderConfig) -> int:
    """Numbers in the model, a tied embedding counted once."""
    return _numbers(build_empty(config))


def _numbers(module: Decoder) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _weight_bytes(module: Decoder, quant: str) -> int:
    if quant == "none":
        return 2 * _numbers(module)
    formats, total = scheme(quant), 0
    for name, parameter in module.named_parameters():
        spec = formats.of(name) if parameter.dim() == 2 else None
        if spec is not None:
            total += spec.bytes(*parameter.shape)
        else:
            # Vectors stay in float32, as norms are computed.
            total += (2 if parameter.dim() == 2 else 4) * parameter.numel()
    return total
