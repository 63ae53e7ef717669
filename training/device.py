"""Devices by name."""

from __future__ import annotations

import importlib

import torch

from transom.errors import TrainingError


def device_of(name: str) -> torch.device:
    """The device "cpu", "cuda", "xla" and so on.

    Raises:
        TrainingError: If there is none of that name here, or what it needs is not installed.
    """
    try:
        if name == "xla":
            xla_device: torch.device = importlib.import_module("torch_xla").device()
            return xla_device
        device = torch.device(name)
        torch.zeros(1, device=device)
    except ImportError as error:
        raise TrainingError(f"the device 'xla' needs torch-xla ({error}): pip install 'transom[torch-xla]'") from None
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"no device {name!r} here ({reason}): use --device cpu") from error
    return device
