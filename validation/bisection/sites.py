"""The sites of a decoder that `AddTaps` names: what each one computes, from which values and which weights."""

from __future__ import annotations

import dataclasses
import re

LOGITS = "logits"
"""Stands among the taps for what a session returns."""

_OPS = (
    (r"(^|\.)embed_tokens$", "embedding"),
    (r"norm$", "norm"),
    (r"_proj$", "projection"),
    (r"_rope$", "rope"),
    (r"\.attention$", "attention"),
    (r"\.activation$", "activation"),
    (r"\.residual\.\d+$", "residual"),
    (r"^logits$", "logits"),
)

_ATTENTION, _MLP = "self_attn", "mlp"
# Inputs of the sites of a layer; the stream before the layer is "stream".
_INPUTS: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("stream",),
    f"{_ATTENTION}.q_proj": ("input_layernorm",),
    f"{_ATTENTION}.k_proj": ("input_layernorm",),
    f"{_ATTENTION}.v_proj": ("input_layernorm",),
    f"{_ATTENTION}.q_norm": (f"{_ATTENTION}.q_proj",),
    f"{_ATTENTION}.k_norm": (f"{_ATTENTION}.k_proj",),
    f"{_ATTENTION}.q_rope": (f"{_ATTENTION}.q_norm",),
    f"{_ATTENTION}.k_rope": (f"{_ATTENTION}.k_norm",),
    f"{_ATTENTION}.attention": (f"{_ATTENTION}.q_rope", f"{_ATTENTION}.k_rope", f"{_ATTENTION}.v_proj"),
    f"{_ATTENTION}.o_proj": (f"{_ATTENTION}.attention",),
    "post_attention_layernorm": (f"{_ATTENTION}.o_proj",),
    "residual.1": ("stream", "post_attention_layernorm"),
    "pre_feedforward_layernorm": ("residual.1",),
    f"{_MLP}.activation": ("pre_feedforward_layernorm",),
    f"{_MLP}.down_proj": (f"{_MLP}.activation",),
    "post_feedforward_layernorm": (f"{_MLP}.down_proj",),
    "residual.2": ("residual.1", "post_feedforward_layernorm"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Where a tap stands.

    Attributes:
        tap: Its name.
        layer: Index of the layer; None before the first and after the last.
        op: What computes the value; "unknown" if the name does not tell.
        inputs: Taps that it is computed from; empty if that is not known.
        path: Path of the module, which is also its weight's name less ".weight".
    """

    tap: str
    layer: int | None
    op: str
    inputs: tuple[str, ...]
    path: str

    @property
    def prefix(self) -> str:
        """Path of the layer, with a dot at the end; empty outside of layers."""
        return "" if self.layer is None else f"layers.{self.layer}."


def op_of(tap: str) -> str:
    """What computes the value of a tap, by its name."""
    path = tap.removeprefix("tap.")
    return next((op for pattern, op in _OPS if re.search(pattern, path)), "unknown")


def site(tap: str, num_layers: int) -> Site:
    """Find a tap's place in a decoder.

    Args:
        tap: Its name.
        num_layers: Layers of the decoder.
    """
    path = tap.removeprefix("tap.")
    match = re.match(r"layers\.(\d+)\.(.+)", path)
    layer = int(match[1]) if match else None
    if match and layer is not None:
        names = _INPUTS.get(match[2], ())
        inputs = tuple(_stream(layer) if name == "stream" else f"tap.layers.{layer}.{name}" for name in names)
    else:
        inputs = {"norm": (_stream(num_layers),), LOGITS: ("tap.norm",)}.get(path, ())
    return Site(tap=tap, layer=layer, op=op_of(tap), inputs=inputs, path=path)


def _stream(layer: int) -> str:
    """The residual stream before a layer."""
    return f"tap.layers.{layer - 1}.residual.2" if layer else "tap.embed_tokens"
