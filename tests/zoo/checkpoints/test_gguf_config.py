from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.gemma import gemma_config
from tests.zoo.gguf_bytes import HIDDEN, ROWS, File, Value, tiny
from transom.errors import ConfigError, TransomError
from transom.zoo.checkpoints.gguf import open_gguf
from transom.zoo.checkpoints.gguf_config import read_metadata
from transom.zoo.checkpoints.gguf_header import read_header
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.rope import Rope

BASE = 8**-0.5


def changed(tmp_path: Path, **values: Value | None) -> Path:
    """The tiny model with keys (dots as two underscores, without the architecture) replaced or, by None, dropped."""
    return write(tmp_path, {f"gemma3.{key.replace('__', '.')}": value for key, value in values.items()})


def write(tmp_path: Path, values: dict[str, Value | None], file: File | None = None) -> Path:
    file = file or tiny()
    for key, value in values.items():
        file.set(key, value)
    (path := tmp_path / "tiny.gguf").write_bytes(file.encode())
    return path


def config_of(path: Path) -> Gemma3Config:
    return gemma_config(open_gguf(path)[0])


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_metadata(read_header(path))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_the_tiny_model(tmp_path: Path) -> None:
    config, checkpoint = open_gguf(changed(tmp_path))
    assert config == Gemma3Config(
        name="tiny", architecture="gemma3", vocab_size=ROWS, hidden_size=32, intermediate_size=32, num_heads=4,
        num_kv_heads=2, head_dim=8, layer_kinds=("local", "global"), window=8, rope_local=Rope(theta=1e4),
        rope_global=Rope(theta=1e6, factor=8.0), attention_scale=BASE, norm_eps=1e-6, context=64,
    )  # fmt: skip
    assert checkpoint.left_out == ()


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        (("u32", 2), "LG"),
        (("i64", 2), "LG"),
        (("u8", 1), "GG"),
        (("array of bool", [False, True]), "GL"),
        (("array of u32", [0, 1]), "GL"),
        (("array of i8", [1, 0]), "LG"),
        (None, "LL"),
    ],
)
def test_patterns_as_number_and_as_array(tmp_path: Path, pattern: Value | None, kinds: str) -> None:
    config = config_of(changed(tmp_path, attention__sliding_window_pattern=pattern))
    assert "".join(kind[0].upper() for kind in config.layer_kinds) == kinds


@pytest.mark.parametrize(
    "pattern",
    [("u32", 0), ("i32", -2), ("bool", True), ("f32", 2.0), ("string", "LG"), ("array of u32", [0, 2]),
     ("array of bool", [True]), ("array of f32", [0, 1]), ("array of string", ["L", "G"]), ("array of i32", [-1, 0])],
)  # fmt: skip
def test_patterns_that_are_refused(tmp_path: Path, pattern: Value) -> None:
    message = refusal(changed(tmp_path, attention__sliding_window_pattern=pattern))
    assert "gemma3.attention.sliding_window_pattern" in message


