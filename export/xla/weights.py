"""Writes the weights, and says how the programs take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transom.backends.xla.parameters import Parameter
from transom.formats.quantized import block_of
from transom.formats.schemes import BITS
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.weight import Weight
from transom.zoo.checkpoints import safetensors_writer


def stored_names(graph: Graph) -> dict[str, str]:
    """Name in the file by the graph's name: weights that share a buffer stand there once."""
    return safetensors_writer.stored_names(graph.weights)


def parameters(graph: Graph) -> dict[str, Parameter]:
    """How the programs take every stored weight; for the layouts of quantised ones see `narrow`."""
    names, entries = stored_names(graph), {}
    for name, weight in _stored(graph).items():
        entries[name] = Parameter(
            dtype=str(weight.dtype).removeprefix("torch."),
            file_shape=weight.shape,
            axes=tuple(range(len(weight.shape))),
        )
    tables = {node.args[1] for node in graph.calls(ops.EMBEDDING_QUANTIZED)}
    matrices = [node.args[1:] for node in graph.calls(ops.LINEAR_QUANTIZED, ops.EMBEDDING_QUANTIZED)]
    for node in graph.calls(ops.EXPERTS_QUANTIZED):
        matrices += [node.args[3:7], node.args[7:11]]
    for codes, scales, zeros, format in matrices:
        rows, blocks = (int(size) for size in scales.meta["val"].shape)
        block, bits = block_of(codes.meta["val"], format), BITS[format]
        has_offsets = zeros is not None and zeros.meta["val"].is_floating_point()
        signed, table = zeros is None or has_offsets, codes in tables
        numbers: dict[str, Any] = {"dtype": f"{'int' if signed else 'uint'}{bits}", "packed": bits == 4}
        numbers["middle"] = 2 ** (bits - 1) if signed else 0
        if format not in ("int4", "int8"):
            numbers = {"dtype": format if bits == 4 else str(codes.meta["val"].dtype).removeprefix("torch.")}
            numbers["packed"] = bits == 4
        arranged = {
            codes: {"file_shape": (rows, blocks * block), "axes": (0, 1), **numbers}
            if table
            else {"file_shape": (rows, blocks, block), "axes": (1, 2, 0), **numbers},
            scales: {"file_shape": (rows, blocks), "axes": (1, 0), "dtype": "float32"},
            zeros: {"file_shape": (rows, blocks), "axes": (1, 0), **({"dtype": "float32"} if has_offsets else numbers)},
        }
        for part, how in arranged.items():
            if part is not None:
                named_weight = graph.weight_of(part)
                assert named_weight is not None, f"{part} is no weight"
                entries[names[named_weight[0]]] = Parameter(**how)
    return entries


def write(graph: Graph, path: Path, *, on_bytes: Callable[[int], None] = lambda count: None) -> None:
    """Write every weight once; see `safetensors_writer.write`.

    Args:
        graph: Whose weights.
        path: File to write.
        on_bytes: Called with the number of bytes written each time.
    """
    safetensors_writer.write(_stored(graph), path, on_bytes=on_bytes)


def _stored(graph: Graph) -> dict[str, Weight]:
    # jax has no 64-bit integers unless asked for.
    return {
        name: graph.weights[name].to(torch.int32) if graph.weights[name].dtype == torch.int64 else graph.weights[name]
        for name in dict.fromkeys(stored_names(graph).values())
    }
