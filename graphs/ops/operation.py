"""How a fused operation is registered: its reference body is its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

BODIES: dict[Any, Callable[..., Any]] = {}
"""Reference body of every fused operation, by the operation as graphs name it."""


def operation(body: Callable[..., Any]) -> CustomOpDef:
    """Register `torch.ops.transom.NAME` of a body named so, and note the body, which the dispatcher hides."""
    name = body.__name__
    registered = torch.library.custom_op(f"transom::{name}", body, mutates_args=())
    BODIES[getattr(torch.ops.transom, name).default] = body
    return registered


def differentiate(registered: CustomOpDef) -> None:
    """Let an operation that models call have gradients: those of its body, run once more."""
    body = BODIES[registered._opoverload]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        values = [
            None if tensor is None else tensor.detach().requires_grad_(tensor.is_floating_point())
            for tensor in ctx.saved_tensors
        ]
        with torch.enable_grad():
            results = body(*values)
        pairs = [pair for pair in zip(results, gradients, strict=True) if pair[1] is not None]
        wanted = [value for value in values if value is not None and value.requires_grad]
        sources, weights = zip(*pairs, strict=True)
        computed = iter(torch.autograd.grad(sources, wanted, weights, allow_unused=True))
        return tuple(next(computed) if value is not None and value.requires_grad else None for value in values)

    registered.register_autograd(backward, setup_context=save)
