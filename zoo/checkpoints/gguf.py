"""GGUF, the file format of llama.cpp: configuration, tokenizer and (mostly quantised) weights in one file.

What the format leaves to convention, and where it differs from the released checkpoints:
    - Norm weights are stored as 1 + w.
    - The local layers' theta and the 27B's attention scale are not stored, the pattern of layers (LLLLLG) seldom.
    - Rope scaling concerns global layers only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from transom.graphs.errors import CheckpointError, ConfigError
from transom.graphs.schemes import Number
from transom.graphs.weight import Codes, Lattice, Weight
from transom.zoo.architectures import tensor_shapes
from transom.zoo.checkpoints.checkpoint import Checkpoint
from transom.zoo.checkpoints.gguf_header import QUANT_TYPES, Header, TensorInfo, read_header
from transom.zoo.config import DecoderConfig, LayerKind, Rope, tile

_ARCHITECTURES = ("gemma3",)
_TENSORS = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
_LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_HASHED_WHOLE = 2**30
"""Files up to this many bytes are identified by all their bytes: about half a second at most."""


def open_gguf(path: Path) -> tuple[DecoderConfig, Checkpoint]:
    """Read the head of a GGUF file; the tensors stay where they are until read.

    Returns:
        The configuration, named after the file, and float32 weights. Those that the file holds as integers times a
        scale (Q4_0, Q5_0, Q8_0, Q6_K) carry that lattice.

    Raises:
        CheckpointError: If the file is damaged, a tensor is missing, has the wrong shape or a type that we do not
            read, or the `gguf` package is not installed.
        ConfigError: If the file's metadata is incomplete or describes a model that the zoo does not hold.
    """
    header = read_header(path)
    config = read_config(header)
    if "output.weight" in header.tensors:
        raise CheckpointError(f"{path}: has an output.weight of its own: only tied embeddings are supported")
    shapes = tensor_shapes(config)
    names = {name: _name_in_file(name) for name in shapes}
    if missing := [name for name in names.values() if name not in header.tensors]:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"{path}: {len(missing)} of {len(shapes)} tensors are missing: {shown}: fetch it again")
    gguf = _gguf()
    weights = {
        name: _weight(gguf, header, names[name], shape, is_norm=len(shape) == 1) for name, shape in shapes.items()
    }
    return config, Checkpoint(weights=weights)


def read_config(header: Header) -> DecoderConfig:
    """The configuration in a GGUF file's metadata.

    Raises:
        ConfigError: If the metadata is incomplete or describes a model that the zoo does not hold.
        CheckpointError: If the embedding is missing, whose rows are the vocabulary.
    """
    path, metadata = header.path, header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ConfigError(f"{path}: unknown architecture {architecture!r}: known are {', '.join(_ARCHITECTURES)}")

    def value(key: str, default: float | None = None) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ConfigError(f"{path}: {architecture}.{key} is {found!r}, expected a number: convert the model again")
        # Numbers stand in single precision; the shortest decimal is what was meant (1e-06, not 9.99999997e-07).
        return float(str(np.float32(found))) if isinstance(found, float) else found

    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{path}: token_embd.weight is missing: give the file of the language model")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ConfigError(f"{path}: {architecture}.rope.scaling.type is {scaling!r}: only none and linear are known")
    num_layers, hidden_size, num_heads = value("block_count"), value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length")
    pattern = metadata.get(f"{architecture}.attention.sliding_window_pattern", 6)
    if value("attention.value_length", head_dim) != head_dim:
        raise ConfigError(f"{path}: keys and values differ in length: such attention is not supported")
    try:
        return DecoderConfig(
            name=path.stem,
            architecture=str(architecture),
            vocab_size=header.tensors["token_embd.weight"].shape[0],
            hidden_size=hidden_size,
            intermediate_size=value("feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=value("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            layer_kinds=_layer_kinds(path, pattern, num_layers),
            window=value("attention.sliding_window"),
            rope_local=Rope(theta=value("rope.freq_base_swa", 1e4)),
            rope_global=Rope(
                theta=value("rope.freq_base", 1e6),
                factor=value("rope.scaling.factor") if scaling == "linear" else 1.0,
            ),
            # Only the 27B, known by its 62 layers, scales by the width per query head (168) and not by head_dim.
            attention_scale=(hidden_size / num_heads if num_layers == 62 else head_dim) ** -0.5,
            norm_eps=value("attention.layer_norm_rms_epsilon"),
            context=value("context_length"),
            logit_softcap=value("final_logit_softcapping", 0.0) or None,
        )
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: its metadata does not make a model ({error}): convert the model again") from error


def _layer_kinds(path: Path, pattern: Any, num_layers: int) -> tuple[LayerKind, ...]:
    """Kinds from the metadata: every n-th layer is global, or whether each layer is local. Most files say nothing."""
    if isinstance(pattern, list) and len(pattern) == num_layers and all(isinstance(flag, bool) for flag in pattern):
        return tuple("local" if flag else "global" for flag in pattern)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        return tile("L" * (pattern - 1) + "G", num_layers)
    raise ConfigError(f"{path}: sliding_window_pattern is {pattern!r}, which does not fit {num_layers} layers")


def revision(path: Path) -> str:
    """Identity of a file: SHA-256 of it, or of its head and size when it is larger than 1 GiB."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    whole = size <= _HASHED_WHOLE
    left = size if whole else read_header(path).data_start
    with path.open("rb") as file:
        while left and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
    return f"sha256:{digest.hexdigest()}" if whole else f"head-sha256:{digest.hexdigest()}:{size}"


