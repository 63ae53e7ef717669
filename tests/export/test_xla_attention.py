"""Attention of the target `xla` against the reference body, however ring, chunk and window lie."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import WINDOW
from tests.tolerances import BF16_ATTENTION, FP32_ATTENTION
from transom.graphs import ops
from transom.graphs.ops import Mask

jax = pytest.importorskip("jax")
jax.config.update("jax_platforms", "cpu")
attention = pytest.importorskip("transom.export.xla.attention")

B, N, K, H = 2, 4, 2, 8
SCALE = 0.3

LENGTHS = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 3 * WINDOW + 5)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and a last one that is not whole, in arrays of a few dozen slots."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 6)
    monkeypatch.setattr(attention, "KEY_BLOCK", 14)
    monkeypatch.setattr(attention, "DECODE_BLOCK", 17)


def _arrays(tokens: int, slots: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, tokens, N, H), (B, tokens, K, H), (B, tokens, K, H), (B, K, slots, H), (B, K, slots, H))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _run(
    program: Any, arrays: list[torch.Tensor], start: int, count: int, until: torch.Tensor | None = None
) -> list[NDArray[np.float32]]:
    given = [jax.numpy.asarray(array.float().numpy(), str(array.dtype).removeprefix("torch.")) for array in arrays]
    until_T = None if until is None else np.pad(until.numpy().astype(np.int32), (0, arrays[0].shape[1] - count))
    return [np.asarray(output, np.float32) for output in program(*given, np.int32(start), np.int32(count), until_T)]


def _reference(
    arrays: list[torch.Tensor], start: int, count: int, mask: Mask, until: torch.Tensor | None = None
) -> list[NDArray[np.float32]]:
    q, k, v, *caches = arrays
    q, k, v, position = q[:, :count], k[:, :count], v[:, :count], torch.tensor(start)
    out = ops.attend(q, k, v, *caches, position, until, scale=SCALE, **dataclasses.asdict(mask))
    written = [
        ops.write_cache(cache, new, position, heads_first=False) for cache, new in zip(caches, (k, v), strict=True)
    ]
    return [value.float().numpy() for value in (out, *written)]


def _program(mask: Mask, **options: Any) -> Any:
    """Attention and the writes of both caches, as they stand in a step."""

    def step(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, start: Any, count: Any, until_T: Any) -> Any:
        sees = dataclasses.asdict(mask)
        out = attention.attend(q, k, v, k_cache, v_cache, start, until_T, count=count, scale=SCALE, **sees)
        pairs = (k_cache, k), (v_cache, v)
        return out, *(
            attention.write(cache, new.swapaxes(1, 2), start, count, wraps=bool(mask.reach)) for cache, new in pairs
        )

    return jax.jit(step, **options)


def _compare(
    program: Any, arrays: list[torch.Tensor], start: int, count: int, mask: Mask, until: torch.Tensor | None = None
) -> None:
    (out, *caches), (expected, *expected_caches) = (
        _run(program, arrays, start, count, until),
        _reference(arrays, start, count, mask, until),
    )
    case = f"start {start}, {count} of {arrays[0].shape[1]} tokens"
    np.testing.assert_allclose(out[:, :count], expected, atol=FP32_ATTENTION, rtol=0, err_msg=case)
    assert np.isfinite(out).all(), case
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        np.testing.assert_array_equal(cache, expected_cache, err_msg=case)


def _counts(tokens: int) -> list[int]:
    return sorted({1, (tokens + 1) // 2, max(1, tokens - 1), tokens})


@pytest.mark.parametrize(
    ("tokens", "slots"),
    [*((tokens, WINDOW) for tokens in LENGTHS), (1, WINDOW + 7), (WINDOW, WINDOW + 7), (2 * WINDOW, WINDOW + 7)],
)
def test_local_attention_is_the_reference_body(tokens: int, slots: int) -> None:
    """Any start, also far past the ring's wrap; chunks shorter and longer than the window; padding at the end."""
    program = _program(Mask(window=WINDOW))
    for start in (0, 1, WINDOW - 1, WINDOW, WINDOW + 1, slots, 3 * WINDOW + 5, 1000):
        for count in _counts(tokens):
            _compare(program, _arrays(tokens, slots, start), start, count, Mask(window=WINDOW))


