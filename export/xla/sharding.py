"""Tensor parallelism: which axis of each parameter and cache is spread over the chips (Megatron-LM, arXiv 1909.08053).

Queries, keys, values, gates and ups are split by their outputs, the projections back by their inputs, so that a layer
needs two all-reduces; the embedding and the head are split by the vocabulary. Heads stay whole: where their number is
not a multiple of the chips, they are on every chip, as keys and values are where there is one kv head.
XLA inserts the collectives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

CHIPS = "chips"
"""Name of the mesh's axis."""

_PARAMETER = re.compile(
    r"(?P<role>[qkvo]_proj|gate_proj|up_proj|down_proj|embed_tokens|lm_head)\.weight"
    r"(?P<part>\.codes|\.scales|\.zero_points|\.offsets)?$"
)
_BY_INPUTS = ("o_proj", "down_proj")


def cache_spec(cache: jax.ShapeDtypeStruct, chips: int) -> PartitionSpec:
    """A cache [B, K, S, H] is split by kv heads."""
    return PartitionSpec(None, CHIPS) if cache.shape[1] % chips == 0 else PartitionSpec()


def parameter_specs(
    parameters: Mapping[str, jax.ShapeDtypeStruct], caches: Sequence[jax.ShapeDtypeStruct], chips: int
) -> dict[str, PartitionSpec]:
    """How every parameter is spread.

    Args:
        parameters: Shapes by the graph's names. A projection is [outputs, inputs]; quantised, it has the parts of
            `export.xla.narrow`.
        caches: Shapes [B, K, S, H], all with the same number of heads and width. Without any, as of an encoder, every
            chip has all parameters.
        chips: How many.
    """
    if not caches:
        return dict.fromkeys(parameters, PartitionSpec())
    kv_heads, width = caches[0].shape[1], caches[0].shape[3]
    specs = {}
    for name, parameter in parameters.items():
        match = _PARAMETER.search(name)
        specs[name] = PartitionSpec()
        if match is None:
            continue
        role, by_inputs = match["role"], match["role"] in _BY_INPUTS
        axis = _axis(match["part"], len(parameter.shape), by_inputs)
        whole = _query_heads(parameters, name, width) if role in ("q_proj", "o_proj") else 0
        whole = kv_heads if role in ("k_proj", "v_proj") else whole
        if parameter.shape[axis] % chips == 0 and whole % chips == 0:
            specs[name] = PartitionSpec(*(None,) * axis, CHIPS)
    return specs


def _axis(part: str | None, rank: int, by_inputs: bool) -> int:
    """Axis of the outputs or inputs: dense [R, K], codes [G, C, R] or of a table [R, K], the rest [G, R]."""
    if part is None or (part == ".codes" and rank == 2):
        return int(by_inputs)
    return 0 if by_inputs else rank - 1


def _query_heads(parameters: Mapping[str, jax.ShapeDtypeStruct], name: str, width: int) -> int:
    prefix = name[: name.index("self_attn.")] + "self_attn.q_proj.weight"
    dense, codes = parameters.get(prefix), parameters.get(prefix + ".codes")
    return (dense.shape[0] if dense is not None else codes.shape[-1] if codes is not None else 0) // width


def spread(tree: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes with the mesh's shardings on them."""

    def place(shape: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, specs)
