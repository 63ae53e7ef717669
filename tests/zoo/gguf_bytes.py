"""GGUF files as bytes, written and read without our reader or the `gguf` package, and a tiny Gemma 3 to begin from."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import numpy as np

KINDS = {
    "u8": (0, "<B"), "i8": (1, "<b"), "u16": (2, "<H"), "i16": (3, "<h"), "u32": (4, "<I"), "i32": (5, "<i"),
    "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q"), "i64": (11, "<q"), "f64": (12, "<d"),
}  # fmt: skip
_BY_NUMBER = {number: (kind, code) for kind, (number, code) in KINDS.items()}
# Number -> values and bytes of a block, of the types that these tests write.
SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 20: (32, 18), 30: (1, 2)}

Value = tuple[str, Any]
"""("u32", 5), ("string", "linear"), ("array of bool", [True, False])."""


@dataclasses.dataclass
class Tensor:
    """One tensor: name, axes in the order of the file (fastest first), number of its type, its bytes."""

    name: str
    axes: list[int]
    type: int
    data: bytes
    offset: int | None = None


@dataclasses.dataclass
class File:
    """A file in parts that a test can change; keys and names may stand twice."""

    metadata: list[tuple[str, Value]]
    tensors: list[Tensor]

    def set(self, key: str, value: Value | None) -> File:
        """Replace, add or (None) drop a key."""
        self.metadata = [(other, old) for other, old in self.metadata if other != key]
        if value is not None:
            self.metadata.append((key, value))
        return self

    def values(self) -> dict[str, Value]:
        """Metadata by key."""
        return dict(self.metadata)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name."""
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def add(self, name: str, values: np.ndarray) -> File:
        """Append a float32 tensor."""
        self.tensors.append(f32(name, values))
        return self

    def encode(self) -> bytes:
        """The whole file."""
        alignment = 32
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))
        for key, value in self.metadata:
            head += _string(key) + _encode(value)
        at, body = 0, b""
        for tensor in self.tensors:
            head += _string(tensor.name) + struct.pack("<I", len(tensor.axes))
            head += b"".join(struct.pack("<Q", axis) for axis in tensor.axes)
            head += struct.pack("<IQ", tensor.type, at if tensor.offset is None else tensor.offset)
            body += tensor.data + bytes(-len(tensor.data) % alignment)
            at = len(body)
        return head + bytes(-len(head) % alignment) + body


def f32(name: str, values: np.ndarray) -> Tensor:
    """A tensor in float32."""
    return Tensor(name, list(values.shape[::-1]), 0, values.astype("<f4").tobytes())


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encode(value: Value) -> bytes:
    kind, content = value
    if kind == "string":
        return struct.pack("<I", 8) + _string(content)
    if kind == "array of string":
        return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(map(_string, content))
    if kind.startswith("array of "):
        number, code = KINDS[kind.removeprefix("array of ")]
        return struct.pack("<IIQ", 9, number, len(content)) + b"".join(struct.pack(code, item) for item in content)
    number, code = KINDS[kind]
    return struct.pack("<I", number) + struct.pack(code, content)


