"""Fused operations, each with a reference body, so that a graph runs in eager PyTorch after every pass.

The bodies are the definition: a lowering is right when it gives the same numbers. Axis letters as in the model files;
a window of 0 means that every earlier key is seen (a global layer).
"""

from transom.graphs.ops.attention import (
    ATTEND,
    ATTENTION,
    FULL_ATTENTION,
    WRITE_CACHE,
    attend,
    full_attention,
    seen,
    slot_positions,
    visible,
    write_cache,
)
from transom.graphs.ops.experts import (
    CLAMPED_SWIGLU,
    EXPERTS,
    EXPERTS_QUANTIZED,
    SWIGLU_LIMIT,
    SWIGLU_SLOPE,
    experts,
    experts_quantized,
)
from transom.graphs.ops.layers import (
    ACTIVATIONS,
    ADD_RMS_NORM,
    GATED,
    RMS_NORM,
    ROTARY,
    add_rms_norm,
    gated,
    rms_norm,
    rotary,
)
from transom.graphs.ops.mask import Mask
from transom.graphs.ops.operation import BODIES
from transom.graphs.ops.quantized import (
    EMBEDDING_QUANTIZED,
    LINEAR_QUANTIZED,
    ROUND_ACTIVATIONS,
    embedding_quantized,
    linear_quantized,
    round_activations,
)
from transom.graphs.ops.summaries import (
    CAUSAL_CONVOLUTION,
    DELTA_PIECE,
    DELTA_RULE,
    LEAST_NORM,
    PIECE,
    STATE_SPACE,
    TOKEN_SHIFT,
    causal_convolution,
    delta_rule,
    state_space,
    token_shift,
)

__all__ = [
    "ACTIVATIONS",
    "ADD_RMS_NORM",
    "ATTEND",
    "ATTENTION",
    "BODIES",
    "CAUSAL_CONVOLUTION",
    "CLAMPED_SWIGLU",
    "DELTA_PIECE",
    "DELTA_RULE",
    "EMBEDDING_QUANTIZED",
    "EXPERTS",
    "EXPERTS_QUANTIZED",
    "FULL_ATTENTION",
    "GATED",
    "LEAST_NORM",
    "LINEAR_QUANTIZED",
    "PIECE",
    "RMS_NORM",
    "ROTARY",
    "ROUND_ACTIVATIONS",
    "STATE_SPACE",
    "SWIGLU_LIMIT",
    "SWIGLU_SLOPE",
    "TOKEN_SHIFT",
    "WRITE_CACHE",
    "Mask",
    "add_rms_norm",
    "attend",
    "causal_convolution",
    "delta_rule",
    "embedding_quantized",
    "experts",
    "experts_quantized",
    "full_attention",
    "gated",
    "linear_quantized",
    "rms_norm",
    "rotary",
    "round_activations",
    "seen",
    "slot_positions",
    "state_space",
    "token_shift",
    "visible",
    "write_cache",
]
