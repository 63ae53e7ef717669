"""Weights as recipes: whatever way rows are asked for, the numbers are the same."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from transom.formats.quantized import dequantize
from transom.graphs.encoded import Codes, Encoded
from transom.graphs.weight import Weight, read_all, read_blocks

heights = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


def matrices(rows: list[int], width: int) -> list[torch.Tensor]:
    count = itertools.count()
    return [torch.tensor([[float(next(count)) for _ in range(width)] for _ in range(n)]).view(n, width) for n in rows]


def counted(tensor: torch.Tensor, block: int) -> Weight:
    """A weight with integer codes behind it: codes * scale, scale 0.5."""

    def read_codes(start: int, stop: int) -> Codes:
        rows = tensor[start:stop]
        return (rows * 2).to(torch.int8), torch.full((len(rows), rows.shape[1] // block), 0.5), None

    encoded = Encoded(
        name="halves",
        shape=tuple(tensor.shape),
        format="int8",
        bits=8,
        block=block,
        symmetric=True,
        read_rows=read_codes,
    )
    return dataclasses.replace(Weight.of(tensor, "codes"), encoded=encoded)


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


def noted(rows: int, reads: list[tuple[int, int]]) -> Encoded:
    """Random codes of 4 bits with zero points in two blocks of 16, which note what is read of them."""
    generator = torch.Generator().manual_seed(rows)
    codes, zeros = (torch.randint(0, 16, (rows, n), generator=generator, dtype=torch.uint8) for n in (32, 2))
    scales = torch.rand(rows, 2, generator=generator)

    def read_codes(start: int, stop: int) -> Codes:
        reads.append((start, stop))
        return codes[start:stop], scales[start:stop], zeros[start:stop]

    return Encoded(
        name="noted", shape=(rows, 32), format="int4", bits=4, block=16, symmetric=False, read_rows=read_codes
    )


@given(rows=st.lists(st.integers(1, 9), min_size=2, max_size=4), data=st.data())
def test_stacked_codes_are_read_in_any_range(rows: list[int], data: st.DataObject) -> None:
    parts = [noted(count, []) for count in rows]
    stacked = Encoded.stack([Encoded.stack(parts[:1]), *parts[1:]])  # type: ignore[list-item]
    assert stacked is not None and stacked.shape == (sum(rows), 32)
    start = data.draw(st.integers(0, sum(rows) - 1))
    stop = data.draw(st.integers(start + 1, sum(rows)))
    expected = torch.cat([part.dequantized() for part in parts])
    assert torch.equal(stacked.decode(stacked.read_rows(start, stop)), expected[start:stop])


def test_one_pass_yields_codes_scales_and_zero_points() -> None:
    reads: list[tuple[int, int]] = []
    rows = 600_001  # two blocks, the last with an odd number of rows
    named = dict(zip(("codes", "scales", "zeros"), Weight.parts_of(noted(rows, reads), "noted"), strict=True))
    parts = {name: weight for name, weight in named.items() if weight is not None}
    parts["bytes"] = parts["codes"].map_rows(lambda block: block.flatten(1), row_shape=(16,))
    parts["plain"] = Weight.of(torch.arange(5.0))
    whole = read_all(parts)
    assert len(reads) == 2 and reads[0][0] == 0 and reads[1] == (reads[0][1], rows) and reads[0][1] % 2 == 0
    assert {name: tensor.shape for name, tensor in whole.items()} == {
        name: torch.Size(weight.shape) for name, weight in parts.items()
    }
    assert torch.equal(whole["bytes"], whole["codes"].flatten(1)) and torch.equal(whole["plain"], torch.arange(5.0))
    numbers = dequantize(whole["codes"], whole["scales"], whole["zeros"], "int4")
    assert torch.equal(numbers, noted(rows, []).dequantized())
    assert all(torch.equal(weight.read(), whole[name]) for name, weight in parts.items())
    assert {name for name, _, _ in read_blocks(parts)} == set(parts)


def test_reordered_codes_are_read_once() -> None:
    """In blocks of whole groups; a block that ended within one had the rest of it read twice."""
    reads: list[tuple[int, int]] = []
    rows, order = 700_000, [*range(0, 70_000, 2), *range(1, 70_000, 2)]
    codes = Weight.parts_of(noted(rows, reads).reorder_rows(order), "noted")[0]
    whole = read_all({"codes": codes})["codes"]
    assert len(reads) > 1 and [start for start, _ in reads] == [0, *(stop for _, stop in reads[:-1])]
    assert torch.equal(
        whole.view(10, 70_000, -1),
        read_all({"codes": Weight.parts_of(noted(rows, []), "noted")[0]})["codes"].view(10, 70_000, -1)[:, order],
    )


def test_what_no_format_holds_together_is_not_stacked() -> None:
    with_zeros = noted(4, [])
    symmetric = counted(torch.zeros(4, 32), 16).encoded
    wide = counted(torch.zeros(4, 64), 16).encoded
    assert symmetric is not None and wide is not None
    assert Encoded.stack([with_zeros, symmetric]) is None
    assert Encoded.stack([symmetric, wide]) is None
    floats = dataclasses.replace(symmetric, format="sfp8")
    assert Encoded.stack([symmetric, floats]) is None
    assert Encoded.stack([symmetric, symmetric]) is not None


def test_codes_in_smaller_blocks_mean_the_same() -> None:
    encoded = counted(torch.arange(24.0).view(3, 8), 8).encoded
    assert encoded is not None and encoded.with_block(8) is encoded
    smaller = encoded.with_block(2)
    (codes, scales, zeros), (same, wide, _) = smaller.read_rows(1, 3), encoded.read_rows(1, 3)
    assert smaller.block == 2 and zeros is None
    assert torch.equal(codes, same) and torch.equal(scales, wide.repeat_interleave(4, 1))
    with_zeros = dataclasses.replace(
        encoded, symmetric=False, read_rows=lambda start, stop: (same, wide, torch.tensor([[3], [4]]))
    )
    assert torch.equal(with_zeros.with_block(4).read_rows(0, 2)[2], torch.tensor([[3, 3], [4, 4]]))  # type: ignore[arg-type]
