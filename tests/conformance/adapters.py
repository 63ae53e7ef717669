"""This project's sessions, and Hugging Face's own model, as runtimes of the suite."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import transom
from tests.conformance.reference import TEXT
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session as TransomSession
from transom.formats.schemes import scheme
from transom.passes.base import Pass, Pipeline
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model, load


class SessionAdapter:
    """A session of this project.

    Args:
        session: The session.
        width: Bytes of a number in its caches.
    """

    def __init__(self, session: TransomSession, width: int = 4) -> None:
        self.session, self.width = session, width
        # A fault may leave a token no key to see; the suite is here to tell.
        session.refuses_nonfinite = False

    def reset(self) -> None:
        self.session.reset()

    def feed(self, tokens: Sequence[int], blocks: Sequence[int]) -> NDArray[Any]:
        return np.concatenate(list(self.session.feed(tokens, wanted="all")))

    def decode(self, token: int) -> NDArray[Any]:
        return self.session.decode(token)

    def cache_slots(self) -> Mapping[int, int]:
        # The arrays themselves: what a session says of its caches may be wrong.
        return {state.layer: int(array.shape[2]) for state, array in self.session.runtime.state_arrays()}

    def cache_bytes(self) -> int:
        # The suite counts in float32.
        return sum(self.session.cache_bytes().values()) * 4 // self.width


@functools.cache
def model_of(folder: Path) -> Model:
    """A case's model, loaded once a session, so that it is traced once."""
    return load(folder)


class StageRuntime:
    """The graph that a target's passes leave, interpreted in PyTorch.

    Args:
        target: A key of `PIPELINES`.
    """

    capabilities: frozenset[str] = frozenset()

    def __init__(self, target: str) -> None:
        self.target = target
        self.name = f"reference after {target}"

    def passes(self, chunk: int) -> list[Pass]:
        """The passes to run."""
        return pipeline(self.target, chunk=chunk, scheme=scheme("none")).passes

    def open(self, folder: Path, *, chunk: int, context: int) -> SessionAdapter:
        graph, _ = Pipeline(self.passes(chunk)).run(model_of(folder).trace())
        return SessionAdapter(ReferenceSession(graph, context=context, chunk=chunk))


class ArtifactRuntime:
    """An artifact that `transom.compile` wrote, opened with `transom.open`.

    Args:
        target: A key of `TARGETS`.
        work: Folder for the artifacts.
        dtype: What it computes in.
    """

    capabilities: frozenset[str] = frozenset()

    def __init__(self, target: str, work: Path, dtype: str = "float32") -> None:
        self.name, self.target, self.work, self.dtype = target, target, work, dtype

    def open(self, folder: Path, *, chunk: int, context: int) -> SessionAdapter:
        out = self.work / f"{folder.name}-{self.target}-{chunk}"
        if not out.exists():
            transom.compile(
                model_of(folder), target=self.target, out=out, dtype=self.dtype, chunk=chunk, context=context
            )
        return SessionAdapter(transom.open(out, threads=1), getattr(torch, self.dtype).itemsize)


class HuggingFaceRuntime:
    """`Gemma3ForCausalLM` of transformers, eager attention, with its own cache and its own masks."""

    name = "transformers"
    capabilities = frozenset({"image_blocks"})

    def open(self, folder: Path, *, chunk: int, context: int) -> HuggingFaceSession:
        return HuggingFaceSession(folder, chunk)


class HuggingFaceSession:
    """Their model and a `DynamicCache`."""

    def __init__(self, folder: Path, chunk: int) -> None:
        import transformers
        from transformers.models.gemma3 import modeling_gemma3

        self._new_cache = transformers.DynamicCache
        self._masks = modeling_gemma3.create_masks_for_vision_model
        self._model = transformers.Gemma3ForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self._chunk = chunk
        self.reset()

    def reset(self) -> None:
        self._cache = self._new_cache(config=self._model.config)
        self._blocks: list[int] = []

    def feed(self, tokens: Sequence[int], blocks: Sequence[int]) -> NDArray[Any]:
        parts, low = [], 0
        for size in cut_between_images(blocks, self._chunk):
            span = slice(low, low + size)
            parts.append(self._run(tokens[span], blocks[span]))
            low += size
        return np.concatenate(parts)

    def decode(self, token: int) -> NDArray[Any]:
        logits: NDArray[Any] = self._run([token], [TEXT])[0]
        return logits

    def _run(self, tokens: Sequence[int], blocks: Sequence[int]) -> NDArray[Any]:
        ids = torch.tensor([list(tokens)])
        start = len(self._blocks)
        self._blocks += blocks
        masks: Any = None
        with torch.no_grad():
            if any(block != TEXT for block in blocks):
                masks = self._masks(
                    config=self._model.config,
                    inputs_embeds=self._model.model.embed_tokens(ids),
                    attention_mask=None,
                    past_key_values=self._cache,
                    position_ids=torch.arange(start, start + len(tokens))[None],
                    block_sequence_ids=torch.tensor([self._blocks]),
                )
            out = self._model(input_ids=ids, attention_mask=masks, past_key_values=self._cache, use_cache=True)
        logits: NDArray[Any] = out.logits[0].numpy()
        return logits

    def cache_slots(self) -> Mapping[int, int]:
        return {index: layer.keys.shape[2] for index, layer in enumerate(self._cache.layers)}

    def cache_bytes(self) -> int:
        return sum(array.nbytes for layer in self._cache.layers for array in (layer.keys, layer.values))


def cut_between_images(blocks: Sequence[int], chunk: int) -> list[int]:
    """Sizes of chunks of at most `chunk` tokens, none of which ends within an image.

    Raises:
        ValueError: If an image does not fit into a chunk.
    """
    sizes, low = [], 0
    while low < len(blocks):
        stop = min(low + chunk, len(blocks))
        while low < stop < len(blocks) and blocks[stop] != TEXT and blocks[stop] == blocks[stop - 1]:
            stop -= 1
        if stop == low:
            raise ValueError(f"the image at token {low} of the feed does not fit into a chunk of {chunk}")
        sizes.append(stop - low)
        low = stop
    return sizes
