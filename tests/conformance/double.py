"""Run the zoo's model in float64 throughout; by itself it computes norms, angles and softmax in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return args[0].double() if func is torch.Tensor.float else func(*args, **given)
