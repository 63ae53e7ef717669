"""Damaged and unusual Hugging Face checkpoints: either transformers' logits, or one line that says what is wrong.

Keys of the config are dropped, nulled, swapped, re-typed and added; tensors are dropped, renamed, re-typed, re-shaped
and added. What our reader takes, transformers must take too, and its logits must be ours. TRANSOM_FUZZ multiplies the
number of inputs, for runs by hand.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.tolerances import FUZZED_LOGITS
from transom.errors import TransomError
from transom.zoo.architectures import architecture, architectures
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.model import load

RUNS = int(os.environ.get("TRANSOM_FUZZ", "1"))

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 24, "hidden_size": 16,
    "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 8, "sliding_window": 4,
    "sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False,
    "final_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.tensor([[2, 5, 9, 13, 7, 3, 21, 18, 4, 11, 6, 20, 8, 15]])
"""More than three windows."""


LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 24, "hidden_size": 16,
    "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    """Gemma's own, as they are named in a checkpoint."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (scale or shape[-1] ** -0.5)

    state = {"model.embed_tokens.weight": draw(24, 16), "model.norm.weight": 1 + draw(16, scale=0.1)}
    for index in range(3):
        layer = f"model.layers.{index}."
        shapes = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
        state |= {f"{layer}self_attn.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        state |= {f"{layer}self_attn.{name}.weight": draw(8, scale=0.1) for name in ("q_norm", "k_norm")}
        shapes = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}
        state |= {f"{layer}mlp.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        state |= {f"{layer}{name}_layernorm.weight": draw(16, scale=0.1) for name in norms}
    return state


STATE = tensors()
LLAMA_STATE = {
    name: tensor + 1 if "layernorm" in name else tensor
    for name, tensor in STATE.items()
    if not name.endswith(("q_norm.weight", "k_norm.weight")) and "feedforward" not in name
}

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, 4, 5, 8, 16, 24, 64, -1, -3, 2**31, 2**40, 10**30, 0.0, 0.5, 1.0, 2.0, 8.0, 1e6,
    1e-5, -1.0, 1e400, float("nan"), "", "8", "linear", "sliding_attention", "gelu", "silu", [], [1], [None], {},
    ["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention", "sliding_attention", "full_attention"],
    ["chunked_attention"] * 3, {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0},
    {"factor": 4.0}, {"rope_type": "linear", "factor": 0}, {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 5e5},
    {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}},
    {"sliding_attention": {"type": "linear", "factor": 2.0}}, {"quant_method": "gptq", "bits": 4},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "rope_theta": 1e4,
     "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 2.0, "high_freq_factor": 2.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"full_attention": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "rope_theta": 1e6}},
    {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 4.0, "truncate": False},
]  # fmt: skip
ADDED = [
    "rope_parameters", "layer_types", "_sliding_window_pattern", "use_sliding_window", "is_causal", "hidden_act",
    "partial_rotary_factor", "use_bidirectional_attention", "attn_logit_softcapping", "quantization_config",
    "quantization", "per_layer_config", "auto_map", "mlp_bias", "text_config", "some_key",
]  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
}  # fmt: skip

EXTRA: dict[str, torch.Tensor] = {
    "lm_head.weight": STATE["model.embed_tokens.weight"].clone(),
    "model.layers.0.self_attn.q_proj.bias": torch.zeros(16),
    "model.layers.1.mlp.up_proj.bias": torch.ones(12),
    "model.layers.3.input_layernorm.weight": torch.zeros(16),
    "model.rotary_emb.inv_freq": 1e6 ** -(torch.arange(0, 8, 2) / 8),
    "model.rotary_emb_local.inv_freq": 1e6 ** -(torch.arange(0, 8, 2) / 8),
    "model.embed_tokens.embed_scale": torch.tensor(4.0),
    "score.weight": torch.zeros(2, 16),
    "vision_tower.vision_model.post_layernorm.weight": torch.zeros(8),
    "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16),
    "model.layers.0.self_attn.q_proj.weight_scale": torch.ones(16, 1),
    "model.layers.0.self_attn.sinks": torch.zeros(2),
    "model.position_ids": torch.arange(4),
}
SHAPES = ["transpose", "flatten", "cut", "grow", "scalar"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.float8_e4m3fn]


