"""What a bisection knows of the model that ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from transom.formats.quantized import decode
from transom.formats.rounding import round_rows
from transom.formats.schemes import QuantSpec, scheme
from transom.graphs.weight import Weight
from transom.passes.convert_quantized import dequantized
from transom.validation.tolerances import TAPS
from transom.zoo.gemma3 import Gemma3Config as DecoderConfig
from transom.zoo.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The model, and what it was run on.

    Attributes:
        config: Its configuration.
        weights: Its weights by name, read only when a site differs.
        tokens: The ids that ran, from position 0 on.
        quant: Quantisation scheme of the runs.
        tolerance: Share of the largest value of a position up to which values agree.
        blocks: Spans (first, last + 1) of positions that see each other, such as an image's.
    """

    config: DecoderConfig
    weights: Mapping[str, Weight]
    tokens: Sequence[int]
    quant: str = "none"
    tolerance: float = TAPS
    blocks: tuple[tuple[int, int], ...] = ()

    def weight(self, name: str) -> torch.Tensor:
        """A weight as the scheme means it, float32."""
        weight = self.weights[name]
        return weight.read().float() if len(weight.shape) < 2 else dequantized(name, weight, scheme(self.quant))

    def spec(self, name: str) -> QuantSpec | None:
        """How the scheme of the runs holds a matrix; None as it is."""
        return scheme(self.quant).of(name)

    def rope(self, layer: int, *, other: bool = False) -> Rope:
        """Rotary embedding of a layer, or that of the other kind of layer."""
        is_local = (self.config.layer_kinds[layer] == "local") is not other
        return self.config.rope_local if is_local else self.config.rope_global


def rounded(numbers: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """What a matrix float32 [R, K] means once it is rounded to nearest."""
    encoded = round_rows(numbers, spec, tensor_max=float(numbers.abs().max()))
    return decode(encoded.codes, encoded.scales, encoded.zero_points, spec.number).view_as(numbers)
