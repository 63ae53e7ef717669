"""Damaged and unusual GGUF files: read as llama.cpp reads them, or refused in one line; never another model in silence.

The expectation is a second reading of the metadata, written from llama.cpp's rules and sharing no code with ours. Every
run draws the same files; TRANSOM_FUZZ=20 draws twenty times as many.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.zoo.gguf_bytes import KINDS, File, Tensor, Value, decode, dequantised, f32, tiny
from transom.errors import TransomError
from transom.zoo.checkpoints.checkpoint import refuse_differences
from transom.zoo.checkpoints.gguf import open_gguf
from transom.zoo.tokenizer import Tokenizer

EXAMPLES = int(os.environ.get("TRANSOM_FUZZ", "1"))


def bounded(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples * EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# --- What to change -------------------------------------------------------------------------------------------------

KEYS = sorted(tiny().values())
NUMBERS = [key for key, (kind, _) in tiny().metadata if key.startswith("gemma3.") and kind != "string"]
ADDED = [
    "gemma3.vocab_size", "gemma3.embedding_length_out", "gemma3.rope.freq_base_swa", "gemma3.rope.local.freq_base",
    "gemma3.rope.global.freq_base", "gemma3.rope.scale_linear", "gemma3.rope.scaling.attn_factor",
    "gemma3.rope.scaling.finetuned", "gemma3.rope.dimension_count", "gemma3.rope.dimension_count_swa",
    "gemma3.rope.scaling.original_context_length", "gemma3.rope.scaling.alpha", "gemma3.attention.causal",
    "gemma3.attention.scale", "gemma3.attention.key_length_swa", "gemma3.attention.value_length_swa",
    "gemma3.attn_logit_softcapping", "gemma3.final_logit_softcapping", "gemma3.expert_count",
    "gemma3.use_parallel_residual", "gemma3.nextn_predict_layers", "gemma3.attention.layer_norm_epsilon",
    "gemma3.attention.max_alibi_bias", "gemma3.vision.block_count", "gemma3.mm.tokens_per_image", "gemma3.comment",
    "gemma3.pooling_type", "general.alignment", "split.count", "split.no", "split.tensors.count", "adapter.type",
    "tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.eot_token_id",
]  # fmt: skip
INTEGERS = [0, 1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 62, 64, 128, 512, 513, 131_072, 2**31, 2**40]
FLOATS = [0.0, 1.0, 0.5, 8.0, 1e-6, 1e-5, 1e4, 1e6, 30.0, -1.0, 8**-0.5, math.nan, math.inf, 3.0e38]
STRINGS = ["", "gemma3", "linear", "none", "yarn", "longrope", "8", "llama", "gpt2", "adapter", "mmproj", "a\nb"]
_RANGES = {kind: 8 * struct.calcsize(code) for kind, (_, code) in KINDS.items() if kind[0] in "ui"}


def fits(kind: str, value: int) -> int:
    """The value cut to the kind's bits, as a damaged file would hold it."""
    bits = _RANGES[kind]
    value %= 2**bits
    return value - 2**bits if kind[0] == "i" and value >= 2 ** (bits - 1) else value


@st.composite
def scalars(draw: st.DrawFn) -> Value:
    kind = draw(st.sampled_from([*KINDS, "u32", "u32", "f32", "string"]))
    if kind == "string":
        return kind, draw(st.sampled_from(STRINGS))
    if kind == "bool":
        return kind, draw(st.booleans())
    if kind[0] == "f":
        return kind, draw(st.sampled_from(FLOATS) | st.floats(width=32))
    return kind, fits(kind, draw(st.sampled_from(INTEGERS) | st.integers(-3, 2**33)))


@st.composite
def values(draw: st.DrawFn) -> Value:
    if draw(st.integers(0, 3)):
        scalar: Value = draw(scalars())
        return scalar
    kind, first = draw(scalars())
    length = draw(st.sampled_from([0, 1, 2, 2, 2, 2, 3]))
    items = [first] * length
    if draw(st.booleans()) and length:
        items[-1] = draw(st.booleans()) if kind == "bool" else (first if kind == "string" else type(first)(1))
    return f"array of {kind}", items