@pytest.mark.parametrize("window", [None, ("u32", 0)])
def test_without_a_window_every_layer_is_global(tmp_path: Path, window: Value | None) -> None:
    opened, checkpoint = open_gguf(changed(tmp_path, attention__sliding_window=window))
    config = gemma_config(opened)
    assert config.layer_kinds == ("global", "global") and config.window == config.context
    assert any("sliding_window" in line and "every layer is global" in line for line in checkpoint.left_out)


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
@pytest.mark.parametrize("kind", ["u32", "i32", "u64", "i16"])
def test_arrays_of_equal_sizes(tmp_path: Path, key: str, kind: str) -> None:
    value = tiny().values()[f"gemma3.{key}"][1]
    assert config_of(write(tmp_path, {f"gemma3.{key}": (f"array of {kind}", [value, value])})).num_kv_heads == 2


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (("array of u32", [2, 4]), "layers differ"),
        (("array of u32", [2]), "for each of 2 layers"),
        (("array of u32", [0, 0]), "at least 1"),
        (("array of bool", [True, True]), "for each of 2 layers"),
        (("array of f32", [2.0, 2.0]), "for each of 2 layers"),
        (("array of string", ["2", "2"]), "for each of 2 layers"),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, key: str, value: Value, words: str) -> None:
    message = refusal(write(tmp_path, {f"gemma3.{key}": value}))
    assert f"gemma3.{key}" in message and words in message


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({"attention__head_count_kv": None}, "num_kv_heads", 4),
        ({"attention__key_length": None, "attention__value_length": None}, "head_dim", 8),
        ({"rope__freq_base": None}, "rope_global", Rope(theta=1e4, factor=8.0)),
        ({"rope__freq_base": ("f64", 1e6)}, "rope_global", Rope(theta=1e6, factor=8.0)),
        ({"rope__freq_base": ("u32", 500_000)}, "rope_global", Rope(theta=5e5, factor=8.0)),
        ({"rope__freq_base_swa": ("f32", 5e4)}, "rope_local", Rope(theta=5e4)),
        ({"rope__scaling__type": None}, "rope_global", Rope(theta=1e6, factor=8.0)),
        ({"rope__scaling__type": ("string", "none")}, "rope_global", Rope(theta=1e6)),
        ({"rope__scaling__factor": None}, "rope_global", Rope(theta=1e6)),
        ({"rope__scaling__factor": ("f32", 0.0)}, "rope_global", Rope(theta=1e6)),
        ({"rope__scaling__factor": None, "rope__scale_linear": ("f32", 4.0)}, "rope_global", Rope(theta=1e6, factor=4)),
        ({"rope__scale_linear": ("f32", 8.0)}, "rope_global", Rope(theta=1e6, factor=8)),
        ({"rope__local__freq_base": ("f32", 2e4)}, "rope_local", Rope(theta=2e4)),
        ({"rope__freq_base": None, "rope__global__freq_base": ("f32", 3e6)}, "rope_global", Rope(theta=3e6, factor=8)),
        ({"rope__freq_base": None, "rope__local__freq_base": ("f32", 1e4)}, "rope_global", Rope(theta=1e6, factor=8)),
        ({"final_logit_softcapping": ("f32", 30.0)}, "logit_softcap", 30.0),
        ({"final_logit_softcapping": ("f32", 0.0)}, "logit_softcap", None),
        ({"attention__layer_norm_rms_epsilon": ("f64", 1e-5)}, "norm_eps", 1e-5),
        ({"attention__layer_norm_rms_epsilon": None, "rope__local__freq_base": ("f32", 1e4)}, "norm_eps", 1e-6),
        ({"context_length": ("u64", 128)}, "context", 128),
        ({"attention__sliding_window": ("u16", 4)}, "window", 4),
    ],
)
def test_defaults_and_spellings(tmp_path: Path, values: dict[str, Value | None], field: str, expected: Any) -> None:
    path = changed(tmp_path, **values)
    if "attention__head_count_kv" in values:
        # The tensors have two; what a missing key means shows in the configuration.
        assert getattr(read_metadata(read_header(path))[0], field) == expected
    else:
        assert getattr(config_of(path), field) == expected


def test_an_old_file_of_ollama_for_a_long_context(tmp_path: Path) -> None:
    path = changed(
        tmp_path, context_length=("u32", 131_072), rope__scaling__type=None, rope__scaling__factor=None,
        rope__freq_base=None, mm__tokens_per_image=("u32", 256),
    )  # fmt: skip
    config, checkpoint = open_gguf(path)
    assert gemma_config(config).rope_global == Rope(theta=1e6, factor=8.0)
    lines = "; ".join(checkpoint.left_out)
    assert "rope.scaling.factor is missing: 8" in lines and "rope.freq_base is missing: 1000000" in lines
    assert "gemma3.mm.tokens_per_image" in lines


_BAD_NUMBERS: list[Value] = [
    ("string", "8"), ("bool", True), ("array of u32", [8]), ("i32", -8), ("f32", float("nan")), ("f32", float("inf")),
    ("f64", 1e300), ("f32", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
     "attention.key_length", "attention.value_length", "attention.sliding_window", "context_length",
     "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor",
     "final_logit_softcapping", "vocab_size", "rope.dimension_count", "rope.local.freq_base", "attention.scale"],
)  # fmt: skip
@pytest.mark.parametrize("value", _BAD_NUMBERS, ids=str)
def test_no_number(tmp_path: Path, key: str, value: Value) -> None:
    assert f"gemma3.{key} is" in refusal(write(tmp_path, {f"gemma3.{key}": value}))


