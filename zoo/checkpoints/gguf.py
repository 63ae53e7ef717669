"""GGUF, the file format of llama.cpp: configuration, tokenizer and (mostly quantised) weights in one file, or in a set.

What the format leaves to convention, and where it differs from the released checkpoints:
    - Norm weights are stored as 1 + w.
    - The local layers' theta and the 27B's attention scale are not stored, the pattern of layers (LLLLLG) seldom.
    - Rope scaling concerns global layers only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from transom.errors import CheckpointError
from transom.wording import listed
from transom.zoo.architectures import tensor_shapes
from transom.zoo.checkpoints.checkpoint import Checkpoint
from transom.zoo.checkpoints.gguf_config import read_metadata
from transom.zoo.checkpoints.gguf_header import Header, header_of
from transom.zoo.checkpoints.gguf_tensors import HEAD, account
from transom.zoo.checkpoints.gguf_weight import gguf_package, open_weight
from transom.zoo.config import DecoderConfig

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
"""Models up to this many bytes are identified by all their bytes: about half a second at most."""


def open_gguf(source: Path | Header) -> tuple[DecoderConfig, Checkpoint]:
    """Read the head of a GGUF file or set; the tensors stay where they are until read.

    Args:
        source: The file, any file of a set, or what `read_header` made of it.

    Returns:
        The configuration, named after the file, and float32 weights. Those that the file holds as integers times a
        scale (Q4_0, Q5_0, Q8_0, Q6_K) carry that lattice.

    Raises:
        CheckpointError: If a file is damaged or missing, a tensor is missing, has the wrong shape or a type that we do
            not read, or would change the model's numbers in a way that it does not know, or the `gguf` package is not
            installed.
        ConfigError: If the file's metadata is incomplete or describes a model that the zoo does not hold.
    """
    header = header_of(source)
    config, lines = read_metadata(header)
    shapes = tensor_shapes(config)
    names = {name: _name_in_file(name) for name in shapes}
    if missing := [name for name in names.values() if name not in header.tensors]:
        raise CheckpointError(
            f"{header.path}: {len(missing)} of {len(shapes)} tensors are missing: {listed(missing)}: fetch it again"
        )
    gguf = gguf_package()
    weights = {}
    for name, shape in shapes.items():
        weight = open_weight(gguf, names[name], header.tensors[names[name]], shape)
        weights[name] = weight.map_rows(lambda rows: rows - 1) if len(shape) == 1 else weight
    parts = account(gguf, header, set(names.values()), config)
    copies = {}
    if HEAD in header.tensors:
        copies["embed_tokens.weight"] = (
            open_weight(gguf, HEAD, header.tensors[HEAD], weights["embed_tokens.weight"].shape),
        )
    return config, Checkpoint(weights=weights, copies=copies, left_out=(*parts, *lines))


def revision(source: Path | Header) -> str:
    """Identity of a file or set: SHA-256 of it, or of its heads and size when it is larger than 1 GiB."""
    header = header_of(source)
    digest = hashlib.sha256()
    whole = header.size <= _HASHED_WHOLE
    for part in header.parts:
        left = part.size if whole else part.data_start
        with part.path.open("rb") as file:
            while left and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
    return f"sha256:{digest.hexdigest()}" if whole else f"head-sha256:{digest.hexdigest()}:{header.size}"


def _name_in_file(name: str) -> str:
    if name in _TENSORS:
        return _TENSORS[name]
    _, index, rest = name.split(".", 2)
    return f"blk.{index}.{_LAYER_TENSORS[rest.removesuffix('.weight')]}.weight"
