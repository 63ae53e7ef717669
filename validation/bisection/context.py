"""What a bisection knows of the model that ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from transom.graphs.quantized import dequantize, pack
from transom.graphs.schemes import BlockFormat, scheme
from transom.graphs.weight import Weight
from transom.passes.quantize_weights import quantize_rows
from transom.validation.tolerances import TAPS
from transom.zoo.config import DecoderConfig, Rope


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
        numbers, fmt = self.weights[name].read().float(), self.block_format(name)
        return numbers if fmt is None or numbers.dim() < 2 else rounded(numbers, fmt)

    def block_format(self, name: str) -> BlockFormat | None:
        """How the scheme of the runs holds a matrix; None as it is."""
        made = scheme(self.quant)
        return made.embedding if name == "embed_tokens.weight" else made.of_linear(name)

    def rope(self, layer: int, *, other: bool = False) -> Rope:
        """Rotary embedding of a layer, or that of the other kind of layer."""
        is_local = (self.config.layer_kinds[layer] == "local") is not other
        return self.config.rope_local if is_local else self.config.rope_global


def rounded(numbers: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """What a matrix float32 [R, K] means once it is quantised."""
    fmt = fmt.fitted(numbers.shape[1])
    codes, scales, zeros = quantize_rows(numbers, fmt)
    zero_points = None if fmt.symmetric else pack(zeros, fmt.bits)
    return dequantize(pack(codes, fmt.bits), scales, zero_points, fmt.bits)