def _gguf() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise CheckpointError("reading .gguf files needs the gguf package: pip install 'transom[gguf]'") from None


def _name_in_file(name: str) -> str:
    if name in _TENSORS:
        return _TENSORS[name]
    _, index, rest = name.split(".", 2)
    return f"blk.{index}.{_LAYER_TENSORS[rest.removesuffix('.weight')]}.weight"


def _weight(gguf: ModuleType, header: Header, name: str, shape: tuple[int, ...], *, is_norm: bool) -> Weight:
    info = header.tensors[name]
    origin = f"{header.path}: {name}"
    if info.shape != shape:
        raise CheckpointError(
            f"{origin} has shape {list(info.shape)}, expected {list(shape)}: the file contradicts its metadata"
        )
    if info.quant_type not in QUANT_TYPES:
        known = ", ".join(known for known, _, _ in QUANT_TYPES.values())
        raise CheckpointError(f"{origin} has quantisation type {info.quant_type}: requantise the file to {known}")
    type_name, block, _ = QUANT_TYPES[info.quant_type]
    if math.prod(shape[1:]) % block:
        raise CheckpointError(f"{origin} is {type_name}, whose blocks of {block} do not fit its rows: convert it again")
    read_bytes = functools.partial(_read_bytes, header.path, info)
    quant_type = gguf.GGMLQuantizationType(info.quant_type)

    def read_rows(start: int, stop: int) -> torch.Tensor:
        with np.errstate(invalid="ignore", over="ignore"):  # scales that are no numbers are refused with their rows
            values = gguf.quants.dequantize(read_bytes(start, stop), quant_type)
        return torch.from_numpy(values.reshape(stop - start, *shape[1:]))

    weight = Weight(
        shape=shape,
        dtype=torch.float32,
        read_rows=read_rows,
        origin=origin,
        lattice=_lattice(type_name, read_bytes),
    )
    return weight.map_rows(lambda rows: rows - 1) if is_norm else weight


def _read_bytes(path: Path, info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) as they stand in the file, uint8 [rows, bytes of a row]."""
    _, block, block_bytes = QUANT_TYPES[info.quant_type]
    row_bytes = math.prod(info.shape[1:]) // block * block_bytes
    count = (stop - start) * row_bytes
    raw = np.fromfile(path, np.uint8, count, offset=info.offset + start * row_bytes)
    if raw.size != count:
        raise CheckpointError(f"{path}: ended while it was read: it changed since it was opened")
    return raw.reshape(stop - start, row_bytes)


def _lattice(type_name: str, read_bytes: Callable[[int, int], np.ndarray]) -> Lattice | None:
    """Codes and scales of a symmetric type; Q4_K and the `_1` types add a minimum, so they have none."""
    if type_name not in _UNPACK:
        return None
    unpack, block, block_bytes, bits = _UNPACK[type_name]

    def read_rows(start: int, stop: int) -> Codes:
        with np.errstate(invalid="ignore", over="ignore"):
            codes, scales = unpack(read_bytes(start, stop).reshape(-1, block_bytes))
        rows = stop - start
        return torch.from_numpy(codes.reshape(rows, -1)), torch.from_numpy(scales.reshape(rows, -1)), None

    number: Number = "int4" if bits == 4 else "int8"
    return Lattice(name=type_name, number=number, bits=bits, block=block, symmetric=True, read_rows=read_rows)


_Unpack = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _half(two_bytes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(two_bytes).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibbles of all bytes, then their high nibbles."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _unpack_q4_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8), _half(blocks[:, :2])


def _unpack_q5_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    fifth = np.unpackbits(blocks[:, 2:6], axis=-1, bitorder="little")
    return (_nibbles(blocks[:, 6:]) | fifth << 4).astype(np.int8) - np.int8(16), _half(blocks[:, :2])


def _unpack_q8_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks[:, :2])


def _unpack_q6_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = len(blocks)
    low = np.stack((blocks[:, :128].reshape(count, 2, 64) & 15, blocks[:, :128].reshape(count, 2, 64) >> 4), axis=2)
    high = blocks[:, 128:192].reshape(count, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    codes = (low.reshape(count, 256) | high.reshape(count, 256) << 4).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return codes, _half(blocks[:, 208:]) * scales


# Type -> (reader of one block, values that share a scale, bytes of a block, bits that hold a code).
_UNPACK: dict[str, tuple[_Unpack, int, int, int]] = {
    "Q4_0": (_unpack_q4_0, 32, 18, 4),
    "Q5_0": (_unpack_q5_0, 32, 22, 5),
    "Q8_0": (_unpack_q8_0, 32, 34, 8),
    "Q6_K": (_unpack_q6_k, 16, 210, 6),
}
