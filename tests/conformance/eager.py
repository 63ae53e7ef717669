"""The zoo's decoder run eagerly, with images: a runtime of the suite before any compiler can do them.

It needs no soft tokens: any tokens may belong to an image, and `visible_keys` gets to know which belong to one. Faults
of it are variants again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from tests.conformance.adapters import SessionAdapter, cut_between_images
from tests.conformance.reference import TEXT
from tests.gemma import gemma_config, gemma_module
from transom.backends.runtime import Call, Result, Runtime, grown
from transom.backends.session import Session
from transom.graphs.state import State
from transom.zoo import gemma3, layers, rope
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.model import Model, load

Visible = Callable[[torch.Tensor, torch.Tensor, int, int | None], torch.Tensor]
"""(blocks of all positions, positions of the new tokens [T], slots S, window) -> what they see, bool [T, S]."""

Cut = Callable[[Sequence[int], int], list[int]]
"""(blocks of a feed, most tokens in one call) -> sizes of the calls."""


def positions_of_slots(positions_T: torch.Tensor, slots: int) -> torch.Tensor:
    """Position that each slot holds, [S]; negative: empty."""
    last = positions_T[-1]
    return last - (last - torch.arange(slots)) % slots


def same_image(blocks: torch.Tensor, positions_T: torch.Tensor, keys_S: torch.Tensor) -> torch.Tensor:
    """Whether a new token and a key belong to one image, [T, S]."""
    own, theirs = blocks[positions_T][:, None], blocks[keys_S.clamp(min=0)]
    return (own == theirs) & (own != TEXT) & (keys_S >= 0)


def visible_with_images(
    blocks: torch.Tensor, positions_T: torch.Tensor, slots: int, window: int | None
) -> torch.Tensor:
    """Slots that each new token sees: earlier ones and those of its own image; a window then hides far ones."""
    keys_S = positions_of_slots(positions_T, slots)
    distance_TS = positions_T[:, None] - keys_S
    seen_TS = ((keys_S >= 0) & (distance_TS >= 0)) | same_image(blocks, positions_T, keys_S)
    return seen_TS if window is None else seen_TS & (distance_TS < window)


# Values that `AddTaps` would name, as inputs or outputs of a layer's modules.
_INPUTS = {
    "self_attn.o_proj": "self_attn.attention",
    "pre_feedforward_layernorm": "residual.1",
    "mlp.down_proj": "mlp.activation",
}
_OUTPUTS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm",
    "self_attn.k_norm", "self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm", "mlp.down_proj",
    "post_feedforward_layernorm",
)  # fmt: skip


class Eager(Runtime):
    """The plain module with ring caches, every site tapped.

    Args:
        model: Its configuration may be a faulty one.
        chunk: Most tokens in one call.
        context: Longest sequence.
        visible: Which keys are seen.
    """

    title = "the zoo's module"

    def __init__(self, model: Model, *, chunk: int, context: int, visible: Visible = visible_with_images) -> None:
        config = gemma_config(model.config)
        super().__init__(chunk=chunk, context=context, vocab_size=config.vocab_size, states=_states(config, chunk))
        self.blocks = torch.full((context,), TEXT)
        self._visible = visible
        self._tensors: list[torch.Tensor] = []
        self._tapped: dict[str, NDArray[Any]] = {}
        self._module = gemma_module(model.eager())
        for index, layer in enumerate(self._module.layers):
            for path in _OUTPUTS:
                layer.get_submodule(path).register_forward_hook(self._keep_output(f"tap.layers.{index}.{path}"))
            for path, name in _INPUTS.items():
                layer.get_submodule(path).register_forward_pre_hook(self._keep_input(f"tap.layers.{index}.{name}"))
            layer.register_forward_hook(self._keep_output(f"tap.layers.{index}.residual.2"))
        self._module.layers[0].register_forward_pre_hook(self._keep_input("tap.embed_tokens"))
        self._module.norm.register_forward_hook(self._keep_output("tap.norm"))

    def _keep_output(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: Any, result: Any) -> None:
            self._tapped[name] = (result[0] if isinstance(result, tuple) else result).numpy()

        return hook

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: Any) -> None:
            self._tapped[name] = given[0].numpy()

        return hook

    def _seen(
        self, positions_T: torch.Tensor, slots: int, window: int | None, until_T: torch.Tensor | None = None
    ) -> torch.Tensor:
        """In the place of `visible_keys`; how far tokens see follows from the images, not from what was passed."""
        return self._visible(self.blocks, positions_T, slots, window)

    def _run(self, call: Call) -> Result:
        self._tapped = {}
        ropes = (f"tap.layers.{i}.self_attn.{x}_rope" for i in range(len(self._module.layers)) for x in "qk")
        rotate = rope.rotate

        def rotate_and_keep(x_BNTH: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
            out_BNTH = rotate(x_BNTH, *cos_sin)
            self._tapped[next(ropes)] = out_BNTH.numpy()
            return out_BNTH

        with (
            torch.no_grad(),
            mock.patch.object(layers, "visible_keys", self._seen),
            mock.patch.object(gemma3, "rotate", rotate_and_keep),
        ):
            pairs = list(zip(self._tensors[::2], self._tensors[1::2], strict=True))
            logits_BTV, written = self._module(torch.from_numpy(call.tokens), torch.tensor(call.start[0]), pairs)
        self._tensors = [tensor for pair in written for tensor in pair]
        return Result(logits=logits_BTV.numpy()[:, call.logit_positions], taps=self._tapped)

    def allocate(self, slots: int) -> None:
        old = self._tensors
        self._tensors = [torch.zeros(state.shape(slots)) for state in self.states]
        for before, after in zip(old, self._tensors, strict=False):
            grown(before, after)

    def state_arrays(self) -> Iterator[tuple[State, Any]]:
        yield from zip(self.states, self._tensors, strict=False)


def _states(config: Gemma3Config, chunk: int) -> list[State]:
    """Local layers have `window + chunk - 1` slots: the module writes before it attends."""
    windows = [layer.window for layer in config.layers]
    return [
        state
        if (window := windows[state.layer]) is None
        else dataclasses.replace(state.fixed(slots=window + chunk - 1), window=window)
        for state in config.states
    ]


class ImageAdapter(SessionAdapter):
    """Tells the session which tokens are images, and cuts between them.

    Args:
        runtime: An empty one.
        cut: How to cut a feed into chunks.
    """

    def __init__(self, runtime: Eager, cut: Cut) -> None:
        super().__init__(Session(runtime))
        self._blocks, self._cut = runtime.blocks, cut

    def feed(self, tokens: Sequence[int], blocks: Sequence[int]) -> NDArray[Any]:
        start = self.session.position
        self._blocks[start:] = TEXT
        self._blocks[start : start + len(blocks)] = torch.tensor(blocks)
        parts, low = [], 0
        for size in self._cut(blocks, self.session.chunk):
            parts.append(super().feed(tokens[low : low + size], blocks[low : low + size]))
            low += size
        return np.concatenate(parts)


class EagerRuntime:
    """The zoo's module, or a variant of it.

    Args:
        name: What to call it.
        config: Changes of the configuration, from the right one.
        visible: Which keys are seen.
        cut: How a feed is cut into chunks.
    """

    capabilities = frozenset({"image_blocks"})

    def __init__(
        self,
        name: str = "zoo, eager",
        *,
        config: Callable[[Gemma3Config], Gemma3Config] = lambda config: config,
        visible: Visible = visible_with_images,
        cut: Cut = cut_between_images,
    ) -> None:
        self.name, self._config, self._visible, self._cut = name, config, visible, cut

    def open(self, folder: Path, *, chunk: int, context: int) -> ImageAdapter:
        model = load(folder)
        changed = dataclasses.replace(model, config=self._config(gemma_config(model.config)))
        return ImageAdapter(Eager(changed, chunk=chunk, context=context, visible=self._visible), self._cut)
