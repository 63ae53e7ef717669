"""What a bisection knows of the model that ran: its graph as traced, cut at the taps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from transom.backends.prompt import Prompt
from transom.backends.runtime import Float
from transom.formats.quantized import decode
from transom.formats.rounding import round_rows
from transom.formats.schemes import QuantSpec, is_table, scheme
from transom.graphs.graph import Graph, Tap
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.passes.convert_quantized import dequantized
from transom.validation.tolerances import TAPS

LOGITS = "logits"
"""Stands among the taps for what a session returns."""

_PLACES = ("start", "until", "logit_positions")
"""Inputs that say where tokens stand, not what they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """A weight, and what becomes of its rows float32; those of a large vocabulary are never in memory at once."""

    weight: Weight
    change: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows

    def read(self) -> torch.Tensor:
        """All rows."""
        return self.change(self.weight.read().float())

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of some ids, [*ids.shape, K]."""
        unique, index = torch.unique(ids, return_inverse=True)
        rows = torch.cat([self.weight.read_rows(int(row), int(row) + 1) for row in unique])
        return self.change(rows.float())[index]

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ rows.T`."""
        blocks = [torch.nn.functional.linear(x, self.change(block.float())) for block in self.weight.blocks()]
        return torch.cat(blocks, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A tap, and the part of the graph between it and its nearest tapped ancestors.

    Attributes:
        tap: The tap: its layer, and the operation that computes the value.
        inputs: Tapped ancestors, and the names of their taps.
        nodes: All nodes from the inputs on, in order of execution; weights and other placeholders among them.
        moving: Those whose numbers depend on an input, or on the tokens or pixels.
    """

    tap: Tap
    node: Node
    inputs: Mapping[Node, str]
    nodes: tuple[Node, ...]
    moving: frozenset[Node]

    @property
    def op(self) -> str:
        """What a verdict calls the operation, as long as nothing closer is known."""
        return "softmax" if self.tap.op == "attention" else self.tap.op

    def calls(self, *targets: object) -> list[Node]:
        """Calls of some operations."""
        return [node for node in self.nodes if node.op == "call_function" and node.target in targets]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The model, and what it was run on.

    Attributes:
        graph: An entry of it as traced in float32, with taps. Weights are read only when a site differs.
        tokens: What ran, from position 0 on: ids, or a prompt with soft tokens of images.
        pixels: What ran in the place of tokens, if the entry encodes images, float32 [1, 3, S, S].
        quant: Quantisation scheme of the runs.
        tolerance: Share of the largest value of a position up to which values agree.
        blocks: Spans (first, last + 1) of positions that see each other, beside those of images in the prompt.
    """

    graph: Graph
    tokens: Sequence[int] | Prompt = ()
    pixels: Float | None = None
    quant: str = "none"
    tolerance: float = TAPS
    blocks: tuple[tuple[int, int], ...] = ()

    @property
    def result(self) -> str:
        """What the graph is run for."""
        return self.graph.output_names[0]

    @property
    def result_words(self) -> str:
        """The same, in words."""
        return "logits" if self.result == LOGITS else "soft tokens"

    @functools.cached_property
    def prompt(self) -> Prompt:
        """The tokens that ran."""
        return Prompt.of(self.tokens)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and end of every span of positions that see each other."""
        return [*self.blocks, *self.prompt.blocks()]

    @functools.cached_property
    def given(self) -> dict[str, torch.Tensor]:
        """What the graph takes for all positions at once, by name; neither states nor where the call stands."""
        if self.pixels is not None:
            return {"pixels": torch.from_numpy(self.pixels)}
        total = len(self.prompt)
        call = self.prompt.part(0, total, 0)
        given = {"tokens": torch.from_numpy(call.tokens)}
        if (soft := self.graph.inputs.get("soft")) is not None:
            given |= {"until": torch.arange(total), "soft": torch.zeros(1, total, soft.meta["val"].shape[-1])}
        if call.until is not None and call.soft is not None:
            given |= {"until": torch.from_numpy(call.until), "soft": torch.from_numpy(call.soft)}
        return given

    @functools.cached_property
    def taps(self) -> dict[str, tuple[Tap, Node]]:
        """Every tap and its node; the result last."""
        result = Tap(name=self.result, layer=None, op=LOGITS if self.result == LOGITS else "projection")
        return {tap.name: (tap, self.graph.outputs[tap.name]) for tap in (*self.graph.taps, result)}

    @functools.cached_property
    def weight_names(self) -> dict[str, str]:
        """Weight name by the placeholder that holds it."""
        return self.graph.weight_names()

    def site(self, tap: str) -> Site:
        """Cut the graph at a tap and at those before it."""
        record, node = self.taps[tap]
        others = {other: name for name, (_, other) in self.taps.items() if other is not node}
        upstream, stack = {node}, [node]
        while stack:
            for used in stack.pop().all_input_nodes:
                if used not in upstream:
                    upstream.add(used)
                    if used not in others:
                        stack.append(used)
        nodes = [each for each in self.graph.fx.nodes if each in upstream]
        # What runs is the input of what comes before the first tap.
        passed = {used for name, used in self.graph.inputs.items() if name not in {*_PLACES, *self.graph.states}}
        moving = {*passed, *others}
        for each in nodes:
            if "sym_size" not in str(each.target) and any(used in moving for used in each.all_input_nodes):
                moving.add(each)
        return Site(
            tap=record,
            node=node,
            inputs={each: others[each] for each in nodes if each in others},
            nodes=tuple(nodes),
            moving=frozenset(moving.intersection(nodes)),
        )

    def sites(self, op: str) -> list[Site]:
        """Every site of one operation."""
        return [self.site(name) for name, (tap, _) in self.taps.items() if tap.op == op]

    def sites_of_layer(self, layer: int | None) -> list[Site]:
        """Every site of one layer; none outside of the layers."""
        return [self.site(name) for name, (tap, _) in self.taps.items() if layer is not None and tap.layer == layer]

    def weights(self, site: Site) -> dict[Node, str]:
        """Names of the weights that a site reads."""
        return {node: self.weight_names[node.name] for node in site.nodes if node.name in self.weight_names}

    def axis(self, tap: str) -> int:
        """Axis of the positions of a tap's value, without the batch; the first where all sizes are fixed."""
        return positions_axis(self.taps[tap][1])

    def spec(self, name: str) -> QuantSpec | None:
        """How the scheme of the runs holds a matrix; None as it is."""
        return scheme(self.quant).of(name) if len(self.graph.weights[name].shape) == 2 else None

    def rows(self, name: str) -> Rows:
        """A weight as the scheme means it."""
        weight, spec = self.graph.weights[name], self.spec(name)
        if spec is None:
            return Rows(weight=weight)
        if is_table(name):
            return Rows(weight=weight, change=lambda rows: rounded(rows, spec))
        return Rows(weight=Weight.of(dequantized(name, weight, scheme(self.quant))))


def positions_axis(node: Node) -> int:
    """See `Context.axis`."""
    shape = node.meta["val"].shape[1:]
    return next((axis for axis, size in enumerate(shape) if not isinstance(size, int)), 0)


def rounded(numbers: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """What a matrix float32 [R, K] means once it is rounded to nearest."""
    encoded = round_rows(numbers, spec, tensor_max=float(numbers.abs().max()))
    return decode(encoded.codes, encoded.scales, encoded.zero_points, spec.format).view_as(numbers)
