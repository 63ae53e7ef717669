"""Weights from a seed, and a writer of checkpoints that never holds one.

Random weights make every size of a model testable: same names, shapes and bytes as the real one, no download. The
numbers depend on the seed, the tensor's name and the block of rows they stand in, never on how rows are asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from transom.graphs.weight import Weight
from transom.zoo.architectures import architecture, build_empty, tensor_shapes
from transom.zoo.checkpoints.layout import HEAD, TABLE, in_file
from transom.zoo.checkpoints.safetensors import INDEX, SINGLE
from transom.zoo.checkpoints.safetensors_writer import write
from transom.zoo.config import DecoderConfig
from transom.zoo.huggingface import write_config

_BLOCK_VALUES = 1 << 16
_METADATA = {"format": "pt"}
"""What transformers looks for in a file."""


def random_weights(config: DecoderConfig, seed: int) -> dict[str, Weight]:
    """Float32 weights drawn from normal distributions, the same on every machine.

    Activations stay of order one: projections have a deviation of fan_in^-0.5, norms 0.1 around what changes nothing.
    The embedding is small against what the layers add, or every token would predict itself; the last norm makes up for
    it, so that logits deviate by about 2.5.
    """
    weights = {}
    for path, module in build_empty(config).named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            weights[name] = _weight(name, tuple(parameter.shape), _neutral(module, name), seed)
    return {name: weights[name] for name in tensor_shapes(config)}


def write_checkpoint(
    folder: Path,
    config: DecoderConfig,
    weights: Mapping[str, Weight],
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    shard_bytes: int = 4 * 10**9,
) -> None:
    """Write a Hugging Face checkpoint, a block of rows at a time.

    Args:
        folder: Created if need be.
        config: Goes to `config.json`.
        weights: By the names of the module's state dict.
        dtype: float32, float16 or bfloat16; None leaves every weight in its own.
        shard_bytes: Upper bound on a shard's tensors; one larger tensor gets a shard of its own.

    Raises:
        RangeError: If `dtype` cannot hold a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder)
    images, form = config.images is not None, architecture(config.architecture).huggingface
    state = {}
    for name, weight in weights.items():
        typed, how = weight if dtype is None else weight.to(dtype), form.stacked(config, name)
        state[in_file(name, images=images, renames=form.renames)] = typed if how is None else how.write(typed)
    shards: list[dict[str, Weight]] = [{}]
    for name, weight in state.items():
        filled = sum(other.bytes for other in shards[-1].values())
        if filled and filled + weight.bytes > shard_bytes:
            shards.append({})
        shards[-1][name] = weight
    if len(shards) == 1:
        write(shards[0], folder / SINGLE, metadata=_METADATA)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(shard, folder / file, metadata=_METADATA)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(weight.bytes for weight in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _neutral(module: torch.nn.Module, name: str) -> float:
    """The value of a norm's weight, or of a factor, that changes nothing; 0 for any other parameter."""
    values: Mapping[str, float] = getattr(module, "neutral", {})
    last = name.rpartition(".")[2]
    return values.get(last, 1.0 if isinstance(module, torch.nn.LayerNorm) and last == "weight" else 0.0)


def _weight(name: str, shape: tuple[int, ...], neutral: float, seed: int) -> Weight:
    fan_in = math.prod(shape[1:])
    mean, deviation = neutral, 0.1
    if name == "norm.weight":
        mean += 4.0
    elif len(shape) > 1:
        deviation = (0.5 if name in (TABLE, HEAD) else 1.0) * fan_in**-0.5
    return Weight(
        shape=shape,
        dtype=torch.float32,
        read_rows=functools.partial(_read_rows, f"{seed}/{name}", shape, mean, deviation),
        origin=f"random, seed {seed}: {name}",
    )


def _read_rows(key: str, shape: tuple[int, ...], mean: float, deviation: float, start: int, stop: int) -> torch.Tensor:
    per_row = math.prod(shape[1:])
    rows = max(1, _BLOCK_VALUES // per_row)
    out = np.empty((stop - start, per_row), dtype=np.float32)
    for block in range(start // rows, -(-stop // rows)):
        low, high = max(start, block * rows), min(stop, (block + 1) * rows)
        entropy = int.from_bytes(hashlib.sha256(f"{key}/{block}".encode()).digest()[:16], "little")
        draw = np.random.Generator(np.random.SFC64(entropy)).standard_normal((high - block * rows, per_row), np.float32)
        np.multiply(draw[low - block * rows :], np.float32(deviation), out=out[low - start : high - start])
    if mean:
        out += np.float32(mean)
    return torch.from_numpy(out.reshape(stop - start, *shape[1:]))
