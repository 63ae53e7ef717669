"""The plain module as a session, its intermediate values taken by hooks: nothing is traced, nothing rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.artifact import CacheRecord
from transom.backends.session import Float, Session
from transom.validation.oracle import round_weights
from transom.zoo.model import Model
from transom.zoo.rope import rotate, rotation


class EagerSession(Session):
    """The model file run as it stands, with caches that grow.

    Args:
        model: The model; its weights are read into memory here.
        quant: Scheme whose numbers the weights are rounded to.
        context: Longest sequence, in tokens.
        chunk: Most new tokens in one call.
    """

    def __init__(self, model: Model, quant: str, *, context: int, chunk: int) -> None:
        config = model.config
        records = [
            CacheRecord(
                name=f"cache.{layer}.{kind}",
                layer=layer,
                window=None,
                slots=None,
                heads=config.num_kv_heads,
                width=config.head_dim,
                dtype="float32",
            )
            for layer in range(config.num_layers)
            for kind in ("key", "value")
        ]
        super().__init__(context=context, chunk=chunk, vocab_size=config.vocab_size, caches=records)
        self._config, self._module = config, model.eager()
        if quant != "none":
            round_weights(self._module, model.trace(), quant)
        self._tensors: list[torch.Tensor] = []
        for path, module in self._module.named_modules():
            self._watch(path, module)

    def _watch(self, path: str, module: torch.nn.Module) -> None:
        """Keep what goes into a module, or comes out of it, under the name of its tap."""
        parent, _, last = path.rpartition(".")
        layer = int(path.split(".")[1]) if path.startswith("layers.") else self._config.num_layers
        before = {
            "input_layernorm": f"layers.{layer - 1}.residual.2" if layer else "embed_tokens",
            "pre_feedforward_layernorm": f"{parent}.residual.1",
            "o_proj": f"{parent}.attention",
            "down_proj": f"{parent}.activation",
            "norm": f"layers.{layer - 1}.residual.2",
        }.get(last)
        if before is not None:
            module.register_forward_pre_hook(lambda _, args: self._keep(before, args[0]))
        if last.endswith("norm") or (last.endswith("_proj") and last not in ("gate_proj", "up_proj")):
            module.register_forward_hook(lambda _, __, value: self._keep(path, value))
        if last in ("q_norm", "k_norm"):
            module.register_forward_hook(lambda _, __, value: self._rotate(path.replace("norm", "rope"), layer, value))

    def _keep(self, path: str, value: torch.Tensor) -> None:
        self.tapped[f"tap.{path}"] = value.numpy()

    def _rotate(self, path: str, layer: int, x_BTNH: torch.Tensor) -> None:
        """The rotation is a function, so no hook sees it: it is called once more."""
        config: Any = self._config
        rope = config.rope_local if config.layer_kinds[layer] == "local" else config.rope_global
        positions_T = self.position + torch.arange(x_BTNH.shape[1])
        self._keep(path, rotate(x_BTNH.transpose(1, 2), *rotation(positions_T, rope, config.head_dim)))

    def _run(self, tokens: NDArray[np.int64], logit_positions: NDArray[np.int64]) -> Float:
        self.tapped = {}
        pairs = list(zip(self._tensors[0::2], self._tensors[1::2], strict=True))
        with torch.no_grad():
            logits_BTV, written = self._module(torch.from_numpy(tokens)[None], torch.tensor(self.position), pairs)
        self._tensors = [tensor for pair in written for tensor in pair]
        logits: Float = logits_BTV[0, torch.from_numpy(logit_positions)].numpy()
        return logits

    def _allocate(self, slots: int) -> None:
        grown = [torch.zeros(1, cache.heads, slots, cache.width) for cache in self.caches]
        for old, new in zip(self._tensors, grown, strict=False):
            new[:, :, : old.shape[2]] = old
        self._tensors = grown

    def _cache_arrays(self) -> Iterator[tuple[CacheRecord, Any]]:
        yield from zip(self.caches, self._tensors, strict=False)
