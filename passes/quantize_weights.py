"""QuantizeWeights: linears and the embedding read block-quantised codes.

Precondition: packing and sharing of weights are done.
Rewrite: `linear` becomes `transom.linear_quantized`, `embedding` becomes `transom.embedding_quantized`; an embedding
and a head that share a weight share its codes. Codes that a checkpoint already holds on the scheme's grid are kept as
they are; others are rounded to nearest.
Skips: linears with a bias.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from transom.graphs import ops
from transom.graphs.errors import QuantizationError
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.graphs.quantized import pack
from transom.graphs.schemes import BlockFormat, Scheme
from transom.graphs.weight import Weight
from transom.passes.base import Pass
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.pack_projections import PackProjections
from transom.passes.share_embedding import ShareEmbedding

FLOAT8 = torch.float8_e4m3fn

BLOCK_NUMBERS = 2**18
"""Numbers quantised at a time: 1 MiB of float32 stays in a core's cache, which made rounding 3 times faster."""


class QuantizeWeights(Pass):
    """Weight-only quantisation by a scheme."""

    after = (FuseGatedMLP, PackProjections, ShareEmbedding)

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def rewrite(self, graph: Graph) -> int:
        """Quantise every linear and embedding that the scheme covers."""
        embeddings = graph.calls(aten.embedding.default)
        tables = {node.args[0] for node in embeddings}
        changes = 0
        for node in [*embeddings, *graph.calls(aten.linear.default)]:
            is_embedding = node.target is aten.embedding.default
            table = node.args[0] if is_embedding else node.args[1]
            held = graph.weight_of(table)
            if held is None:
                continue
            block_format = self.scheme.embedding if table in tables else self.scheme.of_linear(held[0])
            if block_format is None:
                continue
            if not is_embedding and len(node.args) > 2 and node.args[2] is not None:
                self.skipped.append(f"{held[0]}: linears with a bias are not quantised")
                continue
            quantized = _add_codes(graph, *held, block_format)
            operation = ops.EMBEDDING_QUANTIZED if is_embedding else ops.LINEAR_QUANTIZED
            source = node.args[1] if is_embedding else node.args[0]
            with graph.fx.inserting_before(node):
                new = graph.call(operation, (source, *quantized, block_format.bits), node)
                if new.meta["val"].dtype != node.meta["val"].dtype:  # looked-up rows are float32
                    new = graph.call(aten.to.dtype, (new, node.meta["val"].dtype), node)
            node.replace_all_uses_with(new)
            changes += 1
        return changes


