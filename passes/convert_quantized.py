"""ConvertQuantized: linears and the embedding read block-quantised codes.

Precondition: packing and sharing of weights are done.
Rewrite: `linear` becomes `transom.linear_quantized`, `embedding` becomes `transom.embedding_quantized`; an embedding
and a head that share a weight share its codes. Codes that a checkpoint already holds are kept to the bit where the
scheme's grid can hold them; others are rounded to nearest.
Skips: linears with a bias.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from transom.graphs import ops
from transom.graphs.errors import QuantizationError
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.graphs.quantized import decode, dequantize, pack
from transom.graphs.rounding import FLOAT8, Method, Rounded, round_rows
from transom.graphs.schemes import QuantSpec, Scheme
from transom.graphs.weight import Lattice, Weight
from transom.passes.base import Pass
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.pack_projections import PackProjections
from transom.passes.share_embedding import ShareEmbedding

BLOCK_NUMBERS = 2**18
"""Numbers quantised at a time: 1 MiB of float32 stays in a core's cache, which made rounding 3 times faster."""


@dataclasses.dataclass(kw_only=True)
class Conversion:
    """What became of one weight. Errors are known once its codes have been read from first to last.

    Attributes:
        weight: Its name.
        number: What its codes are.
        block: Columns that share a scale; all where the spec says so.
        source: Format of the checkpoint's codes; "" if it had none.
        kept: Whether those codes are kept to the bit.
        max_abs: Largest error of a number.
        error: Root of the mean squared error, as a share of the root of the mean square of the numbers.
    """

    weight: str
    number: str
    block: int
    source: str
    kept: bool
    max_abs: float = 0.0
    squares: float = 0.0
    total: float = 0.0

    @property
    def error(self) -> float:
        """See the class."""
        return float((self.squares / self.total) ** 0.5) if self.total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "weight": self.weight,
            "number": self.number,
            "block": self.block,
            "source": self.source,
            "kept": self.kept,
            "max_abs": self.max_abs,
            "error": self.error,
        }


