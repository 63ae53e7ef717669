"""Tensors that say nothing new: biases of zeros, and buffers that the configuration determines."""

from __future__ import annotations

import torch

from transom.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.zoo.architectures import architecture
from transom.zoo.config import DecoderConfig

_BUFFER_ERROR = {torch.float32: 2.0**-16, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Largest relative difference of a buffer: powers in float32 err by some 2^-20; the others round by half of theirs."""

_SMALLEST_HALF = 2.0**-24
"""float16 holds no finer steps than this, whatever the size of a number."""


def check_redundant(name: str, weight: Weight, config: DecoderConfig) -> None:
    """Raise `CheckpointError` if a tensor does not hold what the configuration says.

    Args:
        name: In the module's terms, without the checkpoint's prefix.
        weight: What the checkpoint holds.
        config: Of the model.
    """
    if name.endswith(".bias"):
        if torch.count_nonzero(weight.read()):
            raise CheckpointError(
                f"{weight.origin} is not zero, and the model has no biases: config.json belongs to another model"
            )
        return
    values = weight.read().double().flatten()
    expected = architecture(config.architecture).huggingface.buffer(config, name)
    if (
        expected is None
        or values.shape != expected.shape
        or not torch.allclose(
            values,
            expected,
            rtol=_BUFFER_ERROR[weight.dtype],
            atol=_SMALLEST_HALF if weight.dtype == torch.float16 else 0,
        )
    ):
        raise CheckpointError(
            f"{weight.origin} is not what config.json says of it: the model was trained with other numbers, or "
            "config.json belongs to another one"
        )
