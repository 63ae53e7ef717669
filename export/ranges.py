"""Range tracing: how large a model's numbers get on a text, or an encoder's on images, and which of them a narrower
format cannot hold.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.reference.runtime import Interpreter
from transom.backends.reference.session import ReferenceSession
from transom.formats.number_format import NumberFormat
from transom.formats.observation import Observation
from transom.graphs.graph import Graph
from transom.graphs.observe import observe
from transom.graphs.weight import Weight
from transom.images.resize import Box, PixelSpec, pixels
from transom.passes.base import Pipeline
from transom.passes.insert_observers import PREFIX, InsertObservers, layer_of, narrow_values
from transom.zoo.model import Model

CHUNK = 128
"""New tokens in one call. The logits of all of them stand in memory at once."""

TOKENS = 1024
"""Of the text that ranges are traced on, unless told otherwise."""

SMOOTH = (2, 16)
"""Sides of random images that an encoder's ranges are traced on, once they are enlarged; one more is not enlarged."""

OnProgress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueRange:
    """How large one value got, or one weight is.

    Attributes:
        name: Module path and operation, such as "layers.3.add.2"; of a weight its own name.
        op: The operation; "weight" for a weight.
        layer: Index of the layer; None before the first and after the last.
        observation: Its numbers, computed in float32.
    """

    name: str
    op: str
    layer: int | None
    observation: Observation

    def headroom(self, number_format: NumberFormat) -> float:
        """Bits between the largest magnitude and the format's; negative: it overflows; infinite: nothing but zeros."""
        largest = self.observation.largest
        return math.log2(number_format.largest / largest) if largest else math.inf

    def overflows(self, number_format: NumberFormat) -> bool:
        """Whether some number is larger than the format's largest, or float32 could not hold it."""
        return self.observation.largest > number_format.largest or self.observation.nonfinite > 0

    def to_json(self, number_format: NumberFormat) -> dict[str, Any]:
        """Plain data."""
        headroom = self.headroom(number_format)
        return {
            "name": self.name,
            "layer": self.layer,
            "op": self.op,
            "largest": self.observation.largest,
            "headroom_bits": headroom if math.isfinite(headroom) else None,
            "overflows": self.overflows(number_format),
            "overflow_share": self.observation.share_above(number_format.largest),
            # What is smaller than half of the smallest number becomes zero.
            "underflow_share": self.observation.share_below(number_format.smallest / 2),
            "nonfinite": int(self.observation.nonfinite),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranges:
    """What range tracing found.

    Attributes:
        model: Name of the model.
        tokens: Tokens of the text, or soft tokens of the images.
        values: In the order of execution, weights last. Only what follows the dtype that a graph is traced in: the
            model computes the others in float32 whatever it is traced in.
    """

    model: str
    tokens: int
    values: tuple[ValueRange, ...]

    def overflowing(self, number_format: NumberFormat) -> tuple[ValueRange, ...]:
        """Values that leave the format's range."""
        return tuple(value for value in self.values if value.overflows(number_format))

    def largest(self) -> dict[str, float]:
        """Largest magnitude by name, for `GuardRanges`; infinite where float32 did not hold it."""
        return {
            value.name: math.inf if value.observation.nonfinite else value.observation.largest for value in self.values
        }

    def to_json(self, number_format: NumberFormat) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model,
            "format": number_format.name,
            "format_largest": number_format.largest,
            "tokens": self.tokens,
            "in_range": not self.overflowing(number_format),
            "not_finite": [value.name for value in self.values if value.observation.nonfinite],
            "overflowing": [value.name for value in self.overflowing(number_format)],
            "values": [value.to_json(number_format) for value in self.values],
        }


