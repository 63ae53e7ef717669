"""The second front door to XLA: a graph lowered by torch-xla, for those who build on it.

Our own lowering is the first: torch-xla's last release needs torch 2.9 and marks no donated caches. Both give TPU code
of the same quality. It stands in an extra of its own, as no environment can hold it beside a newer torch:
`pip install 'transom[torch-xla]'`.
"""

from __future__ import annotations

from typing import Any

import torch

from transom.errors import TargetError
from transom.graphs.graph import Graph
from transom.graphs.inline import inline


def lower(graph: Graph, *, tokens: int, slots: int, positions: int = 1) -> Any:
    """StableHLO of one call with sizes that are numbers.

    Args:
        graph: A `decode` graph; the passes of the target "xla" give it bounded caches.
        tokens: T, new tokens in a call.
        slots: S of caches that grow.
        positions: P, positions whose logits are wanted.

    Returns:
        torch-xla's `StableHLOGraphModule`: callable with (tokens [1, T], start [], logit_positions [P], caches...), and
        `get_stablehlo_bytecode("forward")` is what other XLA front ends load. A bfloat16 one comes without weights and
        cannot be called: torch-xla crashes over a bfloat16 state dict.

    Raises:
        TargetError: If torch-xla is not installed.
        TraceError: If the graph is no `decode` graph.
    """
    try:
        from torch_xla.stablehlo import StableHLOExportOptions, exported_program_to_stablehlo
    except ImportError as error:
        raise TargetError(
            f"torch-xla is missing ({error}): pip install 'transom[torch-xla]' into an environment with torch 2.9"
        ) from error
    program = inline(graph, tokens=tokens, slots=slots, positions=positions)
    half = any(weight.dtype is torch.bfloat16 for weight in graph.weights.values())
    return exported_program_to_stablehlo(program, StableHLOExportOptions(export_weights=not half))
