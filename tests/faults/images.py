"""Wrong rules for images, each with the place where it is first wrong in the suite's case with images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from tests.conformance.adapters import cut_between_images
from tests.conformance.eager import Cut, Visible, positions_of_slots, same_image, visible_with_images
from tests.conformance.reference import TEXT


def visible_without_images(
    blocks: torch.Tensor, positions_T: torch.Tensor, slots: int, window: int | None
) -> torch.Tensor:
    """Images are seen as text."""
    return visible_with_images(torch.full_like(blocks, TEXT), positions_T, slots, window)


def visible_past_the_window(
    blocks: torch.Tensor, positions_T: torch.Tensor, slots: int, window: int | None
) -> torch.Tensor:
    """`(window AND causal) OR image`: an image is seen whole, however far back its start lies."""
    whole = same_image(blocks, positions_T, positions_of_slots(positions_T, slots))
    return visible_without_images(blocks, positions_T, slots, window) | whole


def visible_images_in_local_layers(
    blocks: torch.Tensor, positions_T: torch.Tensor, slots: int, window: int | None
) -> torch.Tensor:
    """Gemma 4's rule: images are bidirectional in local layers alone."""
    rule: Visible = visible_without_images if window is None else visible_with_images
    return rule(blocks, positions_T, slots, window)


def cut_anywhere(blocks: Sequence[int], chunk: int) -> list[int]:
    """Chunks end within images."""
    return [min(chunk, len(blocks) - low) for low in range(0, len(blocks), chunk)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFault:
    """A wrong rule for images.

    Attributes:
        visible: Which keys are seen.
        cut: How a feed is cut into chunks.
        layer: The first layer whose attention is wrong; None if the fault lies in the cutting.
        position: The first position that is wrong there.
    """

    visible: Visible = visible_with_images
    cut: Cut = cut_between_images
    layer: int | None = None
    position: int | None = None


IMAGE_FAULTS: Mapping[str, ImageFault] = {
    "images seen as text": ImageFault(visible=visible_without_images, layer=0, position=3),
    # The second image has 12 tokens, and the window 8: its ninth token no longer sees the first.
    "images past the window": ImageFault(visible=visible_past_the_window, layer=0, position=23),
    "images in local layers only": ImageFault(visible=visible_images_in_local_layers, layer=2, position=3),
    "images cut at a chunk's edge": ImageFault(cut=cut_anywhere),
}