@st.composite
def perturbed(draw: st.DrawFn, value: Value) -> Value:
    """Nearly the same number, or the same one in another kind."""
    kind, content = value
    if kind not in KINDS:
        another: Value = draw(values())
        return another
    if kind == "bool":
        return draw(st.sampled_from([("bool", not content), ("u8", int(content)), ("array of bool", [content] * 2)]))
    if kind[0] == "f":
        near = [content * 2, content / 2, -content, 0.0, float(np.nextafter(np.float32(content), np.float32(9e9)))]
        others: list[Value] = [("f64", content), ("f64", content * 1.25), *(("f32", number) for number in near)]
        return draw(st.sampled_from(others))
    near = [content + 1, content - 1, content * 2, content // 2, 0, -content]
    other = draw(st.sampled_from([kind for kind in _RANGES if fits(kind, content) == content]))
    return draw(
        st.sampled_from([("i64", number) for number in near])
        | st.sampled_from([(other, content), ("f32", float(content)), ("string", str(content))])
        | st.sampled_from(
            [(f"array of {other}", [content] * 2), (f"array of {other}", [content, fits(other, content + 1)])]
        )
    )


# What a converter might have written.
SENSIBLE: list[tuple[str, list[Value | None]]] = [
    ("context_length", [("u16", 128), ("u32", 131_072), ("i64", 131_073), ("u32", 7)]),
    ("attention.sliding_window", [("i32", 5), ("u64", 4096), ("u32", 0), None]),
    ("attention.sliding_window_pattern", [None, ("u8", 1), ("i64", 6), ("array of bool", [False, True]),
                                          ("array of i32", [1, 1]), ("array of u8", [0, 0])]),
    ("attention.head_count", [("array of u32", [4, 4]), ("u8", 4)]),
    ("attention.head_count_kv", [("array of i32", [2, 2])]),
    ("feed_forward_length", [("array of u64", [32, 32])]),
    ("attention.key_length", [None, ("u64", 8)]),
    ("attention.value_length", [None, ("i8", 8)]),
    ("attention.layer_norm_rms_epsilon", [("f32", 1e-5), ("f64", 1e-6), ("f64", 1.23456789e-6), None]),
    ("rope.freq_base", [None, ("f32", 12345.678), ("u32", 500_000), ("f64", 1e4)]),
    ("rope.freq_base_swa", [("f32", 5e4), ("f32", 1e4)]),
    ("rope.local.freq_base", [("f32", 1e4), ("f32", 2e4)]),
    ("rope.global.freq_base", [("f32", 1e6), ("f64", 2e6)]),
    ("rope.scaling.type", [None, ("string", "none")]),
    ("rope.scaling.factor", [None, ("f32", 2.5), ("f32", 0.0), ("u32", 4), ("f32", 0.5)]),
    ("rope.scale_linear", [("f32", 3.0), ("f32", 8.0), ("f32", 0.0)]),
    ("final_logit_softcapping", [("f32", 30.0), ("f32", 0.0), ("f64", 12.5)]),
    ("attention.scale", [("f32", 8**-0.5), ("f64", 8**-0.5)]),
    ("attention.causal", [("bool", True)]),
    ("rope.dimension_count", [("u32", 8)]),
    ("nextn_predict_layers", [("u32", 0), ("u32", 1)]),
    ("mm.tokens_per_image", [("u32", 256)]),
    ("vocab_size", [("u32", 16)]),
]  # fmt: skip


@st.composite
def sensible_metadata(draw: st.DrawFn, file: File) -> list[str]:
    """Change up to five keys in place as another converter would; returns them."""
    entries = draw(st.lists(st.sampled_from(SENSIBLE), min_size=1, max_size=5, unique_by=lambda entry: entry[0]))
    for key, choices in entries:
        file.set(f"gemma3.{key}", draw(st.sampled_from(choices)))
    return [f"gemma3.{key}" for key, _ in entries]


@st.composite
def changed_metadata(draw: st.DrawFn, file: File) -> list[str]:
    """Change one key, or swap two, in place; returns them."""
    how = draw(st.sampled_from(["perturb", "perturb", "perturb", "value", "drop", "swap", "add", "add", "twice"]))
    present = [key for key, _ in file.metadata]
    key = str(draw(st.sampled_from([key for key in (NUMBERS if how == "perturb" else KEYS) if key in present])))
    old = file.values()[key]
    if how == "perturb":
        file.set(key, draw(perturbed(old)))
    elif how == "value":
        file.set(key, draw(values()))
    elif how == "drop":
        file.set(key, None)
    elif how == "swap":
        other = draw(st.sampled_from(present))
        file.set(key, file.values()[other])
        file.set(other, old)
        return [key, other]
    elif how == "add":
        key = draw(st.sampled_from(ADDED))
        file.set(key, draw(values() | st.sampled_from([("f32", 8**-0.5), ("bool", True), ("u32", 2), ("u32", 16)])))
    else:
        file.metadata.append((key, draw(st.sampled_from([old, ("u32", 1)]))))
    return [key]


EXTRA = [
    "output.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.ffn_down.bias", "blk.0.attn_k.scale",
    "blk.2.attn_q.weight", "blk.0.attn_qkv.weight", "blk.0.attn_q.weight.lora_a", "v.patch_embd.weight",
    "mm.input_projection.weight", "blk.1.nextn.eh_proj.weight", "dense_2.weight", "surprise", "output_norm.bias",
]  # fmt: skip


@st.composite
def changed_tensor(draw: st.DrawFn, file: File) -> str:
    """Change one tensor in place; returns its name."""
    how = draw(st.sampled_from(["add", "add", "add", "drop", "rename", "type", "axes", "offset", "twice", "order"]))
    tensor = draw(st.sampled_from(file.tensors))
    if how == "add":
        name = draw(st.sampled_from(EXTRA))
        table = file.tensors[0]
        content = draw(st.sampled_from(["zeros", "ones", "one of them differs", "the table", "nearly the table"]))
        numbers = {"zeros": np.zeros(8), "ones": np.ones(8), "one of them differs": np.array([1.0] * 7 + [1.001])}
        data = table.data if content == "the table" else table.data[:-4] + table.data[:4]
        file.tensors.append(
            f32(name, numbers[content]) if content in numbers else Tensor(name, list(table.axes), table.type, data)
        )
        return name
    if how == "drop":
        file.tensors.remove(tensor)
    elif how == "rename":
        tensor.name = draw(st.sampled_from([*EXTRA, tensor.name.upper(), tensor.name[:-1], "a\nb", ""]))
    elif how == "type":
        tensor.type = draw(st.sampled_from([0, 1, 2, 8, 10, 20, 24, 30, 31, 39, 99]))
        block, size = {0: (1, 4), 1: (1, 2), 30: (1, 2)}.get(tensor.type, (32, 34 if tensor.type == 8 else 18))
        rng = np.random.default_rng(0)
        raw = rng.integers(0, 60, math.prod(tensor.axes) // block * size, dtype=np.uint8)
        tensor.data = raw.tobytes()
    elif how == "axes":
        axes = tensor.axes
        tensor.axes = draw(
            st.sampled_from(
                [axes[::-1], [*axes, 1], axes[:-1], [*axes, 0], [axis + 1 for axis in axes], [1] * 5, [2**62] * 3]
            )
        )
    elif how == "offset":
        tensor.offset = draw(st.sampled_from([0, 32, 33, 2**40, 2**64 - 32]))
    elif how == "twice":
        file.tensors.append(f32(tensor.name, np.zeros(8)))
    else:
        file.tensors.remove(tensor)
        file.tensors.append(tensor)
    return tensor.name


# --- What llama.cpp reads -------------------------------------------------------------------------------------------


class RefusalError(Exception):
    """llama.cpp would not load the file, or computes what our decoder does not."""


def whole(value: Value | None) -> int:
    if value is None or value[0] not in _RANGES:
        raise RefusalError
    return int(value[1])


def real(value: Value | None) -> float:
    if value is None or (value[0] not in _RANGES and value[0][0] != "f"):
        raise RefusalError
    return float(value[1])


def second_reading(file: File) -> dict[str, Any]:
    """What the metadata say, by llama.cpp's rules and, where it has none, by Ollama's."""
    metadata = file.values()
    if metadata.get("general.architecture") != ("string", "gemma3"):
        raise RefusalError
    if metadata.get("general.type", ("string", "model")) != ("string", "model") or "adapter.type" in metadata:
        raise RefusalError
    of = {key.removeprefix("gemma3."): value for key, value in metadata.items() if key.startswith("gemma3.")}
    ollama = any(key in of for key in ADDED_BY_OLLAMA)
    all_blocks = whole(of.get("block_count"))
    layers = all_blocks - (whole(of["nextn_predict_layers"]) if "nextn_predict_layers" in of else 0)

    def every_layer(key: str) -> int:
        kind, content = of.get(key, ("", None))
        if kind.startswith("array of "):
            inner = kind.removeprefix("array of ")
            if inner not in _RANGES or len(content) != all_blocks or len(set(content)) != 1:
                raise RefusalError
            return int(content[0])
        return whole(of.get(key))

    width, heads = whole(of.get("embedding_length")), every_layer("attention.head_count")
    if heads < 1:
        raise RefusalError
    head = whole(of.get("attention.key_length", ("u32", width // heads)))
    if whole(of.get("attention.value_length", ("u32", width // heads))) != head:
        raise RefusalError
    for key in (
        "attention.key_length_swa",
        "attention.value_length_swa",
        "rope.dimension_count",
        "rope.dimension_count_swa",
    ):
        if key in of and whole(of[key]) != head:
            raise RefusalError
    window = whole(of.get("attention.sliding_window", ("u32", 0)))
    kind, pattern = of.get("attention.sliding_window_pattern", ("u32", 6))
    if kind.startswith("array of "):
        if kind.endswith(("string", "f32", "f64")) or len(pattern) != all_blocks:
            raise RefusalError
        local = [bool(flag) for flag in pattern[:layers]]
    else:
        period = whole((kind, pattern))
        local = [period == 0 or index % period < period - 1 for index in range(min(layers, 1000))]
    if window == 0:
        local = [False] * layers
    theta = real(of.get("rope.freq_base", of.get("rope.global.freq_base", ("f32", 1e6 if ollama else 1e4))))
    theta_swa = real(of.get("rope.freq_base_swa", of.get("rope.local.freq_base", ("f32", 1e4))))
    for ours, theirs in (("rope.freq_base", "rope.global.freq_base"), ("rope.freq_base_swa", "rope.local.freq_base")):
        if ours in of and theirs in of and not close(real(of[ours]), real(of[theirs])):
            raise RefusalError
    scaling = of.get("rope.scaling.type", ("string", "linear"))
    if scaling not in (("string", "none"), ("string", "linear")):
        raise RefusalError
    factor = real(of.get("rope.scaling.factor", of.get("rope.scale_linear", ("f32", 0.0))))
    if ollama and not {"rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"} & set(of):
        factor = 8.0 if whole(of.get("context_length")) >= 131_072 else 0.0
    factor = 1.0 if scaling[1] == "none" or factor == 0 else factor
    scale = (width // heads if layers == 62 else head) ** -0.5
    if "attention.scale" in of and not close(real(of["attention.scale"]), scale):
        raise RefusalError
    for key, neutral in NEUTRAL.items():
        if key in of and (of[key][0] == "bool") != isinstance(neutral, bool):
            raise RefusalError
        if key in of and of[key][1] != neutral:
            raise RefusalError
    softcap = real(of.get("final_logit_softcapping", ("f32", 0.0)))
    epsilon = real(of.get("attention.layer_norm_rms_epsilon", ("f32", 1e-6) if ollama else None))
    if "attention.layer_norm_epsilon" in of and not close(real(of["attention.layer_norm_epsilon"]), epsilon):
        raise RefusalError
    expected = {
        "hidden_size": width,
        "intermediate_size": every_layer("feed_forward_length"),
        "num_heads": heads,
        "num_kv_heads": every_layer("attention.head_count_kv") if "attention.head_count_kv" in of else heads,
        "head_dim": head,
        "layer_kinds": tuple("local" if flag else "global" for flag in local),
        "theta_local": theta_swa,
        "theta_global": theta,
        "factor": factor,
        "attention_scale": scale,
        "norm_eps": epsilon,
        "context": whole(of.get("context_length")),
        "logit_softcap": softcap,
        "vocab_size": file.tensor("token_embd.weight").axes[1],
    }
    if window and True in local:
        expected["window"] = window
    for key, same in (("vocab_size", "vocab_size"), ("embedding_length_out", "hidden_size")):
        if key in of and whole(of[key]) != expected[same]:
            raise RefusalError
    numbers = [value for value in expected.values() if isinstance(value, float)]
    if not all(math.isfinite(np.float32(number)) and number >= 0 for number in numbers):
        raise RefusalError
    return expected


ADDED_BY_OLLAMA = ("rope.global.freq_base", "rope.local.freq_base", "mm.tokens_per_image", "vision.block_count")
NEUTRAL: dict[str, float | bool] = {
    "rope.scaling.attn_factor": 1, "rope.scaling.alpha": 0, "attention.causal": True, "attn_logit_softcapping": 0,
    "expert_count": 0, "use_parallel_residual": False, "attention.max_alibi_bias": 0,
}  # fmt: skip


def close(left: float, right: float) -> bool:
    return abs(left - right) <= 2e-6 * abs(right)


def check_config(config: Any, expected: dict[str, Any]) -> None:
    ours = {name: getattr(config, name) for name in expected if hasattr(config, name)} | {
        "theta_local": config.rope_local.theta,
        "theta_global": config.rope_global.theta,
        "factor": config.rope_global.factor,
        "logit_softcap": config.logit_softcap or 0.0,
    }
    assert config.rope_local.factor == 1.0
    for name, value in expected.items():
        # Singles are read as their shortest decimal.
        same = ours[name] == value or (
            isinstance(value, float)
            and (abs(ours[name] - value) <= 1e-7 * abs(value) or np.float32(ours[name]) == np.float32(value))
        )
        assert same, (name, ours[name], value)


NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def check_weights(weights: Any, left_out: tuple[str, ...], file: File, layers: int) -> None:
    """Every tensor of the file is read, or changes nothing, or is listed."""
    by_name = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    for index in range(layers):
        by_name |= {f"blk.{index}.{theirs}.weight": f"layers.{index}.{ours}.weight" for ours, theirs in NAMES.items()}
    assert sorted(by_name.values()) == sorted(weights)
    lines = " ".join(left_out)
    ends = 0
    for tensor in file.tensors:
        # As llama.cpp wants it: one behind the other, each padded.
        assert tensor.offset == ends, tensor.name
        ends += len(tensor.data) + -len(tensor.data) % int(file.values().get("general.alignment", ("", 32))[1])
        if tensor.name in by_name:
            values = dequantised(tensor).reshape(weights[by_name[tensor.name]].shape)
            ours = weights[by_name[tensor.name]].read().numpy()
            shifted = values - 1 if values.ndim == 1 else values
            assert np.array_equal(ours, shifted.astype(np.float32), equal_nan=True), tensor.name
        elif tensor.name == "output.weight":
            assert np.array_equal(dequantised(tensor), dequantised(file.tensor("token_embd.weight")))
        elif tensor.name.endswith(".bias"):
            assert not dequantised(tensor).any()
        elif tensor.name.endswith((".scale", "rope_freqs.weight")):
            assert (dequantised(tensor) == 1).all()
        else:
            # Lists name the first five.
            assert tensor.name in lines or "more)" in lines, tensor.name


def pieces_of(text: str, file: File) -> list[int]:
    """Greedy merges by score, the leftmost of equals first, on a text without special tokens."""
    metadata = file.values()
    tokens = metadata["tokenizer.ggml.tokens"][1]
    scores = metadata.get("tokenizer.ggml.scores", ("", [0.0] * len(tokens)))[1]
    ids = {token: index for index, token in enumerate(tokens)}
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (-scores[ids[joined]], at) for at in range(len(parts) - 1) if (joined := parts[at] + parts[at + 1]) in ids
        ]
        if not pairs:
            return [ids[part] for part in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def outcome(raw: bytes) -> str:
    """Open the file and compare with the second reading; returns the refusal's message, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        path.write_bytes(raw)
        try:
            config, checkpoint = open_gguf(path)
            checked = refuse_differences(checkpoint.weights, checkpoint.copies)
            weights = {name: weight.read() for name, weight in checked.items()}
        except TransomError as error:
            message = str(error)
            assert "\n" not in message and str(path) in message and len(message) < 1200, message
            refused = message
        else:
            refused = ""
            file = decode(raw)
            check_config(config, second_reading(file))
            assert weights.keys() == checkpoint.weights.keys()
            check_weights(checkpoint.weights, checkpoint.left_out, file, config.num_layers)
            for key in file.values():
                if key in UNREAD:
                    assert key in " ".join(checkpoint.left_out), key
        try:
            tokenizer = Tokenizer.from_gguf(path)
        except TransomError as error:
            message = str(error)
            assert "\n" not in message and str(path) in message and len(message) < 1200, message
            return refused or message
        file = decode(raw)
        tokens = file.values()["tokenizer.ggml.tokens"][1]
        kinds = file.values().get("tokenizer.ggml.token_type", ("", [1] * len(tokens)))[1]
        # Control pieces and the user's own are cut out of a text beforehand.
        cut_out = [piece for piece, kind in zip(tokens, kinds, strict=True) if kind in (2, 3, 4) and piece in "hello"]
        if set("helo") <= set(tokens) and not cut_out:
            for text in ("hello", "ellohe", "llolle", "hehello"):
                assert tokenizer.encode(text, bos=False) == pieces_of(text, file), text
        assert tokenizer.bos_id == tokens.index("<bos>")
        return refused


UNREAD = {"gemma3.vision.block_count", "gemma3.mm.tokens_per_image", "gemma3.comment", "gemma3.pooling_type"}


# --- Properties -----------------------------------------------------------------------------------------------------


def test_the_model_that_all_begin_from() -> None:
    assert outcome(tiny().encode()) == ""


@bounded(500)
@given(data=st.data())
def test_changed_metadata(data: st.DataObject) -> None:
    file = tiny()
    keys = [data.draw(changed_metadata(file)) for _ in range(data.draw(st.integers(1, 3)))]
    message = outcome(file.encode())
    if message and len(keys) == 1:
        # A size shows as a tensor that does not fit it.
        named = [*keys[0], "split.", "tensor", ".weight", "keys and values"]
        assert any(name in message for name in named), (keys[0], message)


@bounded(300)
@given(data=st.data())
def test_metadata_of_another_converter(data: st.DataObject) -> None:
    file = tiny()
    keys = data.draw(sensible_metadata(file))
    if message := outcome(file.encode()):
        assert any(word in message for word in (*keys, "keys and values", "token_embd.weight")), message


@bounded(250)
@given(data=st.data())
def test_changed_tensors(data: st.DataObject) -> None:
    file = tiny()
    names = [data.draw(changed_tensor(file)) for _ in range(data.draw(st.integers(1, 2)))]
    message = outcome(file.encode())
    if message and len(names) == 1:
        assert any(word in message for word in (names[0], "tensor", ".weight", "name")), (names, message)


@bounded(60)
@given(
    name=st.sampled_from(["output.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.ffn_up.scale"]),
    at=st.integers(0, 511),
    change=st.sampled_from([0.0, 1e-3, -1.0, math.nan]),
)
def test_redundant_tensors(name: str, at: int, change: float) -> None:
    file = tiny()
    content = np.full((16, 32), 0.0 if name.endswith("bias") else 1.0, np.float32)
    content = dequantised(file.tensor("token_embd.weight")).copy() if name == "output.weight" else content
    content.ravel()[at] += change
    message = outcome(file.add(name, content).encode())
    assert (name in message) if change else message == ""


@bounded(150)
@given(
    key=st.sampled_from(["tokens", "scores", "token_type"]),
    at=st.integers(0, 15),
    other=st.integers(0, 15),
    content=st.sampled_from([None, "", "h", "hello", "\u2581he", 0, 1, 7, -1, 0.0, -6.0, -6.5, math.nan, -math.inf]),
)
def test_changed_tables_of_the_tokenizer(key: str, at: int, other: int, content: object) -> None:
    file = tiny()
    kind, table = file.values()[f"tokenizer.ggml.{key}"]
    table = list(table)
    # A value of the table's kind, or else one from another place.
    fitting = {"tokens": str, "scores": float, "token_type": int}[key]
    table[at] = content if isinstance(content, fitting) else table[other]
    outcome(file.set(f"tokenizer.ggml.{key}", (kind, table)).encode())


@bounded(150)
@given(data=st.data())
def test_changed_metadata_and_tensors(data: st.DataObject) -> None:
    file = tiny()
    data.draw(changed_metadata(file))
    data.draw(changed_tensor(file))
    outcome(file.encode())


@bounded(300)
@given(data=st.data())
def test_flipped_bytes_of_the_head(data: st.DataObject) -> None:
    raw = bytearray(tiny().encode())
    head = len(raw) - sum(len(tensor.data) + -len(tensor.data) % 32 for tensor in tiny().tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, head - 1))
        raw[at] ^= 1 << data.draw(st.integers(0, 7)) if data.draw(st.booleans()) else data.draw(st.integers(1, 255))
    outcome(bytes(raw))


@bounded(100)
@given(cut=st.floats(0, 1))
def test_truncated_files(cut: float) -> None:
    raw = tiny().encode()
    assert outcome(raw[: int(cut * (len(raw) - 33))]) != ""


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_counts(key: str) -> None:
    """Another value of a number never gives the same model: it is refused, or the configuration follows."""
    kind, content = tiny().values()[key]
    for value in (content * 2, content + 1):
        file = tiny().set(key, (kind, value))
        outcome(file.encode())
