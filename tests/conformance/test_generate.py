"""The suite's files: the same each time, right by a second implementation, and what the README says of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3ForConditionalGeneration, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from tests.conformance.cases import CASES, SOFT_TOKENS, Case, cache_bounds, schedules
from tests.conformance.double import InDouble
from tests.conformance.generate import write_case, write_suite
from tests.conformance.reference import SOFT, compute_logits, encode_image, read_config, read_weights, visible
from tests.tolerances import CONFORMANCE_LOGITS, FLOAT64_LOGITS
from transom.backends.prompt import Prompt
from transom.zoo.model import load

BY_NAME = {case.name: case for case in CASES}
TEXT_CASES = [case.name for case in CASES if not case.images]
IMAGE_CASES = [case.name for case in CASES if case.images]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(suite: dict[str, Path], tmp_path: Path) -> None:
    write_suite(tmp_path)
    first = contents(next(iter(suite.values())).parent)
    assert contents(tmp_path) == first
    files = {"config.json", "model.safetensors", "inputs.npz", "expected.npz", "case.json"}
    assert set(first) == {f"{case.name}/{name}" for case in CASES for name in files}


def test_another_seed_gives_other_numbers(suite: dict[str, Path], tmp_path: Path) -> None:
    write_case(tmp_path / "other", BY_NAME["softcap"], seed=1)
    mine, theirs = (np.load(folder / "expected.npz")["logits"] for folder in (suite["softcap"], tmp_path / "other"))
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs).max() > 1


@pytest.mark.parametrize("name", TEXT_CASES)
def test_the_zoo_agrees_in_float64(name: str, suite: dict[str, Path]) -> None:
    """The reference and the zoo's module share no line."""
    tokens_T = np.load(suite[name] / "inputs.npz")["tokens"]
    config, weights = read_config(suite[name] / "config.json"), read_weights(suite[name] / "model.safetensors")
    doubled = {key: array.astype(np.float64) for key, array in weights.items()}
    with torch.no_grad(), InDouble():
        logits_BTV, _ = load(suite[name]).eager(torch.float64)(torch.tensor(tokens_T)[None], torch.tensor(0), None)
    assert np.abs(compute_logits(config, doubled, tokens_T) - logits_BTV[0].numpy()).max() < FLOAT64_LOGITS
    expected = np.load(suite[name] / "expected.npz")["logits"]
    assert expected.dtype == np.float64
    assert np.abs(compute_logits(config, weights, tokens_T) - expected).max() < FLOAT64_LOGITS


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_the_zoo_agrees_in_float64_on_images(name: str, suite: dict[str, Path]) -> None:
    inputs, expected = np.load(suite[name] / "inputs.npz"), np.load(suite[name] / "expected.npz")
    config, weights = read_config(suite[name] / "config.json"), read_weights(suite[name] / "model.safetensors")
    doubled = {key: array.astype(np.float64) for key, array in weights.items()}
    module: Any = load(suite[name], images=True).eager(torch.float64)
    with torch.no_grad(), InDouble():
        soft = module.encode_image(torch.from_numpy(inputs["pixels"])).numpy()
    assert soft.dtype == expected["soft"].dtype == np.float64
    assert np.abs(soft - expected["soft"]).max() < FLOAT64_LOGITS
    assert np.abs(encode_image(config, doubled, inputs["pixels"][0]) - soft[0]).max() < FLOAT64_LOGITS
    tokens_T, soft_ND = inputs["tokens"], soft.reshape(-1, soft.shape[-1])
    until = Prompt(tokens=tokens_T, soft=soft_ND).part(0, tokens_T.size, 0).until
    placed_TD = np.zeros((tokens_T.size, soft.shape[-1]))
    placed_TD[tokens_T == SOFT] = soft_ND
    with torch.no_grad(), InDouble():
        logits_BTV, _ = module(
            torch.tensor(tokens_T)[None],
            torch.tensor(0),
            None,
            until=torch.tensor(until),
            soft=torch.tensor(placed_TD)[None],
        )
    assert np.abs(compute_logits(config, doubled, tokens_T, soft) - logits_BTV[0].numpy()).max() < FLOAT64_LOGITS
    assert np.abs(compute_logits(config, weights, tokens_T, soft) - expected["logits"]).max() < FLOAT64_LOGITS


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_hugging_face_agrees_on_images(name: str, suite: dict[str, Path]) -> None:
    """Their whole model, which is given ids and pixels and makes its own masks, in one call."""
    inputs, expected = np.load(suite[name] / "inputs.npz"), np.load(suite[name] / "expected.npz")["logits"]
    theirs: Any = Gemma3ForConditionalGeneration.from_pretrained(
        suite[name], attn_implementation="eager", dtype=torch.float32
    )
    tokens_BT = torch.from_numpy(inputs["tokens"])[None]
    with torch.no_grad():
        logits_BTV = theirs.eval()(
            input_ids=tokens_BT.where(tokens_BT != SOFT, theirs.config.image_token_id),
            token_type_ids=(tokens_BT == SOFT).long(),
            pixel_values=torch.from_numpy(inputs["pixels"]),
        ).logits
    assert np.abs(logits_BTV[0].numpy() - expected).max() < CONFORMANCE_LOGITS