def _add_codes(graph: Graph, name: str, weight: Weight, fmt: BlockFormat) -> tuple[Node, Node, Node | None]:
    rows, columns = weight.shape
    try:
        fmt = fmt.fitted(columns)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from None
    grid, blocks = _Grid(name, weight, fmt), columns // fmt.block

    def part(shape: tuple[int, ...], dtype: torch.dtype, index: int) -> Weight:
        return Weight(
            shape=(rows, *shape),
            dtype=dtype,
            read_rows=lambda start, stop: grid.read(start, stop, index),
            origin=weight.origin,
        )

    code_dtype = torch.uint8 if fmt.number == "integer" else FLOAT8
    codes = graph.add_weight(f"{name}.codes", part((blocks, fmt.block * fmt.bits // 8), code_dtype, 0))
    scales = graph.add_weight(f"{name}.scales", part((blocks,), torch.float32, 1))
    if fmt.symmetric:
        return codes, scales, None
    packed = -(-blocks * fmt.bits // 8)
    return codes, scales, graph.add_weight(f"{name}.zero_points", part((packed,), torch.uint8, 2))


_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Grid:
    """Codes, scales and zero points of one weight, computed by rows.

    The three are written one after the other. Scales and zero points are small, so those that were found along with
    the codes are kept, for the weight that was read last; without that, rounding would be done three times.
    """

    _last: ClassVar[_Grid | None] = None

    def __init__(self, name: str, weight: Weight, fmt: BlockFormat) -> None:
        self.name, self.weight, self.format = name, weight, fmt
        self._rows = max(1, BLOCK_NUMBERS // weight.shape[1])
        self._found: set[int] = set()
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, start: int, stop: int, part: int) -> torch.Tensor:
        """Packed codes (part 0), scales (1) or packed zero points (2) of some rows."""
        if _Grid._last is not self:
            if _Grid._last is not None:
                _Grid._last._forget()
            _Grid._last = self
        found: torch.Tensor | None = None
        for low in range(start - start % self._rows, stop, self._rows):
            piece = self._chunk(low, part)
            first, last = max(start, low), min(stop, low + piece.shape[0])
            if found is None:
                found = piece.new_empty((stop - start, *piece.shape[1:]))
            found[first - start : last - start] = piece[first - low : last - low]
        assert found is not None, "no rows were asked for"
        return found

    def _chunk(self, low: int, part: int) -> torch.Tensor:
        high = min(low + self._rows, self.weight.shape[0])
        if part and self._kept is not None and low in self._found:
            return self._kept[part - 1][low:high]
        parts = self._quantize(low, high)
        if self._kept is None:
            # One tensor for all rows: many small ones, kept between larger temporary ones, fragment the heap.
            scales, zeros = (small.new_empty((self.weight.shape[0], small.shape[1])) for small in parts[1:])
            self._kept = scales, zeros
        for kept, small in zip(self._kept, parts[1:], strict=True):
            kept[low:high] = small
        self._found.add(low)
        return parts[part]

    def _forget(self) -> None:
        self._found, self._kept = set(), None

    def _quantize(self, start: int, stop: int) -> _Parts:
        fmt, lattice = self.format, self.weight.lattice
        integer = fmt.number == "integer"
        if lattice is not None and integer and fmt.symmetric and fmt.bits == 8 and lattice.block == fmt.block:
            signed, scales = lattice.read_rows(start, stop)
            self._check_finite(scales, start, stop)
            codes = (signed.to(torch.int16) + 128).to(torch.uint8).view(stop - start, -1, fmt.block)
            zeros = torch.empty(stop - start, 0, dtype=torch.uint8)
        else:
            rows = self.weight.read_rows(start, stop).float()
            self._check_finite(rows, start, stop)
            codes, scales, zeros = quantize_rows(rows, fmt)
        return pack(codes, fmt.bits), scales, pack(zeros, fmt.bits)

    def _check_finite(self, values: torch.Tensor, start: int, stop: int) -> None:
        if not bool(torch.isfinite(values).all()):
            raise QuantizationError(f"{self.name} holds NaN or infinity in rows {start} to {stop}: mend the checkpoint")


def quantize_rows(rows: torch.Tensor, fmt: BlockFormat) -> _Parts:
    """Round rows to their blocks' grids.

    Args:
        rows: float32 [R, K].
        fmt: The format; `fmt.block` divides K.

    Returns:
        Unpacked codes uint8 or float8_e4m3fn [R, K / block, block], scales float32 [R, K / block], and zero points
        uint8 [R, K / block] ([R, 0] if symmetric).
    """
    blocks = rows.view(rows.shape[0], -1, fmt.block)
    top = 2**fmt.bits - 1
    if fmt.number == "float8_e4m3fn":
        scales = blocks.abs().amax(-1) / torch.finfo(FLOAT8).max
        scales = torch.where(scales == 0, 1.0, scales)
        return (blocks / scales[..., None]).to(FLOAT8), scales, torch.empty(rows.shape[0], 0, dtype=torch.uint8)
    if fmt.symmetric:
        middle = 2 ** (fmt.bits - 1)
        scales = blocks.abs().amax(-1) / (middle - 1)
        scales = torch.where(scales == 0, 1.0, scales)
        codes = (torch.round(blocks / scales[..., None]) + middle).to(torch.uint8)
        return codes, scales, codes.new_empty(rows.shape[0], 0)
    # The range holds zero, so that a zero weight stays zero.
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = (high - low) / top
    scales = torch.where(scales == 0, 1.0, scales)
    zeros = torch.round(-low / scales).clamp(0, top)
    codes = torch.round(blocks / scales[..., None] + zeros[..., None]).clamp(0, top)
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)
