"""Planted faults, each of a kind that real runtimes had. The suite is worth something if every one turns it red.

Three ways to plant one: a pass put into a target's pipeline, a model whose configuration is a little wrong, and wrong
rules for images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from tests.conformance.adapters import StageRuntime, cut_between_images
from tests.conformance.eager import Cut, Visible, held_positions, same_image, visible_with_images
from tests.conformance.reference import TEXT
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.passes.base import Pass, Rewrite
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_norms import FuseNorms
from transom.passes.fuse_rotary import FuseRotary
from transom.zoo.gemma3 import Gemma3Config

# Graphs of this case, LLG with a window of 13, are spoilt.
CASE, LOCAL, GLOBAL, WINDOW = "odd_window", 1, 2, 13


class SpoilWindow(Pass):
    """One layer's attention gets another window; 0 sees every earlier key."""

    after = (FuseAttention,)

    def __init__(self, layer: int, window: int) -> None:
        self.layer, self.window = layer, window

    def rewrite(self, graph: Graph) -> Rewrite:
        """Change one number."""
        graph.calls(ops.ATTENTION)[self.layer].update_kwarg("window", self.window)
        return Rewrite(changes=1)


class SpoilScale(Pass):
    """One layer's scores get another factor."""

    after = (FuseAttention,)

    def __init__(self, layer: int, scale: float) -> None:
        self.layer, self.scale = layer, scale

    def rewrite(self, graph: Graph) -> Rewrite:
        """Change one number."""
        graph.calls(ops.ATTENTION)[self.layer].update_kwarg("scale", self.scale)
        return Rewrite(changes=1)


class SwapRotary(Pass):
    """All layers of one kind get the rotation of the other kind."""

    after = (FuseRotary,)

    def __init__(self, layers: Sequence[int], other: int) -> None:
        self.layers, self.other = layers, other

    def rewrite(self, graph: Graph) -> Rewrite:
        """Swap cosines and sines; queries and keys of every layer are rotated, in this order."""
        rotations = graph.calls(ops.ROTARY)
        _, cos, sin, _ = rotations[2 * self.other].args
        for node in [rotations[2 * layer + part] for layer in self.layers for part in (0, 1)]:
            node.args = (node.args[0], cos, sin, node.args[3])
        return Rewrite(changes=2 * len(self.layers))


class ForgetNormOffset(Pass):
    """One norm multiplies by `w` in place of `1 + w`."""

    after = (FuseNorms,)

    def __init__(self, path: str) -> None:
        self.path = path

    def rewrite(self, graph: Graph) -> Rewrite:
        """Give the norm another weight."""
        for node in graph.calls(ops.RMS_NORM):
            held = graph.weight_of(node.args[1])
            if held is not None and held[0].startswith(f"{self.path}.weight"):
                bare = held[1].map_rows(lambda rows: rows - 1)
                node.update_arg(1, graph.add_weight(f"{self.path}.bare", bare))
                return Rewrite(changes=1)
        return Rewrite(changes=0)


