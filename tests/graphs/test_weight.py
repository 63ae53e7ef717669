"""Weights as recipes: whatever way rows are asked for, the numbers are the same."""

from __future__ import annotations

import dataclasses
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


@given(rows=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_concat_remembers_its_parts_and_their_codes(rows: list[int]) -> None:
    parts = [counted(part % 60, 2) for part in matrices(rows, 4)]
    weight = Weight.concat([Weight.concat(parts[:1]), Weight.concat(parts[1:])])
    assert weight.lattice is None and weight.parts == tuple(parts)
    assert torch.equal(torch.cat([part.read() for part in weight.parts]), weight.read())
    for narrow in weight.to(torch.bfloat16).parts:
        assert narrow.dtype == torch.bfloat16 and narrow.lattice is not None
    assert weight.map_rows(lambda block: block * 2).parts == (), "other numbers"


def test_codes_in_smaller_blocks_mean_the_same() -> None:
    lattice = counted(torch.arange(24.0).view(3, 8), 8).lattice
    assert lattice is not None and lattice.with_block(8) is lattice
    smaller = lattice.with_block(2)
    (codes, scales, zeros), (same, wide, _) = smaller.read_rows(1, 3), lattice.read_rows(1, 3)
    assert smaller.block == 2 and zeros is None
    assert torch.equal(codes, same) and torch.equal(scales, wide.repeat_interleave(4, 1))
    with_zeros = dataclasses.replace(
        lattice, symmetric=False, read_rows=lambda start, stop: (same, wide, torch.tensor([[3], [4]]))
    )
    assert torch.equal(with_zeros.with_block(4).read_rows(0, 2)[2], torch.tensor([[3, 3], [4, 4]]))  # type: ignore[arg-type]
