"""This project's sessions, its plain modules and Hugging Face's own models, as runtimes of the suite."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import transom
from tests.conformance.reference import SOFT, blocks_of
from tests.gemma import gemma_config
from transom.backends.prompt import Prompt
from transom.backends.reference.runtime import Reference
from transom.backends.session import Session as TransomSession
from transom.formats.schemes import scheme
from transom.passes.base import Pass, Pipeline
from transom.passes.pipelines import pipeline
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.model import Model, load

IMAGES = frozenset({"images"})


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

    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[Any]:
        return self.session.runtime.encode_image(pixels[None])

    def feed(self, tokens: Sequence[int], soft: NDArray[Any] | None) -> NDArray[Any]:
        prompt = Prompt(tokens=np.asarray(tokens, np.int64), soft=soft)
        return np.concatenate(list(self.session.feed(prompt, wanted="all")))

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
    return load(folder, images=True)


class StageRuntime:
    """The graph that a target's passes leave, interpreted in PyTorch.

    Args:
        target: A key of `PIPELINES`.
    """

    capabilities = IMAGES

    def __init__(self, target: str) -> None:
        self.target = target
        self.name = f"reference after {target}"

    def passes(self, chunk: int) -> list[Pass]:
        """The passes to run."""
        return pipeline(self.target, chunk=chunk, scheme=scheme("none")).passes

    def open(self, folder: Path, *, chunk: int, context: int) -> SessionAdapter:
        model = model_of(folder)
        graphs = {
            task: Pipeline(self.passes(chunk)).run(model.trace(task=task))[0]
            for task in ("decode", *model.config.encoders)
        }
        reference = Reference(graphs["decode"], context=context, chunk=chunk, encoder=graphs.get("encode_image"))
        return SessionAdapter(TransomSession(reference))


class ArtifactRuntime:
    """An artifact that `transom.compile` wrote, opened with `transom.open`.

    Args:
        target: A key of `TARGETS`.
        work: Folder for the artifacts.
        dtype: What it computes in.
    """

    def __init__(self, target: str, work: Path, dtype: str = "float32") -> None:
        self.name, self.target, self.work, self.dtype = target, target, work, dtype
        # TensorRT writes a call's keys in one piece.
        self.capabilities = IMAGES | ({"wraps_early"} if target == "tensorrt" else set())

    def open(self, folder: Path, *, chunk: int, context: int) -> SessionAdapter:
        out = self.work / f"{folder.name}-{self.target}-{chunk}"
        if not out.exists():
            transom.compile(
                model_of(folder), target=self.target, out=out, dtype=self.dtype, chunk=chunk, context=context
            )
        return SessionAdapter(transom.open(out, threads=1), getattr(torch, self.dtype).itemsize)


class PlainRuntime:
    """The zoo's module as it stands, which runs all tokens again for each feed: no cache, no pass.

    Args:
        name: What to call it.
        change: Of the configuration, from the right one.
    """

    capabilities = IMAGES

    def __init__(
        self, name: str = "zoo, plain", change: Callable[[Gemma3Config], Gemma3Config] = lambda config: config
    ) -> None:
        self.name, self._change = name, change

    def open(self, folder: Path, *, chunk: int, context: int) -> PlainSession:
        model = model_of(folder)
        changed = dataclasses.replace(model, config=self._change(gemma_config(model.config)))
        return PlainSession(changed, chunk)


class PlainSession:
    """The module, and all tokens up to now."""

    def __init__(self, model: Model, chunk: int) -> None:
        self._module: Any = model.eager()
        self._takes_images, self._width, self._chunk = bool(model.config.encoders), model.config.hidden_size, chunk

    def reset(self) -> None:
        self._tokens, self._soft = np.zeros(0, np.int64), np.zeros((0, self._width), np.float32)

    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[Any]:
        with torch.no_grad():
            soft: NDArray[Any] = self._module.encode_image(torch.from_numpy(pixels)[None])[0].numpy()
        return soft

    def feed(self, tokens: Sequence[int], soft: NDArray[Any] | None) -> NDArray[Any]:
        cut_between_images(tokens, self._chunk)
        self._tokens = np.concatenate([self._tokens, np.asarray(tokens, np.int64)])
        if soft is not None:
            self._soft = np.concatenate([self._soft, soft])
        call = Prompt(tokens=self._tokens, soft=self._soft).part(0, self._tokens.size, 0)
        inputs = {}
        if self._takes_images and call.until is not None and call.soft is not None:
            inputs = {"until": torch.from_numpy(call.until), "soft": torch.from_numpy(call.soft)}
        with torch.no_grad():
            logits_BTV, _ = self._module(torch.from_numpy(call.tokens), torch.tensor(0), None, **inputs)
        logits: NDArray[Any] = logits_BTV[0, -len(tokens) :].numpy()
        return logits

    def decode(self, token: int) -> NDArray[Any]:
        return np.asarray(self.feed([token], None)[0])

    def cache_slots(self) -> None:
        return None

    def cache_bytes(self) -> None:
        return None


class HuggingFaceRuntime:
    """`Gemma3ForCausalLM` or `Gemma3ForConditionalGeneration` of transformers, eager, with its own cache and masks."""

    name = "transformers"
    capabilities = IMAGES

    def open(self, folder: Path, *, chunk: int, context: int) -> HuggingFaceSession:
        return HuggingFaceSession(folder, chunk)


class HuggingFaceSession:
    """Their model and a `DynamicCache`."""

    def __init__(self, folder: Path, chunk: int) -> None:
        import transformers
        from transformers.models.gemma3 import modeling_gemma3

        self._new_cache = transformers.DynamicCache
        self._masks = modeling_gemma3.create_masks_for_vision_model
        takes_images = bool(model_of(folder).config.encoders)
        kind: Any = transformers.Gemma3ForConditionalGeneration if takes_images else transformers.Gemma3ForCausalLM
        self._model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        self._decoder = self._model.model.language_model if takes_images else self._model.model
        self._chunk = chunk
        self.reset()

    def reset(self) -> None:
        self._cache = self._new_cache(config=self._decoder.config)
        self._tokens: list[int] = []

    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[Any]:
        with torch.no_grad():
            features = self._model.get_image_features(torch.from_numpy(pixels)[None]).pooler_output
        soft: NDArray[Any] = features.flatten(0, -2).numpy()
        return soft

    def feed(self, tokens: Sequence[int], soft: NDArray[Any] | None) -> NDArray[Any]:
        parts, low, rows = [], 0, 0
        for size in cut_between_images(tokens, self._chunk):
            part = tokens[low : low + size]
            low, first, rows = low + size, rows, rows + part.count(SOFT)
            parts.append(self._run(part, None if soft is None else soft[first:rows]))
        return np.concatenate(parts)

    def decode(self, token: int) -> NDArray[Any]:
        logits: NDArray[Any] = self._run([token], None)[0]
        return logits

    def _run(self, tokens: Sequence[int], soft: NDArray[Any] | None) -> NDArray[Any]:
        start, ids = len(self._tokens), torch.tensor([list(tokens)])
        self._tokens += tokens
        masks: Any = None
        with torch.no_grad():
            embedded = self._decoder.embed_tokens(ids.clamp(min=0))
            if soft is not None and len(soft):
                embedded[ids == SOFT] = torch.from_numpy(soft)
                masks = self._masks(
                    config=self._decoder.config,
                    inputs_embeds=embedded,
                    attention_mask=None,
                    past_key_values=self._cache,
                    position_ids=torch.arange(start, start + len(tokens))[None],
                    block_sequence_ids=torch.from_numpy(blocks_of(np.array(self._tokens)))[None],
                )
            if self._decoder is self._model.model:
                run: Any = self._model
                return np.asarray(run(input_ids=ids, past_key_values=self._cache, use_cache=True).logits[0])
            out = self._decoder(
                inputs_embeds=embedded, attention_mask=masks, past_key_values=self._cache, use_cache=True
            )
            logits: NDArray[Any] = self._model.lm_head(out.last_hidden_state)[0].numpy()
        return logits

    def cache_slots(self) -> Mapping[int, int]:
        return {index: layer.keys.shape[2] for index, layer in enumerate(self._cache.layers)}

    def cache_bytes(self) -> int:
        return sum(array.nbytes for layer in self._cache.layers for array in (layer.keys, layer.values))


def cut_between_images(tokens: Sequence[int], chunk: int) -> list[int]:
    """Sizes of chunks of at most `chunk` tokens, none of which ends within an image.

    Raises:
        ValueError: If an image does not fit into a chunk.
    """
    sizes, low = [], 0
    while low < len(tokens):
        stop = min(low + chunk, len(tokens))
        while low < stop < len(tokens) and tokens[stop] == tokens[stop - 1] == SOFT:
            stop -= 1
        if stop == low:
            raise ValueError(f"the image at token {low} of the feed does not fit into a chunk of {chunk}")
        sizes.append(stop - low)
        low = stop
    return sizes
