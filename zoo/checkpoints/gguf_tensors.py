"""What a GGUF file holds beside the decoder's tensors: every one is redundant, part of another thing, or refused.

Redundant tensors are read to see that they are: a head that equals the embedding, frequencies and scales of one,
biases of zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from types import ModuleType

import torch

from transom.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.zoo.checkpoints.gguf_config import PARTS_OF_KEYS
from transom.zoo.checkpoints.gguf_header import Header
from transom.zoo.checkpoints.gguf_weight import open_weight

_BLOCK = re.compile(r"blk\.(\d+)\.")
_VISION, _PREDICTING, _EMBEDDING = (
    "a vision or audio part",
    "layers that predict tokens further ahead",
    "a head that embeds whole texts",
)
# Parts beside the decoder, by the names of their tensors.
_PARTS = (
    (_VISION, re.compile(r"(v|mm|a)\..+")),
    (_PREDICTING, re.compile(r"(.+\.)?(nextn|mtp)\..+")),
    (_EMBEDDING, re.compile(r"(dense_[23]|cls)\..+")),
)
_ADAPTER = re.compile(r".+\.lora_[ab](\.weight)?")
_HEAD, _TABLE = "output.weight", "token_embd.weight"
_ONES = re.compile(r"(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight|.+\.(input_)?scale")
_ZEROS = re.compile(r".+\.bias")


def account(gguf: ModuleType, header: Header, needed: Iterable[str], num_layers: int) -> list[str]:
    """Judge every tensor that is not needed.

    Returns:
        A line for each part that is left out.

    Raises:
        CheckpointError: If a tensor belongs to the decoder and would change its numbers, or has no known use.
    """
    others = [name for name in header.tensors if name not in set(needed)]
    parts: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name in others:
        if (part := _part(header, name, num_layers)) is not None:
            parts.setdefault(part, []).append(name)
        elif _ADAPTER.fullmatch(name):
            raise CheckpointError(f"{header.path}: {name} belongs to an adapter: merge it into the model first")
        elif name == _HEAD:
            _check_head(gguf, header)
        elif _ONES.fullmatch(name):
            _check_all(gguf, header, name, 1.0)
        elif _ZEROS.fullmatch(name):
            _check_all(gguf, header, name, 0.0)
        else:
            unknown.append(name)
    if beyond := [name for name in unknown if (match := _BLOCK.match(name)) and int(match[1]) >= num_layers]:
        raise CheckpointError(
            f"{header.path}: block_count leaves {num_layers} layers, but the file holds {_listed(beyond)}: "
            "it contradicts its metadata, convert it again"
        )
    if unknown:
        raise CheckpointError(
            f"{header.path}: {len(unknown)} tensors have no place in the model: {_listed(unknown)}: "
            "they may change its numbers, choose another model"
        )
    if (keys := _keys_of_parts(header)) and _VISION not in parts:
        parts[_VISION] = keys
    return [f"not read: {part} ({_listed(names)})" for part, names in parts.items()]


def _part(header: Header, name: str, num_layers: int) -> str | None:
    for part, pattern in _PARTS:
        if pattern.fullmatch(name):
            return part
    predicting = header.metadata.get(f"{header.metadata['general.architecture']}.nextn_predict_layers", 0)
    match = _BLOCK.match(name)
    if match and isinstance(predicting, int) and num_layers <= int(match[1]) < num_layers + predicting:
        return _PREDICTING
    return None


def _keys_of_parts(header: Header) -> list[str]:
    architecture = header.metadata["general.architecture"]
    prefixes = tuple(f"{architecture}.{prefix}" for prefix in PARTS_OF_KEYS)
    return [key for key in header.metadata if key.startswith((*prefixes, "clip."))]


def _check_head(gguf: ModuleType, header: Header) -> None:
    """The head is the embedding; a copy of it, whatever its type, changes nothing."""
    table, head = (
        open_weight(gguf, name, header.tensors[name], header.tensors[_TABLE].shape) for name in (_TABLE, _HEAD)
    )
    for ours, theirs in zip(table.blocks(), head.blocks(), strict=True):
        if not torch.equal(ours, theirs):
            raise CheckpointError(
                f"{head.origin} differs from {_TABLE}: only tied embeddings are supported, choose another model"
            )


def _check_all(gguf: ModuleType, header: Header, name: str, value: float) -> None:
    info = header.tensors[name]
    weight = open_weight(gguf, name, info, info.shape or (1,))
    if not _all_blocks(weight, lambda block: bool((block == value).all())):
        raise CheckpointError(
            f"{weight.origin} holds other numbers than {value:g}, which would change the model's: "
            "such models are not supported, choose another model"
        )


def _all_blocks(weight: Weight, condition: Callable[[torch.Tensor], bool]) -> bool:
    return all(condition(block) for block in weight.blocks())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
