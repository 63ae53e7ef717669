"""The bodies of fused operations against plain arithmetic, and the formula of ring caches by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.graphs import ops

transom = torch.ops.transom


@given(
    start=st.integers(0, 60),
    tokens=st.integers(1, 12),
    slots=st.integers(1, 40),
    window=st.integers(0, 20),
    segment=st.integers(0, 12),
    dilation=st.integers(1, 5),
)
def test_rings_show_what_a_plain_list_would(
    start: int, tokens: int, slots: int, window: int, segment: int, dilation: int
) -> None:
    """Simulate the ring with a dictionary, one token after the other."""
    ring: dict[int, int] = {}
    for position in range(start + tokens):
        ring[position % slots] = position
    seen_TS = ops.visible(start, tokens, slots, ops.Mask(window=window, segment=segment, dilation=dilation))
    assert seen_TS.shape == (tokens, slots)
    for row, position in enumerate(range(start, start + tokens)):
        for slot in range(slots):
            key = ring.get(slot)
            expected = key is not None and (
                key <= position
                and (not window or position - key < window)
                and (not segment or key // segment == position // segment)
                and (position - key) % dilation == 0
            )
            assert bool(seen_TS[row, slot]) == expected, (position, slot)
    assert bool(seen_TS[-1].any()), "a token always sees itself"


BOUNDED = st.builds(
    lambda size, kind, dilation: ops.Mask(**{kind: size}, dilation=dilation),
    st.integers(1, 20),
    st.sampled_from(["window", "segment"]),
    st.integers(1, 5),
)
"""Masks with a bound on how far back a token sees."""


@settings(max_examples=30)
@given(mask=BOUNDED, chunk=st.integers(1, 12))
def test_what_a_ring_holds_is_what_can_still_be_read(mask: ops.Mask, chunk: int) -> None:
    """With reach + chunk - 1 slots no call misses a key; with one fewer, some call does, so that none is idle."""
    starts, slots = range(3 * 20), mask.reach + chunk - 1
    counts = [ops.visible(start, chunk, 200, mask).sum() for start in starts]
    assert [ops.visible(start, chunk, slots, mask).sum() for start in starts] == counts
    if slots > 1:
        assert [ops.visible(start, chunk, slots - 1, mask).sum() for start in starts] != counts


@given(mask=BOUNDED)
def test_every_slot_is_read_by_a_later_token(mask: ops.Mask) -> None:
    """Before some token, all positions that a ring of its reach keeps beside the token's own are yet to be read."""
    at = torch.arange(120)
    last_reader_S = torch.where(ops.seen(at, at, mask), at[:, None], -1).amax(0)
    kept = max(int((last_reader_S[:position] >= position).sum()) for position in range(60))
    # Of segments that the dilation does not divide, the last tokens are of fewer residues than it has.
    assert kept == mask.reach - 1 if mask.segment % mask.dilation == 0 else 0 <= mask.reach - 1 - kept < mask.dilation


@pytest.mark.parametrize("window", [0, 3])
def test_attention_is_torchs(window: int) -> None:
    noise = torch.Generator().manual_seed(0)
    q_BNTH = torch.randn(2, 4, 7, 8, generator=noise)
    k_BKTH, v_BKTH = (torch.randn(2, 2, 7, 8, generator=noise) for _ in range(2))
    mask_TT = torch.ones(7, 7, dtype=torch.bool).tril()
    if window:
        mask_TT = mask_TT.triu(1 - window)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q_BNTH, k_BKTH, v_BKTH, mask_TT, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(transom.attention(q_BNTH, k_BKTH, v_BKTH, None, scale=0.3, window=window), expected)


def test_fake_shapes_are_real_shapes() -> None:
    """`opcheck` compares each fake body with the real one, also under tracing."""
    x, weight, start = torch.randn(2, 3, 4, 8), torch.randn(8), torch.tensor(5)
    table_TH, cache = torch.randn(3, 4), torch.randn(2, 2, 6, 8)
    new = torch.randn(2, 3, 2, 8)
    codes = torch.randint(0, 255, (10, 2, 4), dtype=torch.uint8)
    scales, zeros = torch.rand(10, 2), torch.randint(0, 255, (10, 1), dtype=torch.uint8)
    calls: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...] = (
        (transom.rms_norm, (x, weight, 1e-6), {}),
        (transom.add_rms_norm, (x, x, weight, 1e-6), {}),
        (transom.rotary, (x, table_TH, table_TH, False), {}),
        (transom.rotary, (x.transpose(1, 2), table_TH, table_TH, True), {}),
        (transom.rotary, (x, table_TH, table_TH, False, True), {}),
        *((transom.gated, (x, activation), {}) for activation in ops.ACTIVATIONS),
        (transom.write_cache, (cache, new.transpose(1, 2), start), {"heads_first": True}),
        (transom.write_cache, (cache[:, :, :2], new, start), {"heads_first": False}),
        (transom.attention, (x.transpose(1, 2), cache, cache, start), {"scale": 0.5, "window": 4}),
        (transom.attend, (x, new, new, cache, cache, start), {"scale": 0.5, "window": 4}),
        (transom.linear_quantized, (torch.randn(3, 16), codes, scales, zeros, "int4"), {}),
        (transom.linear_quantized, (torch.randn(3, 8), codes, scales, None, "int8"), {}),
        (transom.embedding_quantized, (torch.tensor([[1, 9]]), codes, scales, zeros, "int4"), {}),
    )
    for op, args, options in calls:
        torch.library.opcheck(op.default, args, options, test_utils=("test_schema", "test_faketensor"))
