"""The cases, as data: which tiny model, which text, what each is for."""

from __future__ import annotations

import dataclasses
from typing import Any

SOFT_TOKENS = 16
"""Soft tokens of an image: a square of averages, each of 2 x 2 patches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny model and one text.

    Attributes:
        name: Name of the folder.
        purpose: What it is for, in one line.
        layers: Kind of every layer: "L" local, "G" global.
        window: Keys that a local layer sees, itself included.
        images: Positions [start, stop) of every image's soft tokens, of which an image has `SOFT_TOKENS`.
        softcap: Bound on the logits, or None.
        query_scalar: Scores are multiplied by its root's inverse; None: the head's width.
        rope_factor: Linear position scaling of global layers.
    """

    name: str
    purpose: str
    layers: str
    window: int
    hidden_size: int = 64
    intermediate_size: int = 48
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 64
    query_scalar: int | None = None
    rope_factor: float = 1.0
    softcap: float | None = None
    images: tuple[tuple[int, int], ...] = ()

    @property
    def needs(self) -> list[str]:
        """Capabilities that a runtime must have."""
        return ["images"] if self.images else []

    @property
    def long_chunk(self) -> int:
        """Largest call: more than two windows, and divides nothing."""
        return 2 * self.window + 5

    @property
    def prompt(self) -> int:
        """Tokens of the long prompt, which holds every image."""
        return max([3 * self.window + 5, *(stop + 3 for _, stop in self.images)])

    @property
    def ring(self) -> int:
        """Most slots of a local layer's cache."""
        return self.window + self.long_chunk - 1

    @property
    def length(self) -> int:
        """Tokens of the text: decoding wraps twice around such a ring, once behind the prompt, and goes on."""
        return max(2 * self.ring + self.window + 5, self.prompt + self.ring)


CASES = (
    Case(
        name="two_periods",
        purpose="LLG twice with grouped heads: the plain case. Every fault of windows and caches shows here.",
        layers="LLGLLG",
        window=16,
    ),
    Case(
        name="one_global",
        purpose="All layers but one are local, and the last is local: a runtime that assumes a period goes wrong.",
        layers="LGLLL",
        window=8,
        num_kv_heads=4,
    ),
    Case(
        name="global_first",
        purpose="The first layer is global: a runtime that takes window or cache length from layer 0 goes wrong.",
        layers="GLL",
        window=16,
    ),
    Case(
        name="odd_window",
        purpose="A window of 13 and a width of 48: sizes rounded to powers of two show, and so does the embedding's "
        "factor, whose root is not whole.",
        layers="LLG",
        window=13,
        hidden_size=48,
    ),
    Case(
        name="window_one",
        purpose="A window of one key, the token itself: `[-window + 1:]` on an array takes all of it.",
        layers="LGL",
        window=1,
    ),
    Case(
        name="one_kv_head",
        purpose="All query heads share one kv head.",
        layers="LLG",
        window=8,
        num_kv_heads=1,
    ),
    Case(
        name="wide_heads",
        purpose="Heads wider than the model, and a score scale that is not the head's width.",
        layers="LLG",
        window=8,
        hidden_size=32,
        head_dim=128,
        num_heads=2,
        num_kv_heads=1,
        query_scalar=40,
    ),
    Case(
        name="rope_factor",
        purpose="Positions of global layers are divided by 8, those of local layers are not.",
        layers="LLG",
        window=16,
        rope_factor=8.0,
    ),
    Case(
        name="softcap",
        purpose="Logits are bounded by a tanh.",
        layers="LLG",
        window=8,
        softcap=3.0,
    ),
    Case(
        name="image_past_window",
        purpose="Images longer than the window: one across a ring's end, two next to each other, one behind text.",
        layers="LGL",
        window=8,
        images=((7, 23), (25, 41), (45, 61)),
    ),
    Case(
        name="image_in_window",
        purpose="Images shorter than the window: one at the start, one across the window's edge, one across a ring's "
        "end; a chunk holds two.",
        layers="LLG",
        window=24,
        images=((1, 17), (19, 35), (46, 62), (64, 80)),
    ),
)


def schedules(case: Case) -> list[dict[str, Any]]:
    """The ways in which the text of a case is fed.

    Each holds `name`, `chunk` (most tokens that the runtime may run in one call), `feeds` (tokens handed over at a
    time) and `decode` (tokens then run one by one). A feed may be longer than the chunk: the runtime then cuts it. No
    feed ends within an image.
    """
    window, prompt, chunk = case.window, case.prompt, case.long_chunk
    lengths = sorted({_after_image(case, n) for n in (window - 1, window, window + 1, 2 * window) if n > 0} - {prompt})
    ways: list[dict[str, Any]] = [
        {"name": f"prompt_{length}", "chunk": chunk, "feeds": [length], "decode": 0} for length in lengths
    ]
    ways.append({"name": "decode_far", "chunk": chunk, "feeds": [prompt], "decode": case.length - prompt})
    sizes = [window + 1, 1, chunk, 3, max(1, window - 1), 2, window]
    ways.append({"name": "mixed_chunks", "chunk": chunk, "feeds": _feeds(case, sizes), "decode": window + 2})
    # The smallest cache that can be: an image must fit into one call, so images set the least chunk.
    least = SOFT_TOKENS if case.images else 1
    ways.append({"name": "smallest_cache", "chunk": least, "feeds": [prompt], "decode": 2 * window})
    return ways


def _feeds(case: Case, sizes: list[int]) -> list[int]:
    """The sizes, each stretched to the end of an image that it would cut."""
    feeds, position = [], 0
    for size in sizes:
        stop = _after_image(case, position + size)
        feeds.append(stop - position)
        position = stop
    return feeds


def _after_image(case: Case, position: int) -> int:
    return next((stop for start, stop in case.images if start < position < stop), position)


def cache_bounds(case: Case, schedule: dict[str, Any]) -> list[dict[str, int]]:
    """Fewest and most slots and bytes (float32, keys and values) of every layer's cache when a schedule has run.

    A local layer must keep the `window - 1` keys that the next token sees. It may keep `window + chunk - 1`: what a
    chunk overwrites before its first token has attended. A global layer keeps all; it may have room for the context.
    """
    tokens = sum(schedule["feeds"]) + schedule["decode"]
    slot_bytes = 2 * 4 * case.num_kv_heads * case.head_dim
    bounds = []
    for index, kind in enumerate(case.layers):
        least, most = tokens, case.length
        if kind == "L":
            least, most = min(tokens, case.window - 1), case.window + schedule["chunk"] - 1
        sizes = {"least_slots": least, "most_slots": most}
        bounds.append({"layer": index, **sizes, "least_bytes": least * slot_bytes, "most_bytes": most * slot_bytes})
    return bounds
