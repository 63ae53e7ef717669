"""Mistakes of models that see images, planted in the zoo's module or in what cuts its calls, each with the cases of the
suite that must notice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch

from tests.conformance.adapters import PlainRuntime, StageRuntime
from tests.conformance.runner import Runtime
from transom.backends import session
from transom.backends.prompt import Prompt
from transom.backends.runtime import Call
from transom.zoo import layers
from transom.zoo.gemma3_vision import Projector
from transom.zoo.layers import visible_keys

Seen = Callable[[torch.Tensor, int, int | None, torch.Tensor | None], torch.Tensor]
"""As `visible_keys`: positions of new tokens [T], slots S, window, last position that each sees [T]; bool [T, S]."""

Plant = Callable[[pytest.MonkeyPatch], None]

PAST, BOTH = ("image_past_window",), ("image_past_window", "image_in_window")
"""Cases: the one with images longer than the window, and the one whose images are shorter too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFault:
    """A mistake.

    Attributes:
        plant: Makes it.
        red: The cases with images that it must turn red; it leaves the others green.
        kinds: Kinds of what the suite finds.
        runtime: What it is planted in.
    """

    plant: Plant
    red: tuple[str, ...] = BOTH
    kinds: frozenset[str] = frozenset({"logits"})
    runtime: Callable[[], Runtime] = PlainRuntime


def _mask(seen: Seen) -> Plant:
    def planted(
        positions_T: torch.Tensor, slots: int, window: int | None, until_T: torch.Tensor | None, pattern: object
    ) -> torch.Tensor:
        assert pattern is None
        return seen(positions_T, slots, window, until_T)

    return lambda patch: patch.setattr(layers, "visible_keys", planted)


def seen_as_text(
    positions_T: torch.Tensor, slots: int, window: int | None, until_T: torch.Tensor | None = None
) -> torch.Tensor:
    """No token sees ahead."""
    return visible_keys(positions_T, slots, window)


def _keys(positions_T: torch.Tensor, slots: int) -> torch.Tensor:
    """Position that each slot holds, [S]."""
    return positions_T[-1] - (positions_T[-1] - torch.arange(slots)) % slots


def _window_on_both_sides(
    positions_T: torch.Tensor, slots: int, window: int | None, until_T: torch.Tensor | None = None
) -> torch.Tensor:
    """A window bounds how far ahead a token sees, too."""
    seen_TS = visible_keys(positions_T, slots, window, until_T)
    return seen_TS if window is None else seen_TS & (_keys(positions_T, slots) - positions_T[:, None] < window)


def _past_the_window(
    positions_T: torch.Tensor, slots: int, window: int | None, until_T: torch.Tensor | None = None
) -> torch.Tensor:
    """`(window AND causal) OR image`: an image is seen whole, however far back its start lies."""
    seen_TS = visible_keys(positions_T, slots, window, until_T)
    if until_T is None:
        return seen_TS
    # Tokens of an image see as far as each other, and it stands whole in one call.
    keys_S, first = _keys(positions_T, slots), positions_T[0]
    until_S = until_T[(keys_S - first).clamp(0, len(until_T) - 1)]
    return seen_TS | ((keys_S >= first) & (until_S == until_T[:, None]))


def _in_local_layers_only(
    positions_T: torch.Tensor, slots: int, window: int | None, until_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Gemma 4's rule: global layers are causal."""
    return visible_keys(positions_T, slots, window, None if window is None else until_T)


def _pooling_transposed(patch: pytest.MonkeyPatch) -> None:
    """Patches are taken column after column."""
    forward = Projector.forward

    def spoilt(self: Projector, x_BPE: torch.Tensor) -> torch.Tensor:
        side = self.patches
        return forward(self, x_BPE.view(len(x_BPE), side, side, -1).transpose(1, 2).flatten(1, 2))

    patch.setattr(Projector, "forward", spoilt)


def _norm_without_its_one(patch: pytest.MonkeyPatch) -> None:
    """Soft tokens are multiplied by w in place of 1 + w."""
    forward = Projector.forward

    def spoilt(self: Projector, x_BPE: torch.Tensor) -> torch.Tensor:
        self.mm_soft_emb_norm.offset = 0.0
        return forward(self, x_BPE)

    patch.setattr(Projector, "forward", spoilt)


def _cut_anywhere(patch: pytest.MonkeyPatch) -> None:
    """Calls end within images, whose tokens then see no further than their call reaches."""
    part = Prompt.part

    def ends_here(self: Prompt, first: int, end: int, position: int) -> Call:
        soft = None if self.soft is None else self.soft[: int((self.tokens[:end] < 0).sum())]
        return part(Prompt(tokens=self.tokens[:end], soft=soft), first, end, position)

    patch.setattr(session, "_before_block", lambda blocks, low, high: high)
    patch.setattr(Prompt, "part", ends_here)


_SOFT = frozenset({"soft", "logits"})

IMAGE_FAULTS: Mapping[str, ImageFault] = {
    "images seen as text": ImageFault(plant=_mask(seen_as_text)),
    # An image has 16 tokens, and the shorter window 8.
    "a window on both sides": ImageFault(plant=_mask(_window_on_both_sides), red=PAST),
    "images past the window": ImageFault(plant=_mask(_past_the_window), red=PAST),
    "images in local layers only": ImageFault(plant=_mask(_in_local_layers_only)),
    "an image that is cut": ImageFault(plant=_cut_anywhere, runtime=lambda: StageRuntime("xla")),
    "pooling transposed": ImageFault(plant=_pooling_transposed, kinds=_SOFT),
    "a norm of soft tokens without its one": ImageFault(plant=_norm_without_its_one, kinds=_SOFT),
}