@pytest.mark.parametrize("window", [1, 5, 8, 12, 13, 64])
def test_masks_of_images_are_those_of_hugging_face(window: int) -> None:
    blocks_T = np.full(40, -1)
    for number, (start, stop) in enumerate(((0, 3), (6, 7), (9, 21), (22, 30))):
        blocks_T[start:stop] = number
    config = Gemma3TextConfig(sliding_window=window, attn_implementation="eager")
    masks = create_masks_for_vision_model(
        config=config,
        inputs_embeds=torch.zeros(1, 40, config.hidden_size),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(40)[None],
        block_sequence_ids=torch.tensor(blocks_T)[None],
    )
    for kind, width in (("full_attention", None), ("sliding_attention", window)):
        assert np.array_equal(visible(blocks_T, width), masks[kind][0, 0].numpy() == 0), kind


def test_a_text_without_images_is_causal_within_its_window() -> None:
    seen_TJ = visible(np.full(6, -1), 3)
    assert [np.flatnonzero(row).tolist() for row in seen_TJ] == [
        [0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_schedules_reach_every_edge(case: Case) -> None:
    window, by_name = case.window, {schedule["name"]: schedule for schedule in schedules(case)}
    assert {"L", "G"} == set(case.layers)
    reached = {sum(schedule["feeds"]) for schedule in by_name.values()}
    if not case.images:
        assert {n for n in (window - 1, window, window + 1, 2 * window, 3 * window + 5) if n} <= reached
    for schedule in by_name.values():
        stops = np.cumsum(schedule["feeds"])
        assert not any(start < stop < end for stop in stops for start, end in case.images), "a feed cuts an image"
        assert stops[-1] + schedule["decode"] <= case.length
    far = by_name["decode_far"]
    assert sum(far["feeds"]) + far["decode"] == case.length > 2 * case.ring
    assert far["decode"] >= case.ring or not case.images
    mixed = by_name["mixed_chunks"]
    assert max(mixed["feeds"]) > 2 * window
    assert min(mixed["feeds"]) == 1 or case.images


def test_images_reach_every_edge() -> None:
    """In rings that are written past their end, and in those that no call crosses, an image lies across the end."""
    past, within = (BY_NAME[name] for name in IMAGE_CASES)
    assert past.window < SOFT_TOKENS < within.window
    for case in (past, within):
        assert all(stop - start == SOFT_TOKENS for start, stop in case.images)
        assert any(start < case.window < stop for start, stop in case.images)
        assert any(start < case.ring < stop for start, stop in case.images)
        assert any(start < case.long_chunk < stop for start, stop in case.images)
        assert any(after == stop + 2 for (_, stop), (after, _) in itertools.pairwise(case.images))
        assert any(after > stop + 2 for (_, stop), (after, _) in itertools.pairwise(case.images))
    wrapped_early = past.ring + past.long_chunk - 1
    assert any(start < wrapped_early < stop for start, stop in past.images)


def test_cache_bounds_in_numbers(suite: dict[str, Path]) -> None:
    case = json.loads((suite["two_periods"] / "case.json").read_text())
    far = next(schedule for schedule in case["schedules"] if schedule["name"] == "decode_far")
    slot = 2 * 4 * 2 * 16  # keys and values, float32, two heads of 16
    local = {"least_slots": 15, "most_slots": 52, "least_bytes": 15 * slot, "most_bytes": 52 * slot}
    full = {"least_slots": 125, "most_slots": 125, "least_bytes": 125 * slot, "most_bytes": 125 * slot}
    assert far["caches"] == [
        {"layer": index, **(local if kind == "L" else full)} for index, kind in enumerate("LLGLLG")
    ]
    short = {"feeds": [3], "decode": 2, "chunk": 4}
    assert [bound["least_slots"] for bound in cache_bounds(BY_NAME["two_periods"], short)] == [5] * 6


def test_attention_is_far_from_uniform(suite: dict[str, Path]) -> None:
    """Otherwise a key more or less would not show: swapping far tokens must move late logits."""
    for name in TEXT_CASES:
        tokens_T = np.load(suite[name] / "inputs.npz")["tokens"]
        config, weights = read_config(suite[name] / "config.json"), read_weights(suite[name] / "model.safetensors")
        changed_T = tokens_T.copy()
        changed_T[0] = (changed_T[0] + 1) % weights["embed_tokens.weight"].shape[0]
        moved = np.abs(compute_logits(config, weights, changed_T) - compute_logits(config, weights, tokens_T)).max(1)
        assert moved[-1] > 1e-2, name