def trace_ranges(
    model: Model,
    tokens: Sequence[int],
    *,
    half: Graph,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Ranges:
    """Run a model over a text in float32, chunk by chunk, and note how large every value gets.

    Args:
        model: Its weights are read into memory.
        tokens: Ids of the text, at least one.
        half: Its `decode` graph as traced in float16 or bfloat16: tells which values follow the graph's dtype.
        on_progress: Called with (stage, done, total): "ranges" by tokens, "weights" one by one.

    Raises:
        ContextLengthError: If the text is longer than the model's context.
        TokenizerError: If there is no token, or one is out of the vocabulary.
        CheckpointError: If a weight is not finite, naming it and its rows.
    """
    names = list(narrow_values(half, half.outputs["logits"].meta["val"].dtype))
    graph, _ = Pipeline([InsertObservers("values", only=names)]).run(model.trace())
    session = ReferenceSession(graph, context=model.config.context, chunk=CHUNK)
    session.refuses_nonfinite = False  # where they come from is what ranges tell
    observations = {name: Observation.none() for name in names}

    def on_chunk(count: int) -> None:
        _merge(observations, session.tapped)
        on_progress("ranges", min(session.position, len(tokens)), len(tokens))

    session.prefill(tokens, on_chunk=on_chunk)
    weights = _weights(model.weights, on_progress)
    return Ranges(model=model.config.name, tokens=len(tokens), values=(*_values(observations), *weights))


def trace_encoder_ranges(
    model: Model,
    task: str,
    *,
    half: Graph,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Ranges:
    """Run an encoder of images in float32 over noise of several grains, and note how large every value gets.

    Args:
        model: The encoder's weights are read into memory.
        task: The encoder's name.
        half: Its graph as traced in `dtype`: tells which values follow that.
        dtype: The narrow dtype.
        seed: Of the images.
        on_progress: As of `trace_ranges`; "ranges" by images.

    Raises:
        CheckpointError: If a weight is not finite, naming it and its rows.
    """
    images = model.config.images
    assert images is not None, "only models that see images have encoders"
    names, random = list(narrow_values(half, dtype)), np.random.default_rng(seed)
    graph, _ = Pipeline([InsertObservers("values", only=names)]).run(model.trace(task=task))
    encoder, observations = Interpreter(graph), {name: Observation.none() for name in names}
    sides = (*SMOOTH, images.size)
    for done, side in enumerate(sides, 1):
        image = random.integers(0, 256, (side, side, 3), np.uint8)
        given = pixels(image, Box(0, 0, side, side), PixelSpec(size=images.size))
        returned = encoder.run({"pixels": torch.from_numpy(given)})
        _merge(observations, {tap.name: returned[tap.name].numpy() for tap in graph.taps})
        on_progress("ranges", done, len(sides))
    weights = _weights({name: model.weights[name] for name in half.weights}, on_progress)
    count = len(sides) * images.soft_tokens
    return Ranges(model=model.config.name, tokens=count, values=(*_values(observations), *weights))


def _merge(observations: dict[str, Observation], tapped: Mapping[str, NDArray[Any]]) -> None:
    for name, observation in observations.items():
        observations[name] = observation.merge(Observation.of(tapped[PREFIX + name]))


def _values(observations: Mapping[str, Observation]) -> list[ValueRange]:
    return [
        ValueRange(name=name, op=_operation(name), layer=layer_of(name), observation=observation)
        for name, observation in observations.items()
    ]


def activation_scales(
    graph: Graph,
    tokens: Sequence[int],
    number_format: NumberFormat,
    *,
    context: int,
    chunk: int,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> dict[str, float]:
    """Scales with which what linears read loses least in a format, in squared error over a text.

    Args:
        graph: A `decode` graph that a target's passes have rewritten; its weights are read into memory.
        tokens: Ids of the text, at least one.
        number_format: What the numbers will be rounded to.
        context: Longest sequence, in tokens.
        chunk: Most new tokens in one call that the graph's caches allow.
        on_progress: Called with ("observe", tokens done, tokens in all).

    Returns:
        Scale by site, such as "layers.3.mlp.down_proj.input"; 0 where all numbers were.
    """
    observed, _ = Pipeline([InsertObservers("linears")]).run(graph)
    session = ReferenceSession(observed, context=context, chunk=min(chunk, CHUNK))
    names = [tap.name for tap in observed.taps if tap.name.startswith(PREFIX)]
    observations = {name: Observation.none() for name in names}

    def on_chunk(count: int) -> None:
        for name in names:
            observations[name] = observations[name].merge(Observation.of(session.tapped[name]))
        on_progress("observe", min(session.position, len(tokens)), len(tokens))

    session.prefill(tokens, on_chunk=on_chunk)
    return {
        name.removeprefix(PREFIX): seen.clip_scale(number_format) if seen.largest else 0.0
        for name, seen in observations.items()
    }


def _operation(name: str) -> str:
    return re.sub(r"\.\d+$", "", name).rsplit(".", 1)[-1]


def _weights(weights: Mapping[str, Weight], on_progress: OnProgress) -> list[ValueRange]:
    value_ranges = []
    for name, weight in weights.items():
        observation = Observation.none()
        for rows in weight.blocks():
            observation = observation.merge(Observation.of(observe(rows).numpy()))
        value_ranges.append(ValueRange(name=name, op="weight", layer=layer_of(name), observation=observation))
        on_progress("weights", len(value_ranges), len(weights))
    return value_ranges
