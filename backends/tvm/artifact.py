"""Names that the exporter and the session of the target agree on."""

from __future__ import annotations

LIBRARY, PARAMETERS = "model.so", "params.safetensors"

DECODE, PREFILL = "decode", "prefill"
"""Functions of the library: one new token of which the logits are wanted, and anything else."""
