"""FakeQuantize: weights are rounded to the scheme's grids and back, with gradients, in a graph that stays float.

Precondition: `ShareEmbedding` has run, if it is in the list.
Rewrite: every weight that a linear, an embedding or a mixture of experts reads, and the scheme covers, goes through
`transom.fake_quantize`, once for all who read it. Scales (and zero points) become weights of the graph, NAME.divisors
and NAME.zero_points, which can be trained.
Skips: weights that the scheme leaves out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from transom.formats.rounding import Grid, Method, find_grid
from transom.formats.schemes import QuantSpec, Scheme
from transom.graphs.fake_quantize import FAKE_QUANTIZE
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.passes.base import Pass, Rewrite
from transom.passes.convert_quantized import scheme_spec
from transom.passes.fuse_experts import VIEWS, rows_of_experts
from transom.passes.share_embedding import ShareEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeQuantized(Rewrite):
    """What `FakeQuantize` did.

    Attributes:
        specs: Spec by name of the weight.
    """

    specs: Mapping[str, QuantSpec]


class FakeQuantize(Pass):
    """Rounded weights that can be trained.

    Args:
        scheme: The scheme.
        method: How scales are found at first.
    """

    after = (ShareEmbedding,)

    def __init__(self, scheme: Scheme, method: Method = "nearest") -> None:
        self.scheme, self.method = scheme, method

    def rewrite(self, graph: Graph) -> FakeQuantized:
        """Round every weight that the scheme covers."""
        specs: dict[str, QuantSpec] = {}
        tables = {node.args[0] for node in graph.calls(aten.embedding.default)}
        rounded: dict[Node, Node] = {}
        views = [
            node for node in graph.calls(*VIEWS) if node.meta["val"].dim() == 3 and rows_of_experts(graph, node, 2)
        ]
        for node in [*graph.calls(aten.embedding.default, aten.linear.default), *views]:
            index = 1 if node.target is aten.linear.default else 0
            table = node.args[index]
            named_weight = graph.weight_of(table)
            if named_weight is None:
                continue
            spec = scheme_spec(self.scheme, *named_weight, is_table=table in tables)
            if spec is None:
                continue
            if table not in rounded:
                specs[named_weight[0]] = spec
                grid = self._grid(graph, *named_weight, spec)
                with graph.fx.inserting_before(node):
                    rounded[table] = graph.call(FAKE_QUANTIZE, (table, *grid, spec.key), node)
            node.update_arg(index, rounded[table])
        return FakeQuantized(changes=len(rounded), specs=specs)

    def _grid(self, graph: Graph, name: str, weight: Weight, spec: QuantSpec) -> tuple[Node, Node | None]:
        groups = weight.shape[1] // spec.group(weight.shape[1])

        def read(start: int, stop: int) -> Grid:
            rows = weight.read_rows(start, stop).float()
            largest = None
            if spec.block == "tensor":
                largest = max(float(part.abs().max()) for part in weight.blocks())
            return find_grid(rows.view(len(rows), groups, -1), spec, self.method, tensor_max=largest)

        def zeros(start: int, stop: int) -> torch.Tensor:
            zero_points = read(start, stop).zero_points
            assert zero_points is not None, f"{name}: {spec.describe()} has no zero points"
            return zero_points

        def part(suffix: str, read_rows: object) -> Node:
            shape = (weight.shape[0], groups)
            part_weight = Weight(shape=shape, dtype=torch.float32, read_rows=read_rows, origin=weight.origin)  # type: ignore[arg-type]
            return graph.add_weight(f"{name}.{suffix}", part_weight)

        divisors = part("divisors", lambda start, stop: read(start, stop).divisors.contiguous())
        return divisors, None if spec.symmetric else part("zero_points", zeros)
