"""Dilated attention against a plain masked loop, and what its layers keep against what that loop still reads."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import transom
from tests.conftest import Cli
from tests.tolerances import FP32_LOGITS
from transom.errors import ConfigError
from transom.zoo.architectures import preset
from transom.zoo.huggingface import read_config, write_config
from transom.zoo.longnet import LongNetConfig
from transom.zoo.model import Model, load

LENGTH = 3 * 16 + 5
"""Past three of the longest segments."""

SLOTS = (8, 13, None)
"""Newest positions that the tiny model's layers still read: 13 of a segment of 16, where one key in 4 is seen."""


def read_keys(config: LongNetConfig, layer: int, position: int) -> list[int]:
    """Positions of the keys that a token reads, one by one."""
    segment, dilation = config.segments[layer], config.dilations[layer]
    first = 0 if segment is None else position - position % segment
    return [key for key in range(first, position + 1) if (position - key) % dilation == 0]


def plain_loop(model: Model, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] in float64: token by token, every key written out, no cache."""
    config = model.config
    assert isinstance(config, LongNetConfig)
    weights = {name: weight.read().double() for name, weight in model.weights.items()}
    groups, half = config.num_heads // config.num_kv_heads, config.head_dim // 2

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean() + config.norm_eps).sqrt() * weights[f"{name}.weight"]

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        return (weights[f"{name}.weight"] @ x).view(-1, config.head_dim)

    def rotate(x_NH: torch.Tensor, position: int) -> torch.Tensor:
        angles = position * config.rope.theta ** -(torch.arange(half, dtype=torch.float64) / half)
        low, high = x_NH[:, :half], x_NH[:, half:]
        return torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), 1)

    states = [weights["embed_tokens.weight"][token] for token in ids]
    for layer in range(config.num_layers):
        path, after = f"layers.{layer}", []
        normed = [norm(x, f"{path}.input_layernorm") for x in states]
        keys, values = ([heads(x, f"{path}.self_attn.{kind}_proj") for x in normed] for kind in "kv")
        for position, x in enumerate(states):
            q_NH = rotate(heads(normed[position], f"{path}.self_attn.q_proj"), position)
            read = read_keys(config, layer, position)
            k_SKH = torch.stack([rotate(keys[key], key) for key in read]).repeat_interleave(groups, 1)
            v_SKH = torch.stack([values[key] for key in read]).repeat_interleave(groups, 1)
            shares_NS = (torch.einsum("nh,snh->ns", q_NH, k_SKH) / math.sqrt(config.head_dim)).softmax(1)
            attended = torch.einsum("ns,snh->nh", shares_NS, v_SKH).flatten()
            x = x + weights[f"{path}.self_attn.o_proj.weight"] @ attended
            inner = norm(x, f"{path}.post_attention_layernorm")
            gate, up = (weights[f"{path}.mlp.{kind}_proj.weight"] @ inner for kind in ("gate", "up"))
            after.append(x + weights[f"{path}.mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up))
        states = after
    return torch.stack([weights["lm_head.weight"] @ norm(x, "norm") for x in states])


@pytest.fixture(scope="module")
def model() -> Model:
    return load("longnet-tiny")


def test_logits_are_those_of_a_plain_masked_loop(model: Model) -> None:
    ids = torch.randint(0, 500, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        actual = model.eager()(torch.tensor([ids]), torch.tensor(0), None)[0][0]
    assert (plain_loop(model, ids) - actual).abs().max() < FP32_LOGITS


def test_caches_keep_what_can_still_be_read(model: Model, tmp_path: Path, cli: Cli) -> None:
    """A ring's slots are the farthest that any token reads back; a layer without segments reads to the beginning."""
    config = model.config
    assert isinstance(config, LongNetConfig)
    farthest = [
        max(position - read_keys(config, layer, position)[0] for position in range(LENGTH))
        for layer in range(config.num_layers)
    ]
    assert tuple(far + 1 for far in farthest[:2]) == SLOTS[:2] and farthest[2] > LENGTH - 4
    transom.compile(model, target="onnx", context=64, chunk=5, out=tmp_path / "artifact")
    session = transom.open(tmp_path / "artifact")
    assert [state.window for state in session.states] == [window for window in SLOTS for _ in "kv"]
    session.logits(list(range(LENGTH)))
    position_bytes = 2 * config.num_kv_heads * config.head_dim * 4
    assert session.cache_bytes() == {"local": (8 + 4 + 13 + 4) * position_bytes, "global": 64 * position_bytes}
    code, out, _ = cli("plan", "longnet-tiny", "--context", "64", "--json")
    assert code == 0
    assert [(layer["window"], layer["slots"]) for layer in json.loads(out)["layers"]] == [(8, 8), (13, 13), (None, 64)]


def test_sizes_that_are_none_are_refused(tmp_path: Path, cli: Cli) -> None:
    config = preset("longnet-tiny")
    assert isinstance(config, LongNetConfig)
    with pytest.raises(ConfigError, match="3 segments and 2 dilations"):
        dataclasses.replace(config, dilations=(1, 4))
    with pytest.raises(ConfigError, match="a segment or dilation of 0"):
        dataclasses.replace(config, dilations=(1, 0, 3))
    write_config(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"layer_segments": 16}, "layer_segments"),
        ({"layer_dilations": [1, None, 3]}, "a segment or dilation of None"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**written, **change}))
        with pytest.raises(ConfigError, match=words):
            read_config(tmp_path)
    code, _, err = cli("plan", tmp_path)
    assert code == 2 and "a segment or dilation of None" in err