def test_sizes_beyond_bounds_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"gemma3.attention.head_count": ("u32", 65_540)})
    assert refusal(path).startswith(f"{path}: num_heads is 65540, expected a whole number from 1 to 65,536")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", ("u64", 2**63)),
        ("block_count", ("u32", 1025)),
        ("feed_forward_length", ("u64", 2**40)),
        ("attention.head_count", ("u32", 2**31 - 1)),
        ("context_length", ("u32", 0)),
        ("attention.layer_norm_rms_epsilon", ("f32", 0.0)),
        ("rope.freq_base", ("f32", 0.0)),
        ("attention.layer_norm_rms_epsilon", None),
        ("context_length", None),
        ("block_count", None),
        ("rope.scaling.type", ("string", "yarn")),
        ("rope.scaling.type", ("string", "longrope")),
        ("rope.scaling.type", ("string", "")),
        ("rope.scaling.type", ("u32", 1)),
        ("rope.scale_linear", ("f32", 4.0)),
        ("rope.global.freq_base", ("f32", 1e4)),
        ("rope.dimension_count", ("u32", 4)),
        ("rope.dimension_count_swa", ("u32", 4)),
        ("attention.key_length_swa", ("u32", 4)),
        ("attention.value_length_swa", ("u32", 4)),
        ("embedding_length_out", ("u32", 8)),
        ("vocab_size", ("u32", ROWS + 1)),
        ("attention.scale", ("f32", 0.5)),
        ("attention.layer_norm_epsilon", ("f32", 1e-5)),
        ("rope.scaling.attn_factor", ("f32", 1.5)),
        ("rope.scaling.alpha", ("f32", 2.0)),
        ("rope.scaling.yarn_log_multiplier", ("f32", 0.1)),
        ("rope.scaling.finetuned", ("u32", 1)),
        ("rope.partial_factor", ("f32", 0.5)),
        ("rope.freq_scale", ("f32", 0.125)),
        ("attn_logit_softcapping", ("f32", 50.0)),
        ("attention.causal", ("bool", False)),
        ("attention.causal", ("u32", 1)),
        ("use_parallel_residual", ("bool", True)),
        ("expert_count", ("u32", 4)),
        ("hidden_activation", ("string", "silu")),
        ("embedding_scale", ("f32", 2.0)),
        ("logit_scale", ("f32", 0.5)),
        ("residual_scale", ("f32", 0.5)),
        ("attention.new_kind_of_thing", ("u32", 1)),
        ("nextn_predict_layers", ("u32", 2)),
    ],
)
def test_a_key_that_bears_on_numbers_is_refused_by_name(tmp_path: Path, key: str, value: Value | None) -> None:
    assert f"gemma3.{key}" in refusal(write(tmp_path, {f"gemma3.{key}": value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", ("u32", ROWS)),
        ("embedding_length_out", ("u32", HIDDEN)),
        ("rope.dimension_count", ("u32", 8)),
        ("rope.dimension_count_swa", ("u32", 8)),
        ("attention.key_length_swa", ("u32", 8)),
        ("attention.scale", ("f32", BASE)),
        ("rope.scaling.attn_factor", ("f32", 1.0)),
        ("rope.scaling.finetuned", ("bool", True)),
        ("rope.scaling.original_context_length", ("u32", 16)),
        ("attn_logit_softcapping", ("f32", 0.0)),
        ("attention.causal", ("bool", True)),
        ("expert_count", ("u32", 0)),
        ("use_parallel_residual", ("bool", False)),
        ("hidden_activation", ("string", "gelu_pytorch_tanh")),
        ("nextn_predict_layers", ("u32", 0)),
    ],
)
def test_a_key_that_changes_nothing_is_taken(tmp_path: Path, key: str, value: Value) -> None:
    config, checkpoint = open_gguf(write(tmp_path, {f"gemma3.{key}": value}))
    assert config == config_of(changed(tmp_path)) and checkpoint.left_out == ()


@pytest.mark.parametrize("key", ["gemma3.comment", "gemma3.pooling_type", "gemma3.vision.image_size", "llama.rope.x"])
def test_a_key_that_nobody_reads_is_listed(tmp_path: Path, key: str) -> None:
    _, checkpoint = open_gguf(write(tmp_path, {key: ("u32", 1)}))
    assert [line for line in checkpoint.left_out if key in line]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.type", ("string", "adapter"), "merge the adapter into its model"),
        ("general.type", ("string", "mmproj"), "give the file of the language model"),
        ("general.type", ("u32", 3), "general.type"),
        ("general.architecture", ("string", "clip"), "give the file of the language model"),
        ("general.architecture", ("string", "gemma"), "unknown architecture 'gemma'"),
        ("general.architecture", None, "unknown architecture None"),
        ("general.architecture", ("array of string", ["gemma3"]), "unknown architecture"),
        ("adapter.type", ("string", "lora"), "merge the adapter into its model"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, key: str, value: Value | None, words: str) -> None:
    assert words in refusal(write(tmp_path, {key: value}))


def test_a_missing_value_length_is_llama_cpps_default(tmp_path: Path) -> None:
    message = refusal(
        changed(tmp_path, attention__key_length=("u32", 16), attention__value_length=None, rope__scaling__type=None)
    )
    assert "the default of a missing attention.value_length" in message


def test_no_scaling_is_said_when_a_factor_stands_there(tmp_path: Path) -> None:
    _, lines = read_metadata(read_header(changed(tmp_path, rope__scaling__type=("string", "none"))))
    assert lines == ("gemma3.rope.scaling.factor is 8.0, but rope.scaling.type is none: nothing is scaled",)


@pytest.mark.parametrize("rows", [(0, HIDDEN), (ROWS,), (ROWS, HIDDEN // 2)])
def test_an_embedding_that_contradicts_the_metadata(tmp_path: Path, rows: tuple[int, ...]) -> None:
    file = tiny()
    table = file.tensor("token_embd.weight")
    table.axes = list(rows[::-1])
    table.data = table.data[: 4 * math.prod(rows)]
    with pytest.raises(TransomError, match=r"token_embd.weight has shape .* \(embedding_length\)"):
        read_metadata(read_header(write(tmp_path, {}, file)))
