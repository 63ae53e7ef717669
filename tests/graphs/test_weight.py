"""Weights as recipes: whatever way rows are asked for, the numbers are the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transom.graphs.weight import Lattice, Weight

heights = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def matrices(rows: list[int], width: int) -> list[torch.Tensor]:
    count = itertools.count()
    return [torch.tensor([[float(next(count)) for _ in range(width)] for _ in range(n)]).view(n, width) for n in rows]


def counted(tensor: torch.Tensor, block: int) -> Weight:
    """A weight with integer codes behind it: codes * scale, scale 0.5."""

    def read_codes(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = tensor[start:stop]
        return (rows * 2).to(torch.int8), torch.full((len(rows), rows.shape[1] // block), 0.5)

    return Weight(
        shape=tuple(tensor.shape),
        dtype=torch.float32,
        read_rows=lambda start, stop: tensor[start:stop],
        origin="codes",
        lattice=Lattice(block=block, read_rows=read_codes),
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
    codes, scales = weight.lattice.read_rows(start, stop)
    assert codes.dtype == torch.int8
    assert torch.equal(codes * scales.repeat_interleave(2, 1), weight.read_rows(start, stop))


@pytest.mark.parametrize("other", [Weight.of(torch.ones(2, 4)), counted(torch.ones(2, 4), 4)], ids=["none", "another"])
def test_concat_of_different_grids_has_none(other: Weight) -> None:
    weight = Weight.concat([counted(torch.ones(3, 4), 2), other])
    assert weight.lattice is None
    assert torch.equal(weight.read(), torch.ones(5, 4))


def test_codes_survive_a_change_of_dtype_but_not_a_change_of_numbers() -> None:
    weight = counted(torch.ones(3, 4), 2)
    assert weight.to(torch.float32) is weight
    assert weight.to(torch.bfloat16).lattice is weight.lattice
    assert weight.to(torch.bfloat16).read().dtype == torch.bfloat16
    assert weight.map_rows(lambda rows: rows + 1).lattice is None


def test_map_rows_states_the_new_shape_and_dtype() -> None:
    weight = Weight.of(torch.arange(12.0).view(3, 4))
    sums = weight.map_rows(lambda rows: rows.sum(1).to(torch.int64), row_shape=(), dtype=torch.int64)
    assert (sums.shape, sums.dtype, sums.bytes) == ((3,), torch.int64, 24)
    assert sums.read().tolist() == [6, 22, 38]


def test_a_scalar_is_one_block() -> None:
    assert [block.item() for block in Weight.of(torch.tensor(3.5)).blocks(1)] == [3.5]


def test_parts_that_do_not_stack_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot stack"):
        Weight.concat([Weight.of(torch.ones(2, 3)), Weight.of(torch.ones(2, 4))])
    with pytest.raises(ValueError, match="cannot stack"):
        Weight.concat([Weight.of(torch.ones(2, 3)), Weight.of(torch.ones(2, 3).double())])
