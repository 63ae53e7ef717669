"""Weights as recipes: whatever way rows are asked for, the numbers are the same."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from transom.graphs.weight import Codes, Lattice, Weight

heights = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def matrices(rows: list[int], width: int) -> list[torch.Tensor]:
    count = itertools.count()
    return [torch.tensor([[float(next(count)) for _ in range(width)] for _ in range(n)]).view(n, width) for n in rows]


def counted(tensor: torch.Tensor, block: int) -> Weight:
    """A weight with integer codes behind it: codes * scale, scale 0.5."""

    def read_codes(start: int, stop: int) -> Codes:
        rows = tensor[start:stop]
        return (rows * 2).to(torch.int8), torch.full((len(rows), rows.shape[1] // block), 0.5), None

    return Weight(
        shape=tuple(tensor.shape),
        dtype=torch.float32,
        read_rows=lambda start, stop: tensor[start:stop],
        origin="codes",
        lattice=Lattice(name="halves", number="int8", bits=8, block=block, symmetric=True, read_rows=read_codes),
    )


@given(rows=heights, width=st.integers(1, 4), data=st.data())
def test_concat_reads_any_range(rows: list[int], width: int, data: st.DataObject) -> None:
    parts = matrices(rows, width)
    whole, weight = torch.cat(parts), Weight.concat([Weight.of(part) for part in parts])
    assert weight.shape == tuple(whole.shape) and weight.bytes == whole.nbytes
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    assert torch.equal(weight.read_rows(start, stop), whole[start:stop])
    assert torch.equal(weight.read(), whole)


@given(rows=heights, width=st.integers(1, 4), limit=st.integers(1, 200))
def test_blocks_cover_every_row_once_within_the_limit(rows: list[int], width: int, limit: int) -> None:
    parts = matrices(rows, width)
    weight = Weight.concat([Weight.of(part) for part in parts]).map_rows(lambda block: -block)
    blocks = list(weight.blocks(limit))
    assert torch.equal(torch.cat(blocks), -torch.cat(parts))
    assert all(block.nbytes <= max(limit, width * 4) for block in blocks)
    assert len(blocks) <= -(-weight.shape[0] // max(1, limit // (width * 4)))


@given(rows=st.lists(st.integers(1, 5), min_size=2, max_size=4), data=st.data())
def test_concat_keeps_codes(rows: list[int], data: st.DataObject) -> None:
    parts = matrices(rows, 4)
    weight = Weight.concat([counted(part % 60, 2) for part in parts])
    assert weight.lattice is not None and weight.lattice.block == 2
    start = data.draw(st.integers(0, weight.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, weight.shape[0]))
    codes, scales, _ = weight.lattice.read_rows(start, stop)
    assert codes.dtype == torch.int8
    assert torch.equal(codes * scales.repeat_interleave(2, 1), weight.read_rows(start, stop))


def test_concat_with_what_has_no_codes_has_none() -> None:
    weight = Weight.concat([counted(torch.ones(3, 4), 2), Weight.of(torch.ones(2, 4))])
    assert weight.lattice is None
    assert torch.equal(weight.read(), torch.ones(5, 4))


def test_concat_of_different_blocks_has_the_smaller_ones() -> None:
    weight = Weight.concat([counted(torch.ones(3, 4), 2), counted(torch.ones(2, 4), 4)])
    assert weight.lattice is not None and weight.lattice.block == 2
    codes, scales, zeros = weight.lattice.read_rows(1, 5)
    assert codes.shape == (4, 4) and scales.shape == (4, 2) and zeros is None
    assert torch.equal(codes * scales.repeat_interleave(2, 1), torch.ones(4, 4))
