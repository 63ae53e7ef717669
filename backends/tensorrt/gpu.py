"""Which GPU there is."""

from __future__ import annotations

import importlib.util

from transom.errors import TargetError


def this_gpu() -> tuple[int, str]:
    """Compute capability, times ten, and name of the first GPU.

    Raises:
        TargetError: If torch, which looks for it, is missing or finds none.
    """
    if importlib.util.find_spec("torch") is None:
        raise TargetError("torch, which finds the GPU, is not installed")
    import torch

    if not torch.cuda.is_available():
        raise TargetError("torch finds no GPU")
    major, minor = torch.cuda.get_device_capability()
    return int(major) * 10 + int(minor), str(torch.cuda.get_device_name())
