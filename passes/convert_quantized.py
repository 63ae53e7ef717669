"""ConvertQuantized: linears and the embedding read block-quantised codes.

Precondition: sharing of weights is done; packing is not, as packed projections are stacked codes.
Rewrite: `linear` becomes `transom.linear_quantized`, and an addition if it has a bias; `embedding` becomes
`transom.embedding_quantized`, and `experts` `transom.experts_quantized`; an embedding and a head that share a weight
share its codes. Codes that a checkpoint
already holds are kept to the bit where the scheme's grid can hold them; others are rounded to nearest.
Skips: weights that the scheme leaves out; experts of which it leaves out one of two matrices, which are reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from transom.errors import QuantizationError
from transom.formats.rounding import Method
from transom.formats.schemes import QuantSpec, Scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, layer_path
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.passes.base import Pass, Rewrite
from transom.passes.conversion import Conversion, encode
from transom.passes.fold_constants import FoldConstants
from transom.passes.linears import CodeNodes, add_codes
from transom.passes.share_embedding import ShareEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted(Rewrite):
    """What `ConvertQuantized` did.

    Attributes:
        conversions: A record a weight.
        specs: How the codes of every weight are held, by name.
    """

    conversions: tuple[Conversion, ...]
    specs: Mapping[str, QuantSpec]


class ConvertQuantized(Pass):
    """Weight-only quantisation by a scheme.

    Args:
        scheme: The scheme.
        method: How scales are found of weights that are rounded.
    """

    after = (FoldConstants, ShareEmbedding)

    def __init__(self, scheme: Scheme, method: Method = "nearest") -> None:
        self.scheme, self.method = scheme, method

    def rewrite(self, graph: Graph) -> Converted:
        """Quantise every linear and embedding that the scheme covers."""
        embeddings = graph.calls(aten.embedding.default)
        tables = {node.args[0] for node in embeddings}
        codes: dict[Node, CodeNodes] = {}
        conversions: list[Conversion] = []
        specs: dict[str, QuantSpec] = {}
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
            if table not in codes:
                name, weight = named_weight
                encoded, record = encode(name, weight, spec, self.method)
                codes[table] = add_codes(graph, name, encoded, weight.origin)
                conversions.append(record)
                specs[name] = spec
            operation = ops.EMBEDDING_QUANTIZED if is_embedding else ops.LINEAR_QUANTIZED
            source = node.args[1] if is_embedding else node.args[0]
            with graph.fx.inserting_before(node):
                new = graph.call(operation, (source, *codes[table]), node)
                if new.meta["val"].dtype != node.meta["val"].dtype:  # looked-up rows are float32
                    new = graph.call(aten.to.dtype, (new, node.meta["val"].dtype), node)
                if not is_embedding and node.args[2:] and node.args[2] is not None:
                    new = graph.call(aten.add.Tensor, (new, node.args[2]), node)
            node.replace_all_uses_with(new)
            changes += 1
        skipped: list[str] = []
        for node in graph.calls(ops.EXPERTS):
            named_matrices = [named for matrix in node.args[3:5] if (named := graph.weight_of(matrix))]
            wanted = [
                (name, weight, spec)
                for name, weight in named_matrices
                if (spec := scheme_spec(self.scheme, name, weight)) is not None
            ]
            if len(wanted) < 2:
                if wanted:
                    skipped.append(f"{layer_path(node)}: the scheme leaves one of its two matrices as it is")
                continue
            parts: list[Any] = []
            for name, weight, spec in wanted:
                encoded, record = encode(name, weight, spec, self.method)
                parts += add_codes(graph, name, encoded, weight.origin)
                conversions.append(record)
                specs[name] = spec
            with graph.fx.inserting_before(node):
                arguments = (*node.args[:3], *parts, *node.args[5:])
                node.replace_all_uses_with(graph.call(ops.EXPERTS_QUANTIZED, arguments, node))
            changes += 1
        return Converted(changes=changes, skipped=tuple(skipped), conversions=tuple(conversions), specs=specs)


def scheme_spec(scheme: Scheme, name: str, weight: Weight, *, is_table: bool = False) -> QuantSpec | None:
    """What a scheme makes of a weight, as shipped what its codes are; None leaves it as it is.

    Raises:
        QuantizationError: If the spec cannot hold so many columns.
    """
    spec = scheme.table if is_table else scheme.of(name)
    if spec is None or len(weight.shape) != 2:
        return None
    columns, encoded = weight.shape[1], weight.encoded
    try:
        if scheme.as_shipped and encoded is not None:
            block: Any = "row" if encoded.block == columns else encoded.block
            spec = QuantSpec(
                format=encoded.format, block=block, symmetric=encoded.symmetric, has_offsets=encoded.has_offsets
            )
        spec.stored_block(columns), spec.group(columns)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from None
    return spec


def dequantized(name: str, weight: Weight, scheme: Scheme) -> torch.Tensor:
    """Numbers of a matrix after quantisation by a scheme, float32 [R, K]; the matrix's own if the scheme leaves it out.

    Raises:
        QuantizationError: If the scheme cannot hold it, or it is not finite.
    """
    spec = scheme_spec(scheme, name, weight)
    if spec is None:
        return weight.read().float()
    return encode(name, weight, spec)[0].dequantized()