class BoundTooFewSlots(BoundLocalCaches):
    """`window` slots, as if every call had one token, in a graph that writes its caches before it attends."""

    def __init__(self) -> None:
        super().__init__(chunk=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphFault:
    """A pass that spoils a pipeline.

    Attributes:
        make: Makes the pass.
        behind: The pass that it is put behind.
        replaces: Whether it takes the place of that pass.
        layer: Where the first wrong number is.
        op: What computes it, in the words of `validation.bisect`.
        bytes_too: Whether the caches have a wrong size besides.
    """

    make: Callable[[], Pass]
    behind: type[Pass]
    replaces: bool = False
    layer: int
    op: str
    bytes_too: bool = False

    def plant(self, passes: Sequence[Pass]) -> list[Pass]:
        """The pipeline with the fault in it."""
        found: list[Pass] = []
        for current in passes:
            if not (self.replaces and isinstance(current, self.behind)):
                found.append(current)
            if isinstance(current, self.behind):
                found.append(self.make())
        return found


GRAPH_FAULTS: Mapping[str, GraphFault] = {
    "window one too long": GraphFault(
        make=lambda: SpoilWindow(LOCAL, WINDOW + 1), behind=FuseAttention, layer=LOCAL, op="mask", bytes_too=True
    ),
    "window one too short": GraphFault(
        make=lambda: SpoilWindow(LOCAL, WINDOW - 1), behind=FuseAttention, layer=LOCAL, op="mask"
    ),
    "window ignored": GraphFault(
        make=lambda: SpoilWindow(LOCAL, 0), behind=FuseAttention, layer=LOCAL, op="mask", bytes_too=True
    ),
    "window ignored, cache bounded": GraphFault(
        make=lambda: SpoilWindow(LOCAL, 0), behind=BoundLocalCaches, layer=LOCAL, op="mask"
    ),
    "global layer bounded": GraphFault(
        make=lambda: SpoilWindow(GLOBAL, WINDOW), behind=FuseAttention, layer=GLOBAL, op="mask", bytes_too=True
    ),
    "global rotation in local layers": GraphFault(
        make=lambda: SwapRotary((0, LOCAL), GLOBAL), behind=FuseRotary, layer=0, op="rope"
    ),
    "local rotation in global layers": GraphFault(
        make=lambda: SwapRotary((GLOBAL,), LOCAL), behind=FuseRotary, layer=GLOBAL, op="rope"
    ),
    "cache of window slots": GraphFault(
        make=BoundTooFewSlots, behind=BoundLocalCaches, replaces=True, layer=0, op="cache write"
    ),
    "norm without its one": GraphFault(
        make=lambda: ForgetNormOffset("layers.1.post_attention_layernorm"), behind=FuseNorms, layer=1, op="norm"
    ),
    "scores without their scale": GraphFault(
        make=lambda: SpoilScale(GLOBAL, 1.0), behind=FuseAttention, layer=GLOBAL, op="softmax"
    ),
}


class SpoiltStageRuntime(StageRuntime):
    """The graph that a target's passes leave, with a fault among them. `onnx` writes its caches before it attends."""

    def __init__(self, name: str, fault: GraphFault, target: str = "onnx") -> None:
        super().__init__(target)
        self.name, self._fault = name, fault

    def passes(self, chunk: int) -> list[Pass]:
        return self._fault.plant(super().passes(chunk))


ConfigFault = Callable[[Gemma3Config], Gemma3Config]


def _of_layer(index: int) -> ConfigFault:
    """Every layer is taken to be as one of them."""
    return lambda config: dataclasses.replace(config, layer_kinds=(config.layer_kinds[index],) * config.num_layers)


def _period_of_two(config: Gemma3Config) -> Gemma3Config:
    """A pattern is guessed from the first global layer, and repeated."""
    period = config.layer_kinds[: config.layer_kinds.index("global") + 1]
    kinds = (period * config.num_layers)[: config.num_layers]
    return dataclasses.replace(config, layer_kinds=kinds)


def _round_window(config: Gemma3Config) -> Gemma3Config:
    """The window is rounded up to a multiple of 8."""
    return dataclasses.replace(config, window=-(-config.window // 8) * 8)


def _scale_of_width(config: Gemma3Config) -> Gemma3Config:
    """The score's factor is taken from the width of a head."""
    return dataclasses.replace(config, attention_scale=config.head_dim**-0.5)


def _no_rope_factor(config: Gemma3Config) -> Gemma3Config:
    """Position scaling is forgotten."""
    return dataclasses.replace(config, rope_global=dataclasses.replace(config.rope_global, factor=1.0))


def _rope_factor_everywhere(config: Gemma3Config) -> Gemma3Config:
    """Position scaling is applied to local layers too."""
    factor = config.rope_global.factor
    return dataclasses.replace(config, rope_local=dataclasses.replace(config.rope_local, factor=factor))


def _no_softcap(config: Gemma3Config) -> Gemma3Config:
    """The bound on the logits is forgotten."""
    return dataclasses.replace(config, logit_softcap=None)


CONFIG_FAULTS: Mapping[str, tuple[ConfigFault, tuple[str, ...]]] = {
    # The fault, and every case that it must turn red.
    "every layer as the first": (
        _of_layer(0),
        ("two_periods", "one_global", "global_first", "odd_window", "window_one", "one_kv_head", "wide_heads",
         "rope_factor", "softcap", "image_blocks"),
    ),
    "a guessed period": (_period_of_two, ("one_global", "global_first", "image_blocks")),
    "window rounded up": (_round_window, ("odd_window", "window_one")),
    "scale of the head's width": (_scale_of_width, ("wide_heads",)),
    "no rope factor": (_no_rope_factor, ("rope_factor",)),
    "rope factor in local layers": (_rope_factor_everywhere, ("rope_factor",)),
    "no softcap": (_no_softcap, ("softcap",)),
}  # fmt: skip


def visible_without_images(
    blocks: torch.Tensor, positions_T: torch.Tensor, slots: int, window: int | None
) -> torch.Tensor:
    """Images are seen as text."""
    return visible_with_images(torch.full_like(blocks, TEXT), positions_T, slots, window)


def visible_past_the_window(
    blocks: torch.Tensor, positions_T: torch.Tensor, slots: int, window: int | None
) -> torch.Tensor:
    """`(window AND causal) OR image`: an image is seen whole, however far back its start lies."""
    whole = same_image(blocks, positions_T, held_positions(positions_T, slots))
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
