"""Writes small GGUF files with the `gguf` package: an author of the format other than our reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from transom.graphs.weight import Weight
from transom.zoo.config import tile
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.rope import Rope

TINY = Gemma3Config(
    name="tiny",
    architecture="gemma3",
    vocab_size=300,
    hidden_size=256,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    layer_kinds=tile("LLLLLG", 7),
    window=16,
    rope_local=Rope(theta=1e4),
    rope_global=Rope(theta=1e6, factor=8.0),
    attention_scale=64**-0.5,
    context=512,
)


def raw_k_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random blocks of a K-quant, which the package cannot make: any bytes are valid but for the half-float scales."""
    rows, columns = shape
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, columns // 256, block_bytes), dtype=np.uint8)
    halves = rng.uniform(1e-4, 1e-3, (*blocks.shape[:2], 2)).astype(np.float16).view(np.uint8)
    if kind == gguf.GGMLQuantizationType.Q6_K:
        blocks[..., -2:] = halves[..., :2]
    else:
        blocks[..., :4] = halves
    return blocks.reshape(rows, -1)


def write_gguf(
    path: Path,
    config: Gemma3Config,
    weights: Mapping[str, Weight],
    *,
    types: Mapping[str, str] | None = None,
    skip: tuple[str, ...] = (),
    metadata: Mapping[str, object] | None = None,
    architecture: str = "gemma3",
    general: Mapping[str, object] | None = None,
) -> Path:
    """Write a model.

    Args:
        path: Where to.
        config: Goes to the metadata.
        weights: By our names.
        types: Quantisation by the name's end, such as {"attn_q.weight": "Q4_0"}; else F32.
        skip: Tensors, by their names in the file, that are left out.
        metadata: Replaces metadata by key (without the architecture's prefix); None leaves it out.
        architecture: What `general.architecture` says.
        general: Metadata by their whole keys.
    """
    writer = gguf.GGUFWriter(path, architecture)
    values: dict[str, object] = {
        "context_length": config.context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.sliding_window": config.window,
        "rope.freq_base": config.rope_global.theta,
    }
    if config.rope_global.factor != 1:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_global.factor}
    values |= metadata or {}
    for key, value in ({f"{architecture}.{key}": value for key, value in values.items()} | dict(general or {})).items():
        match value:
            case str():
                writer.add_string(key, value)
            case float():
                writer.add_float32(key, value)
            case int():
                writer.add_uint32(key, value)
    add_byte_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_layers)
    rng = np.random.default_rng(0)
    for name, weight in weights.items():
        in_file = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        if in_file in skip:
            continue
        kind = next((kind for end, kind in (types or {}).items() if in_file.endswith(end)), "F32")
        values_of = weight.read().float().numpy() + (1 if name.endswith("norm.weight") else 0)
        quant_type = gguf.GGMLQuantizationType[kind]
        if kind.endswith("_K"):
            data = raw_k_blocks(rng, values_of.shape, quant_type)
        else:
            data = gguf.quants.quantize(np.ascontiguousarray(values_of, np.float32), quant_type)
        writer.add_tensor(in_file, data, raw_dtype=quant_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Gemma's kind of tokenizer, with a handful of merges."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [3] * 4 + [6] * 256
    words = ["\u2581", "h", "e", "l", "o", "he", "ll", "llo", "hello", "\u2581hello"]
    pieces += [*words, "<start_of_turn>", "<end_of_turn>", "\n\n", "  "]
    kinds += [1] * len(words) + [3, 3, 4, 4]
    unused = vocab_size - len(pieces)
    pieces += [f"<unused{index}>" for index in range(unused)]
    kinds += [3] * unused
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(index) for index in range(vocab_size)])
    writer.add_token_types(kinds)
