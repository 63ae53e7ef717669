"""ConvertQuantized: linears and the embedding read block-quantised codes.

Precondition: packing and sharing of weights are done.
Rewrite: `linear` becomes `transom.linear_quantized`, `embedding` becomes `transom.embedding_quantized`; an embedding
and a head that share a weight share its codes. Codes that a checkpoint already holds are kept to the bit where the
scheme's grid can hold them; others are rounded to nearest.
Skips: linears with a bias.
"""

from __future__ import annotations

import torch

from transom.formats.quantized import dequantize
from transom.formats.rounding import FLOAT8, Method
from transom.formats.schemes import QuantSpec, Scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.passes.base import Pass
from transom.passes.conversion import Conversion, QuantizedRows
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.pack_projections import PackProjections
from transom.passes.share_embedding import ShareEmbedding


class ConvertQuantized(Pass):
    """Weight-only quantisation by a scheme.

    Args:
        scheme: The scheme.
        method: How scales are found of weights that are rounded.

    Attributes:
        conversions: A record a weight, or a part of a stacked one.
        specs: How the codes of every weight are held, by name.
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
            named_weight = graph.weight_of(table)
            if named_weight is None:
                continue
            spec = scheme_spec(self.scheme, *named_weight, is_table=table in tables)
            if spec is None:
                continue
            if not is_quantizable(node):
                self.skipped.append(f"{named_weight[0]}: linears with a bias are not quantised")
                continue
            if table not in codes:
                codes[table] = self._codes(graph, *named_weight, spec)
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
        source = QuantizedRows(name, weight, spec, self.method, as_shipped=self.scheme.as_shipped)
        self.conversions += source.conversions
        self.specs[name] = spec = source.spec
        block = spec.stored_block(columns)
        blocks = columns // block

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


def scheme_spec(scheme: Scheme, name: str, weight: Weight, *, is_table: bool = False) -> QuantSpec | None:
    """What a scheme makes of a weight; None leaves it as it is."""
    if len(weight.shape) != 2:
        return None
    return scheme.table if is_table else scheme.of(name)


_Codes = tuple[Node, Node, Node | None, str]


def dequantized(name: str, weight: Weight, scheme: Scheme) -> torch.Tensor:
    """Numbers of a matrix after quantisation by a scheme, float32 [R, K]; the matrix's own if the scheme leaves it out.

    Raises:
        QuantizationError: If the scheme cannot hold it, or it is not finite.
    """
    spec = scheme_spec(scheme, name, weight)
    if spec is None:
        return weight.read().float()
    source = QuantizedRows(name, weight, spec, as_shipped=scheme.as_shipped)
    codes, scales, zeros = (source.read(0, weight.shape[0], part) for part in range(3))
    return dequantize(codes, scales, None if source.spec.symmetric else zeros, source.spec.number)