class ConvertQuantized(Pass):
    """Weight-only quantisation by a scheme.

    Args:
        scheme: The scheme.
        method: How scales are found of weights that are rounded.

    Attributes:
        conversions: A record a weight.
        specs: Spec by name of the weight.
    """

    after = (FuseGatedMLP, PackProjections, ShareEmbedding)

    def __init__(self, scheme: Scheme, method: Method = "nearest") -> None:
        super().__init__()
        self.scheme, self.method = scheme, method
        self.conversions: list[Conversion] = []
        self.specs: dict[str, QuantSpec] = {}

    def rewrite(self, graph: Graph) -> int:
        """Quantise every linear and embedding that the scheme covers."""
        self.conversions, self.specs = [], {}
        embeddings = graph.calls(aten.embedding.default)
        tables = {node.args[0] for node in embeddings}
        codes: dict[Node, _Codes] = {}
        changes = 0
        for node in [*embeddings, *graph.calls(aten.linear.default)]:
            is_embedding = node.target is aten.embedding.default
            table = node.args[0] if is_embedding else node.args[1]
            held = graph.weight_of(table)
            if held is None:
                continue
            spec = spec_of(self.scheme, *held, is_table=table in tables)
            if spec is None:
                continue
            if not is_quantizable(node):
                self.skipped.append(f"{held[0]}: linears with a bias are not quantised")
                continue
            if table not in codes:
                codes[table] = self._codes(graph, *held, spec)
            operation = ops.EMBEDDING_QUANTIZED if is_embedding else ops.LINEAR_QUANTIZED
            source = node.args[1] if is_embedding else node.args[0]
            with graph.fx.inserting_before(node):
                new = graph.call(operation, (source, *codes[table]), node)
                if new.meta["val"].dtype != node.meta["val"].dtype:  # looked-up rows are float32
                    new = graph.call(aten.to.dtype, (new, node.meta["val"].dtype), node)
            node.replace_all_uses_with(new)
            changes += 1
        return changes

    def _codes(self, graph: Graph, name: str, weight: Weight, spec: QuantSpec) -> _Codes:
        rows, columns = weight.shape
        record, block = _record(name, weight, spec), spec.held_block(columns)
        self.conversions.append(record)
        self.specs[name] = spec
        source, blocks = _Source(name, weight, spec, record, self.method), columns // block

        def part(shape: tuple[int, ...], dtype: torch.dtype, index: int) -> Weight:
            return Weight(
                shape=(rows, *shape),
                dtype=dtype,
                read_rows=lambda start, stop: source.read(start, stop, index),
                origin=weight.origin,
            )

        code_dtype = FLOAT8 if spec.number == "float8_e4m3fn" else torch.uint8
        codes = graph.add_weight(f"{name}.codes", part((blocks, block * spec.bits // 8), code_dtype, 0))
        scales = graph.add_weight(f"{name}.scales", part((blocks,), torch.float32, 1))
        zeros = None
        if not spec.symmetric:
            packed = -(-blocks * spec.bits // 8)
            zeros = graph.add_weight(f"{name}.zero_points", part((packed,), torch.uint8, 2))
        return codes, scales, zeros, spec.number


def is_quantizable(node: Node) -> bool:
    """Whether quantised operations can take the place of an embedding or a linear: those have no bias."""
    return node.target is aten.embedding.default or len(node.args) < 3 or node.args[2] is None


_Codes = tuple[Node, Node, Node | None, str]


def spec_of(scheme: Scheme, name: str, weight: Weight, *, is_table: bool = False) -> QuantSpec | None:
    """What becomes of a weight; None leaves it as it is.

    Raises:
        QuantizationError: If its columns cannot be cut into the scheme's blocks.
    """
    if len(weight.shape) != 2 or (spec := scheme.table if is_table else scheme.of(name)) is None:
        return None
    columns, lattice = weight.shape[1], weight.lattice
    try:
        if scheme.as_shipped and lattice is not None:
            block: Any = "row" if lattice.block == columns else lattice.block
            spec = QuantSpec(number=lattice.number, block=block, symmetric=lattice.symmetric)
        spec.held_block(columns), spec.group(columns)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from None
    return spec


def _record(name: str, weight: Weight, spec: QuantSpec) -> Conversion:
    columns, lattice = weight.shape[1], weight.lattice
    return Conversion(
        weight=name,
        number=spec.number,
        block=spec.group(columns),
        source=lattice.name if lattice else "",
        kept=lattice is not None and can_hold(spec, lattice, columns),
    )


def meant_numbers(name: str, weight: Weight, scheme: Scheme) -> torch.Tensor:
    """What a matrix means once it is quantised by a scheme, float32 [R, K]; as it is if the scheme leaves it so.

    Raises:
        QuantizationError: If the scheme cannot hold it, or it is not finite.
    """
    spec = spec_of(scheme, name, weight)
    if spec is None:
        return weight.read().float()
    source = _Source(name, weight, spec, _record(name, weight, spec))
    rows = weight.shape[0]
    codes, scales, zeros = (source.read(0, rows, part) for part in range(3))
    return dequantize(codes, scales, None if spec.symmetric else zeros, spec.number)


def can_hold(spec: QuantSpec, lattice: Lattice, columns: int) -> bool:
    """Whether a spec's grid can hold a lattice's codes and scales as they are."""
    if lattice.block % spec.held_block(columns):
        return False
    if not spec.is_integer or lattice.number not in ("int4", "int8"):
        return spec.number == lattice.number
    return lattice.bits <= spec.bits and (lattice.symmetric or (not spec.symmetric and lattice.bits == spec.bits))


class _Source:
    """Codes, scales and zero points of one weight, computed by rows.

    The three are written one after the other. Scales and zero points are small, so those that were found along with
    the codes are kept, for the weight that was read last; without that, rounding would be done three times.
    """

    _last: ClassVar[_Source | None] = None

    def __init__(
        self, name: str, weight: Weight, spec: QuantSpec, record: Conversion, method: Method = "nearest"
    ) -> None:
        self.name, self.weight, self.spec, self.record, self.method = name, weight, spec, record, method
        self._rows = max(1, BLOCK_NUMBERS // weight.shape[1])
        self._measured: set[int] = set()
        self._found: set[int] = set()
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tensor_max: float | None = None

    def read(self, start: int, stop: int, part: int) -> torch.Tensor:
        """Packed codes (part 0), scales (1) or packed zero points (2) of some rows."""
        if _Source._last is not self:
            if _Source._last is not None:
                _Source._last._forget()
            _Source._last = self
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

    def _quantize(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        number = self.spec.number
        found = self._keep(start, stop) if self.record.kept else self._round(start, stop)
        zeros = found.zero_points
        if zeros is None:
            zeros = torch.empty(stop - start, 0, dtype=torch.uint8)
        return pack(found.codes, number), found.scales, pack(zeros, number)

    def _keep(self, start: int, stop: int) -> Rounded:
        """The checkpoint's own codes."""
        spec, columns = self.spec, self.weight.shape[1]
        assert self.weight.lattice is not None
        block = spec.held_block(columns)
        codes, scales, zeros = self.weight.lattice.with_block(block).read_rows(start, stop)
        self._check_finite(scales, start, stop)
        middle = 2 ** (spec.bits - 1)
        if spec.is_integer and self.weight.lattice.symmetric:
            codes = (codes.to(torch.int16) + middle).to(torch.uint8)
            zeros = None if spec.symmetric else torch.full(scales.shape, middle, dtype=torch.uint8)
        return Rounded(codes=codes.view(stop - start, -1, block), scales=scales, zero_points=zeros)

    def _round(self, start: int, stop: int) -> Rounded:
        rows = self.weight.read_rows(start, stop).float()
        self._check_finite(rows, start, stop)
        if self.spec.block == "tensor" and self._tensor_max is None:
            self._tensor_max = max(float(part.abs().max()) for part in self.weight.blocks())
        try:
            found = round_rows(rows, self.spec, self.method, tensor_max=self._tensor_max)
        except QuantizationError as error:
            raise QuantizationError(f"{self.name}, rows {start} to {stop}: {error}") from None
        if start not in self._measured:
            self._measured.add(start)
            again = decode(found.codes, found.scales, found.zero_points, self.spec.number)
            error_RK = again.view_as(rows).sub_(rows)
            self.record.max_abs = max(self.record.max_abs, float(error_RK.abs().max()))
            self.record.squares += float(error_RK.square_().sum())
            self.record.total += float(rows.square().sum())
        return found

    def _check_finite(self, values: torch.Tensor, start: int, stop: int) -> None:
        if not bool(torch.isfinite(values).all()):
            raise QuantizationError(f"{self.name} holds NaN or infinity in rows {start} to {stop}: mend the checkpoint")
