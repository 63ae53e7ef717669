from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transom.zoo.architectures import preset
from transom.zoo.checkpoints.random import random_weights

# Wide enough that one tensor spans several blocks of draws.
CONFIG = dataclasses.replace(preset("gemma3-tiny"), vocab_size=3000)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_numbers_do_not_depend_on_how_rows_are_split(first: int, second: int) -> None:
    weight = random_weights(CONFIG, 1)["embed_tokens.weight"]
    start, stop = sorted((first, second))
    parts = [weight.read_rows(0, start), weight.read_rows(start, stop), weight.read_rows(stop, 3000)]
    assert torch.equal(torch.cat(parts), weight.read())


def test_numbers_depend_on_seed_and_name() -> None:
    name, other = "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"
    weights = random_weights(CONFIG, 1)
    assert torch.equal(weights[name].read(), random_weights(CONFIG, 1)[name].read())
    assert not torch.equal(weights[name].read(), random_weights(CONFIG, 2)[name].read())
    assert not torch.equal(weights[name].read(), weights[other].read())


def test_numbers_are_the_same_on_every_machine() -> None:
    head = random_weights(CONFIG, 0)["norm.weight"].read_rows(0, 3)
    assert head.tolist() == pytest.approx([3.940967321395874, 3.949014663696289, 4.08046293258667], rel=1e-6)


def test_deviations() -> None:
    weights = {name: weight.read() for name, weight in random_weights(CONFIG, 0).items()}
    assert weights["layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert weights["embed_tokens.weight"].std().item() == pytest.approx(0.5 * 64**-0.5, rel=0.05)
    assert weights["layers.0.input_layernorm.weight"].std().item() == pytest.approx(0.1, rel=0.3)
