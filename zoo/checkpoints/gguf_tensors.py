"""What a GGUF file holds beside the decoder's tensors: every one is redundant, part of another thing, or refused.

Redundant tensors are read to see that they are: a head that equals the embedding, frequencies and scales of one,
biases of zero.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from types import ModuleType

from transom.errors import CheckpointError
from transom.wording import listed
from transom.zoo.checkpoints.checkpoint import left_out_line
from transom.zoo.checkpoints.gguf_config import PARTS_OF_KEYS
from transom.zoo.checkpoints.gguf_header import Header
from transom.zoo.checkpoints.gguf_weight import open_weight
from transom.zoo.checkpoints.layout import UNREAD
from transom.zoo.config import DecoderConfig

_BLOCK = re.compile(r"blk\.(\d+)\.")
_VISION, _PREDICTING, _EMBEDDING = (
    "a vision or audio part",
    "a part that predicts tokens further ahead",
    "a head that embeds whole texts",
)
# Parts beside the decoder, by the names of their tensors.
_PARTS = (
    (_VISION, re.compile(r"(v|mm|a)\..+")),
    (_PREDICTING, re.compile(r"(.+\.)?(nextn|mtp)\..+")),
    (_EMBEDDING, re.compile(r"(dense_[23]|cls)\..+")),
)
_ADAPTER = re.compile(r".+\.lora_[ab](\.weight)?")
HEAD = "output.weight"
FREQUENCIES = "rope_freqs.weight"
_ONES = re.compile(r"(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight|.+\.(input_)?scale")
_ZEROS = re.compile(r".+\.bias")


def account(
    gguf: ModuleType, header: Header, needed: Collection[str], config: DecoderConfig, unread: Collection[str] = ()
) -> tuple[str, ...]:
    """Judge every tensor that is not needed. A head is the caller's to judge, if it is not: it is a copy of the table.

    Args:
        gguf: The package.
        header: Of the model.
        needed: Tensors of the decoder, and those that its configuration was read from.
        config: Of the decoder, out of the header's metadata.
        unread: Tensors that files of the family hold and its models have no use for.

    Returns:
        A line for each part that is left out.

    Raises:
        CheckpointError: If a tensor belongs to the decoder and would change its numbers, or has no known use.
    """
    num_layers, blocks = config.num_layers, header.metadata[f"{header.metadata['general.architecture']}.block_count"]
    assert isinstance(blocks, int)
    others = [name for name in header.tensors if name not in needed and name != HEAD]
    parts: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name in others:
        if (part := _part(name, num_layers, blocks)) is not None:
            parts.setdefault(part, []).append(name)
        elif name in unread:
            parts.setdefault(UNREAD, []).append(name)
        elif _ADAPTER.fullmatch(name):
            raise CheckpointError(f"{header.path}: {name} belongs to an adapter: merge it into the model first")
        elif _ONES.fullmatch(name):
            _check_all(gguf, header, name, 1.0)
        elif _ZEROS.fullmatch(name):
            _check_all(gguf, header, name, 0.0)
        else:
            unknown.append(name)
    if beyond := [name for name in unknown if (match := _BLOCK.match(name)) and int(match[1]) >= num_layers]:
        raise CheckpointError(
            f"{header.path}: block_count leaves {num_layers} layers, but the file holds {listed(beyond)}: "
            "it contradicts its metadata, convert it again"
        )
    if unknown:
        raise CheckpointError(
            f"{header.path}: {len(unknown)} tensors have no place in the model: {listed(unknown)}: "
            "they may change its numbers, choose another model"
        )
    if (keys := _keys_of_parts(header)) and _VISION not in parts:
        parts[_VISION] = keys
    return tuple(left_out_line(part, names) for part, names in parts.items())


def _part(name: str, num_layers: int, blocks: int) -> str | None:
    for part, pattern in _PARTS:
        if pattern.fullmatch(name):
            return part
    match = _BLOCK.match(name)
    if match and num_layers <= int(match[1]) < blocks:
        return _PREDICTING
    return None


def _keys_of_parts(header: Header) -> list[str]:
    architecture = header.metadata["general.architecture"]
    prefixes = tuple(f"{architecture}.{prefix}" for prefix in PARTS_OF_KEYS)
    return [key for key in header.metadata if key.startswith((*prefixes, "clip."))]


def _check_all(gguf: ModuleType, header: Header, name: str, value: float) -> None:
    info = header.tensors[name]
    weight = open_weight(gguf, name, info, info.shape or (1,))
    if not all(bool((block == value).all()) for block in weight.blocks()):
        raise CheckpointError(
            f"{weight.origin} holds other numbers than {value:g}, which would change the model's: "
            "such models are not supported, choose another model"
        )