@pytest.mark.parametrize(
    ("tokens", "slots"), [*((tokens, 3 * WINDOW + 5) for tokens in LENGTHS), (20, 5 * WINDOW), (64, 3 * WINDOW + 5)]
)
def test_global_attention_is_the_reference_body(tokens: int, slots: int) -> None:
    """Any start up to the cache's end, also with padding that would not fit into the cache."""
    program = _program(Mask())
    for start in (0, 1, WINDOW, slots - tokens, slots - (tokens + 1) // 2, slots - 1):
        for count in _counts(tokens):
            if 0 <= start <= slots - count:
                _compare(program, _arrays(tokens, slots, start), start, count, Mask())


@pytest.mark.parametrize("mask", [Mask(segment=16, dilation=3), Mask(window=13, dilation=4), Mask(dilation=3)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_dilated_attention_is_the_reference_body(tokens: int, mask: Mask) -> None:
    """Segments that the dilation does not divide, rings of their reach, and a cache that holds all."""
    program, slots = _program(mask), mask.reach or 6 * WINDOW
    for start in (5, 1000) if mask.reach else (17, slots - tokens):
        for count in _counts(tokens):
            _compare(program, _arrays(tokens, slots, start), start, count, mask)


@pytest.mark.parametrize(("slots", "window"), [(WINDOW, WINDOW), (5, 5), (6 * WINDOW, 0)])
def test_images_are_seen_to_their_ends(slots: int, window: int) -> None:
    """Images shorter and longer than a block of queries and than the window, at the ends of a call and in between."""
    tokens = 3 * WINDOW
    program = _program(Mask(window=window))
    for start in (0, 1, WINDOW, 2 * WINDOW + 1):
        for count in (1, tokens - 5, tokens):
            for blocks in ((), ((0, 3),), ((1, 20), (20, 30)), ((4, count),), ((count - 2, count),), ((0, count),)):
                until = start + torch.arange(count)
                for first, end in blocks:
                    until[first:end] = start + min(end, count) - 1
                _compare(program, _arrays(tokens, slots, start), start, count, Mask(window=window), until)


@pytest.mark.parametrize("tokens", [1, 6, 20, 24])
def test_an_encoder_attends_in_blocks_of_queries(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of which may not be whole."""
    monkeypatch.setattr(attention, "ENCODER_BLOCK", 6)
    arrays = [array.transpose(1, 2) for array in _arrays(tokens, 1, tokens)[:3]]
    out = attention.attend_fully(*(array.numpy() for array in arrays), scale=SCALE)
    expected = ops.full_attention(*arrays, scale=SCALE)
    np.testing.assert_allclose(np.asarray(out), expected.numpy(), atol=FP32_ATTENTION, rtol=0)


@pytest.mark.parametrize("window", [WINDOW, 0])
def test_a_chunked_prefill_and_a_long_decode_go_on_from_each_other(window: int) -> None:
    """Caches that our own programs wrote, chunks of changing length, then decode over three wraps of the ring."""
    slots = window or 6 * WINDOW
    caches = [np.zeros((B, K, slots, H), np.float32)] * 2
    expected_caches, start = [torch.zeros(B, K, slots, H)] * 2, 0
    programs = {tokens: _program(Mask(window=window)) for tokens in (1, WINDOW + 4)}
    for count in (WINDOW + 4, 7, WINDOW, *[1] * (3 * WINDOW)):
        tokens = 1 if count == 1 else WINDOW + 4
        arrays = _arrays(tokens, slots, start)[:3]
        out, *caches = _run(programs[tokens], [*arrays, *map(torch.tensor, caches)], start, count)
        expected, *rest = _reference([*arrays, *expected_caches], start, count, Mask(window=window))
        np.testing.assert_allclose(out[:, :count], expected, atol=FP32_ATTENTION, rtol=0, err_msg=str(start))
        expected_caches, start = [torch.tensor(cache) for cache in rest], start + count


@pytest.mark.parametrize(("tokens", "slots", "window"), [(1, WINDOW, WINDOW), (20, WINDOW, WINDOW), (20, 80, 0)])
def test_bfloat16_adds_up_in_float32(tokens: int, slots: int, window: int) -> None:
    arrays = _arrays(tokens, slots, 3, torch.bfloat16)
    exact = _reference([array.float() for array in arrays], 40, tokens, Mask(window=window))[0]
    out = _run(_program(Mask(window=window)), arrays, 40, tokens)[0]
    np.testing.assert_allclose(out, exact, atol=BF16_ATTENTION, rtol=0)


@pytest.mark.parametrize(("tokens", "slots", "window"), [(1, WINDOW, WINDOW), (20, WINDOW, WINDOW), (20, 80, 0)])
def test_what_hidden_slots_hold_does_not_matter(tokens: int, slots: int, window: int) -> None:
    """A fresh cache's slots and the padding may hold anything that is finite."""
    arrays = _arrays(tokens, slots, 5)
    count = max(1, tokens - 4)
    clean = _run(_program(Mask(window=window)), arrays, 0, count)[0]
    for array in arrays[3:]:
        array += 1e4
    for array in arrays[1:3]:
        array[:, count:] += 1e4
    np.testing.assert_array_equal(_run(_program(Mask(window=window)), arrays, 0, count)[0][:, :count], clean[:, :count])


@pytest.mark.parametrize(("tokens", "slots", "window"), [(1, WINDOW, WINDOW), (20, WINDOW, WINDOW), (20, 80, 0)])
def test_donated_caches_come_back_in_the_same_memory(tokens: int, slots: int, window: int) -> None:
    program = _program(Mask(window=window), donate_argnums=(3, 4))
    given = [array.numpy() for array in _arrays(tokens, slots, 0)]
    memory = program.lower(*given, np.int32(0), np.int32(tokens), None).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(cache.nbytes for cache in given[3:])