def changes(config: dict[str, Any], state: dict[str, torch.Tensor]) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    """Up to three changes of a config or of tensors."""
    known = [key for key in (*config, *ADDED) if key not in ("bos_token_id", "pad_token_id")]
    keys, values, names = st.sampled_from(known), st.sampled_from(VALUES), st.sampled_from(list(state))
    config_changes = st.one_of(
        st.tuples(st.just("drop key"), keys),
        st.tuples(st.just("set key"), keys, values),
        st.tuples(st.just("set key"), keys, values),
        st.tuples(st.just("set key"), keys, values),
        st.tuples(st.just("swap keys"), keys, keys),
        st.tuples(st.just("wrap config"), st.sampled_from(["gemma3", "gemma3_text", "gemma2", "llama"])),
    )
    tensor_changes = st.one_of(
        st.tuples(st.just("drop tensor"), names),
        st.tuples(st.just("add tensor"), st.sampled_from(list(EXTRA))),
        st.tuples(st.just("rename tensor"), names, st.sampled_from([*state, *EXTRA])),
        st.tuples(st.just("re-type tensor"), names, st.sampled_from(DTYPES)),
        st.tuples(st.just("re-type all"), st.sampled_from(DTYPES[:3])),
        st.tuples(
            st.just("re-shape tensor"), names, st.sampled_from(["transpose", "flatten", "cut", "grow", "scalar"])
        ),
        st.tuples(st.just("prefix all"), st.sampled_from(["", "language_model.model.", "model.language_model.", "x."])),
        st.tuples(st.just("copy to head"), st.booleans()),
    )
    return st.lists(st.one_of(config_changes, config_changes, tensor_changes), min_size=1, max_size=3)