def decode(raw: bytes) -> File:
    """Read what `File.encode` writes; for damaged files, any exception."""
    at = 24

    def take(code: str) -> Any:
        nonlocal at
        at += struct.calcsize(code)
        return struct.unpack_from(code, raw, at - struct.calcsize(code))[0]

    def string() -> str:
        nonlocal at
        length = take("<Q")
        at += length
        return raw[at - length : at].decode()

    count, pairs = struct.unpack_from("<QQ", raw, 8)
    metadata: list[tuple[str, Value]] = []
    for _ in range(pairs):
        key, number = string(), take("<I")
        if number == 8:
            metadata.append((key, ("string", string())))
        elif number == 9:
            inner, length = take("<I"), take("<Q")
            kind, code = ("string", "") if inner == 8 else _BY_NUMBER[inner]
            metadata.append(
                (key, (f"array of {kind}", [string() if inner == 8 else take(code) for _ in range(length)]))
            )
        else:
            kind, code = _BY_NUMBER[number]
            metadata.append((key, (kind, take(code))))
    tensors = []
    for _ in range(count):
        name = string()
        axes = [take("<Q") for _ in range(take("<I"))]
        tensors.append(Tensor(name, axes, take("<I"), b"", take("<Q")))
    alignment = int(dict(metadata).get("general.alignment", ("u32", 32))[1])
    start = -(-at // alignment) * alignment
    for tensor in tensors:
        block, size = SIZES.get(tensor.type, (1, 0))
        begin = start + (tensor.offset or 0)
        tensor.data = raw[begin : begin + math.prod(tensor.axes) // block * size]
    return File(metadata, tensors)


def dequantised(tensor: Tensor) -> np.ndarray:
    """Its values in float32, slowest axis first."""
    raw = np.frombuffer(tensor.data, np.uint8)
    if tensor.type == 0:
        values = raw.view("<f4")
    elif tensor.type == 1:
        values = raw.view("<f2").astype(np.float32)
    elif tensor.type == 30:
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        blocks = raw.reshape(-1, SIZES[tensor.type][1])
        scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
        low_high = np.concatenate((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), 1).astype(np.int8) - np.int8(8)
        values = (blocks[:, 2:].copy().view(np.int8) if tensor.type == 8 else low_high) * scales
    return values.reshape(tensor.axes[::-1])


PIECES = [
    ("<pad>", 0, 3), ("<eos>", 0, 3), ("<bos>", 0, 3), ("<unk>", 0, 2), ("\u2581", -1, 1), ("h", -2, 1), ("e", -3, 1),
    ("l", -4, 1), ("o", -5, 1), ("he", -6, 1), ("ll", -7, 1), ("llo", -8, 1), ("hello", -9, 1), ("el", -10, 1),
    ("<0x41>", 0, 6), ("<end_of_turn>", 0, 3),
]  # fmt: skip
HIDDEN, HEADS, HEAD_DIM, FFN, LAYERS, ROWS = 32, 4, 8, 32, 2, len(PIECES)
NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")


def tiny(**sizes: int) -> File:
    """A model that llama.cpp's converter would write: two layers, the second of them global."""
    layers = sizes.get("layers", LAYERS)
    rng = np.random.default_rng(0)
    metadata: dict[str, Value] = {
        "general.architecture": ("string", "gemma3"),
        "general.type": ("string", "model"),
        "general.name": ("string", "tiny"),
        "general.file_type": ("u32", 0),
        "general.quantization_version": ("u32", 2),
        "gemma3.context_length": ("u32", 64),
        "gemma3.embedding_length": ("u32", HIDDEN),
        "gemma3.block_count": ("u32", layers),
        "gemma3.feed_forward_length": ("u32", FFN),
        "gemma3.attention.head_count": ("u32", HEADS),
        "gemma3.attention.head_count_kv": ("u32", 2),
        "gemma3.attention.key_length": ("u32", HEAD_DIM),
        "gemma3.attention.value_length": ("u32", HEAD_DIM),
        "gemma3.attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "gemma3.attention.sliding_window": ("u32", 8),
        "gemma3.attention.sliding_window_pattern": ("u32", 2),
        "gemma3.rope.freq_base": ("f32", 1e6),
        "gemma3.rope.scaling.type": ("string", "linear"),
        "gemma3.rope.scaling.factor": ("f32", 8.0),
        "tokenizer.ggml.model": ("string", "llama"),
        "tokenizer.ggml.pre": ("string", "default"),
        "tokenizer.ggml.tokens": ("array of string", [piece for piece, _, _ in PIECES]),
        "tokenizer.ggml.scores": ("array of f32", [float(score) for _, score, _ in PIECES]),
        "tokenizer.ggml.token_type": ("array of i32", [kind for _, _, kind in PIECES]),
        "tokenizer.ggml.bos_token_id": ("u32", 2),
        "tokenizer.ggml.eos_token_id": ("u32", 1),
        "tokenizer.ggml.unknown_token_id": ("u32", 3),
        "tokenizer.ggml.add_bos_token": ("bool", True),
        "tokenizer.ggml.add_eos_token": ("bool", False),
        "tokenizer.ggml.add_space_prefix": ("bool", False),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (ROWS, HIDDEN), "output_norm": (HIDDEN,)}
    for index in range(layers):
        layer: dict[str, tuple[int, ...]] = {
            "attn_q": (HEADS * HEAD_DIM, HIDDEN), "attn_k": (2 * HEAD_DIM, HIDDEN), "attn_v": (2 * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM), "attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,),
            "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN),
        } | dict.fromkeys(NORMS, (HIDDEN,))  # fmt: skip
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    tensors = [f32(f"{name}.weight", rng.normal(size=shape)) for name, shape in shapes.items()]
    return File(list(metadata.items()), tensors)