def apply(change: tuple[Any, ...], config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Change a config, or tensors, in place."""
    match change:
        case ("drop key", key):
            config.pop(key, None)
        case ("set key", key, value):
            config[key] = value
        case ("swap keys", key, other):
            config[key], config[other] = config.get(other), config.get(key)
        case ("wrap config", model_type):
            inner = dict(config)
            config.clear()
            config.update(model_type=model_type, text_config=inner, vision_config=VISION, mm_tokens_per_image=4)
        case ("drop tensor", name):
            state.pop(name, None)
        case ("add tensor", name):
            state[name] = EXTRA[name]
        case ("rename tensor", name, other) if name in state:
            state[other] = state.pop(name)
        case ("re-type tensor", name, dtype) if name in state:
            state[name] = state[name].to(dtype)
        case ("re-type all", dtype):
            state.update({name: tensor.to(dtype) for name, tensor in state.items()})
        case ("re-shape tensor", name, how) if name in state:
            tensor = state[name]
            state[name] = {
                "transpose": lambda: tensor.t().contiguous() if tensor.dim() == 2 else tensor[None],
                "flatten": lambda: tensor.flatten(),
                "cut": lambda: tensor[:-1].contiguous(),
                "grow": lambda: torch.cat((tensor, tensor[:1])) if tensor.dim() else tensor[None],
                "scalar": lambda: tensor.flatten()[0],
            }[how]()
        case ("prefix all", prefix):
            renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in state.items()}
            state.clear()
            state.update(renamed)
        case ("copy to head", equal) if "model.embed_tokens.weight" in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1 if equal else 2)


def our_logits(folder: Path) -> torch.Tensor | None:
    """Logits [T, V] of the plain module; None if the checkpoint is refused, in one line."""
    try:
        model = load(folder)
        with torch.no_grad():
            logits: torch.Tensor = model.eager()(TOKENS, torch.tensor(0), None)[0][0]
        return logits
    except TransomError as error:
        assert "\n" not in str(error) and str(folder.name) in str(error), str(error)
        return None


def named_for_transformers(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors by the names that transformers knows for this kind of model; it passes over others."""
    table = next((name for name in state if name.endswith("embed_tokens.weight")), "model.embed_tokens.weight")
    before = table.removesuffix("embed_tokens.weight")
    after = "model.language_model." if config["model_type"] == "gemma3" else "model."
    return {
        ("" if "lm_head" in name else after) + name.removeprefix(before) if name.startswith(before) else name: tensor
        for name, tensor in state.items()
    }


def typed_for_transformers(values: dict[str, Any]) -> dict[str, Any]:
    """Keys for whose numbers transformers takes one type only, and heads for which its version 4 took null."""
    types = {
        "rms_norm_eps": float,
        "final_logit_softcapping": float,
        "attn_logit_softcapping": float,
        "query_pre_attn_scalar": int,
        "rope_theta": float,
        "rope_local_base_freq": float,
        "logit_scale": float,
        "layer_norm_eps": float,
        "layer_norm_epsilon": float,
    }
    numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
    typed = {key: types[key](value) if key in types and key in numbers else value for key, value in values.items()}
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if heads and width:
        defaults = {"num_key_value_heads": heads, "head_dim": width // heads}
        typed |= {key: number for key, number in defaults.items() if values.get(key, "") is None}
    return typed


def their_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits[0]
    return logits


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Transformers tells of every tensor that it does not find."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def outcome(change_list: list[tuple[Any, ...]], family: str) -> str:
    """Hold a changed checkpoint against transformers; "read" or "refused"."""
    config, state = (dict(part) for part in checkpoint(family))
    for change in change_list:
        apply(change, config, state)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
        ours = our_logits(folder)
        if ours is None:
            return "refused"
        save_file(named_for_transformers(state, config), folder / "model.safetensors")
        nested = {key: value for key, value in config.items() if key == "text_config" and isinstance(value, dict)}
        text = nested.get("text_config", config)
        if text.get("query_pre_attn_scalar", 0) % 1:
            return "read, and transformers takes whole numbers only"
        inner = {key: typed_for_transformers(value) for key, value in nested.items()}
        (folder / "config.json").write_text(json.dumps(typed_for_transformers(config) | inner))
        theirs = their_logits(folder)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= FUZZED_LOGITS * theirs.abs().max()
    return "read"


FAMILIES = [
    family.name
    for family in architectures()
    if family.text is None and not {*family.huggingface.model_types}.isdisjoint(transformers.CONFIG_MAPPING)
]
"""Those that transformers has too."""
RUNS_OF = dict.fromkeys(FAMILIES, 40 * RUNS) | {"gemma3": 350 * RUNS, "llama3": 150 * RUNS}


@functools.cache
def checkpoint(family: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The one above; else the family's tiny model, its window so short that `TOKENS` are more than three of them."""
    if family in (written := {"gemma3": (CONFIG, STATE), "llama3": (LLAMA_CONFIG, LLAMA_STATE)}):
        return written[family]
    config = next(preset.config for preset in architecture(family).presets if preset.hub is None)
    if config.longest_window is not None:
        shorter: dict[str, Any] = {"window": 4}
        config = dataclasses.replace(config, **shorter)
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), config, random_weights(config, 0), dtype=torch.float32)
        return json.loads((Path(name) / "config.json").read_text()), load_file(Path(name) / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unchanged_checkpoint_is_read(family: str) -> None:
    assert outcome([], family) == "read"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_numbers_or_one_line(family: str) -> None:
    outcomes: collections.Counter[str] = collections.Counter()

    @settings(max_examples=RUNS_OF[family], deadline=None, derandomize=True, database=None)
    @given(changes(*checkpoint(family)))
    def fuzz(change_list: list[tuple[Any, ...]]) -> None:
        outcomes[outcome(change_list, family)] += 1

    fuzz()
    # A reader that refuses all would hold to the property too.
    least = RUNS_OF[family] // 7
    assert outcomes["read"] >= least and outcomes["refused"] >= least, outcomes
