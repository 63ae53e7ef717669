"""A session: one sequence on a runtime. It owns the position, and cuts what it is given into calls.

Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from transom.backends.generation import GREEDY, generate
from transom.backends.prompt import ImageReader, Prompt, join
from transom.backends.runtime import Float, Runtime
from transom.backends.sampling import Sampling
from transom.errors import ContextLengthError, ImageError, NonFiniteError, SessionError, TokenizerError
from transom.graphs.images import Images
from transom.images.pan_and_scan import PanAndScan

FIRST_SLOTS = 512
"""Slots that a growing cache starts with; it then doubles, up to the context."""


class TokenStream(Protocol):
    """Decodes ids as they come."""

    def add(self, token: int) -> str: ...
    def finish(self) -> str: ...


class Tokenizer(Protocol):
    """What a session needs of a tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str, bos: bool = True) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> list[int]: ...
    def chat_text(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> str: ...
    def check_template(self) -> None: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def stream(self) -> TokenStream: ...


class Session:
    """Runs one sequence step by step.

    Args:
        runtime: What runs it, with states for one sequence; they are the session's alone.
        stop_ids: Tokens that end a text.
        tokenizer: None if the model has none.
        images: What an image is among tokens; None if the model takes none.

    Attributes:
        runtime: What runs it.
        position: Tokens that the caches hold.
        context: Most tokens that they can hold.
        chunk: Most new tokens in one call of the runtime.
        vocab_size: Width of the logits.
        states: What is kept from call to call.
        tokenizer: None if the model has none; then prompts are token ids.
        images: What an image is among tokens; None if the model takes none.
        tapped: What the taps of the artifact said in the last call of the runtime, by name; empty without taps.
        note: What users should know of how it runs, in words; "" if it is as they expect.
        refuses_nonfinite: Whether logits that are NaN or infinite are an error; what measures them turns it off.
        streams: Counts up whenever a stream of `generate` begins, or all are ended.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        stop_ids: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
        images: Images | None = None,
    ) -> None:
        self.runtime, self.note = runtime, runtime.note
        self.context, self.chunk, self.vocab_size = runtime.context, runtime.chunk, runtime.vocab_size
        self.states, self.stop_ids, self.tokenizer = runtime.states, frozenset(stop_ids), tokenizer
        rings = {state.slots for state in self.states if state.window is not None and state.slots is not None}
        self._rings = rings if runtime.whole_writes else set()
        self.images = images
        self._reader = None if images is None else ImageReader(runtime=runtime, images=images)
        self.position = 0
        self.tapped: dict[str, NDArray[Any]] = {}
        self.refuses_nonfinite = True
        self.streams = 0
        self._slots = 0
        self._intact = True

    def reset(self) -> None:
        """Forget all tokens, and end the streams of `generate`. Memory stays allocated."""
        self.position = 0
        self._intact = True
        self.streams += 1

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens at once, in place of growing on the way.

        Raises:
            ContextLengthError: If that is more than the context.
            SessionError: If there is no memory for them.
        """
        if tokens > self.context:
            raise ContextLengthError(
                f"{tokens} tokens do not fit into a context of {self.context}: shorten the prompt, ask for fewer new "
                "tokens, or export with a larger --context"
            )
        if tokens > self._slots:
            slots = max(FIRST_SLOTS, 2 ** math.ceil(math.log2(tokens)))
            slots = min(slots, self.context)
            try:
                self.runtime.allocate(slots)
            except (MemoryError, ValueError, OverflowError) as error:
                raise SessionError(
                    f"there is no memory for caches of {slots} tokens ({error}): export with a smaller --context"
                ) from error
            self._slots = slots

    def feed(
        self,
        tokens: Sequence[int] | Prompt,
        *,
        wanted: Literal["last", "all"] = "last",
        on_chunk: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Float]:
        """Run tokens after those that the caches hold, chunk by chunk. The soft tokens of an image go into one chunk.

        Args:
            tokens: Ids, at least one, or a prompt with images.
            wanted: "last": yields the logits [1, V] of the last token; "all": those of each chunk [T, V].
            on_chunk: Called with the number of tokens done each time.

        Raises:
            ContextLengthError: If they do not fit into the context.
            TokenizerError: If an id is out of the vocabulary, or there is none.
            SessionError: If an earlier call was cut short, so that the caches may hold tokens that nobody counted.
            NonFiniteError: If logits are NaN or infinite; then only `reset` goes on.
        """
        if not self._intact:
            raise SessionError("an earlier call was interrupted and left the caches unsettled: call reset() first")
        prompt = Prompt.of(tokens)
        ids = prompt.tokens
        if ids.ndim != 1 or ids.size == 0:
            raise TokenizerError("a prompt must hold at least one token: give it some text")
        if ids.max() >= self.vocab_size or (ids.min() < 0 and prompt.soft is None):
            raise TokenizerError(f"token ids must lie in [0, {self.vocab_size}), got {ids.min()} to {ids.max()}")
        blocks = prompt.blocks()
        if (longest := max((end - first for first, end in blocks), default=0)) > self.chunk:
            raise SessionError(
                f"an image of {longest} tokens does not fit into a call of {self.chunk}, and is not to be cut: export "
                f"with --chunk {longest} or more"
            )
        self.reserve(self.position + ids.size)
        low = 0
        while low < ids.size:
            high = _before_block(blocks, low, min(ids.size, low + self._room()))
            part, last = prompt.part(low, high, self.position), high == ids.size
            low = high
            size = part.tokens.shape[1]
            positions = np.arange(size) if wanted == "all" else np.arange(size - 1, size)[: int(last)]
            self._intact = False
            result = self.runtime.run(replace(part, logit_positions=positions))
            logits, self.tapped = result.logits[0], dict(result.taps)
            if self.refuses_nonfinite and not np.isfinite(logits).all():
                raise nonfinite(logits, self.position + positions)
            self.position += size
            self._intact = True
            on_chunk(size)
            if wanted == "all" or last:
                yield logits

    def _room(self) -> int:
        """Most new tokens of the next call."""
        return min([self.chunk, *(slots - self.position % slots for slots in self._rings)])

    def prefill(self, tokens: Sequence[int] | Prompt, *, on_chunk: Callable[[int], None] = lambda count: None) -> Float:
        """Run tokens after those that the caches hold; returns the logits [V] of the last one.

        Raises:
            ContextLengthError: If they do not fit into the context.
            TokenizerError: If an id is out of the vocabulary, or there is none.
            NonFiniteError: If its logits are NaN or infinite.
        """
        *_, logits = self.feed(tokens, on_chunk=on_chunk)
        return np.asarray(logits[0])

    def decode(self, token: int) -> Float:
        """Run one token; returns its logits [V]."""
        return self.prefill([token])

    def logits(self, token_ids: Sequence[int]) -> Float:
        """Logits of every position of a text, float32 [T, V], from empty caches. For checks: this is large."""
        self.reset()
        return np.concatenate(list(self.feed(token_ids, wanted="all")))

    def log_likelihoods(
        self, token_ids: Sequence[int], *, on_chunk: Callable[[int], None] = lambda count: None
    ) -> NDArray[np.float64]:
        """Log probability of every token but the first given those before it, [T - 1], from empty caches."""
        self.reset()
        ids, log_probs, position = np.asarray(token_ids), [], 0
        for logits in self.feed(token_ids, wanted="all", on_chunk=on_chunk):
            targets = ids[position + 1 : position + 1 + logits.shape[0]]
            rows = logits[: targets.size]
            top = rows.max(-1, keepdims=True)
            # Exponentials in float32, which are fast; only their sum needs more digits.
            totals = np.exp(rows - top).sum(-1, dtype=np.float64)
            log_probs.append((rows[np.arange(targets.size), targets] - top[:, 0]).astype(np.float64) - np.log(totals))
            position += logits.shape[0]
        return np.concatenate(log_probs)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt of text.

        Raises:
            TokenizerError: If it is text and the model has no tokenizer.
        """
        return [int(token) for token in self.prompt(prompt).tokens]

    def prompt(
        self,
        parts: str | Sequence[Any] | Prompt,
        *,
        pan_and_scan: PanAndScan | None = None,
        bos: bool = True,
        on_image: Callable[[int, int], None] = lambda done, total: None,
    ) -> Prompt:
        """Tokens of a prompt; images are encoded here, each once a session.

        Args:
            parts: Text, token ids, or texts and images in their order; an image is its file, or uint8 [H, W, 3].
            pan_and_scan: How images are cut into parts that are seen too; None leaves them whole.
            bos: Whether a text begins with the token that begins texts.
            on_image: Called with (done, total) as the parts of an image are encoded.

        Raises:
            TokenizerError: If there is text and the model has no tokenizer.
            ImageError: If an image cannot be read, or the model takes none.
        """
        if isinstance(parts, Prompt):
            return parts
        pieces: list[Any] = [parts] if isinstance(parts, str) else list(parts)
        if all(isinstance(piece, int | np.integer) for piece in pieces):
            return Prompt.of(pieces)
        if self.tokenizer is None:
            raise TokenizerError("this model has no tokenizer: give token ids in place of text")
        if all(isinstance(piece, str) for piece in pieces):
            return Prompt.of(self.tokenizer.encode("".join(pieces), bos=bos))
        if self._reader is None:
            raise ImageError("this model takes no images: export one that does, and its encoder with it")
        return join(pieces, self._reader, self.tokenizer, setting=pan_and_scan, bos=bos, on_image=on_image)

    def generate(
        self,
        prompt: str | Sequence[Any] | Prompt,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] | None = None,
        keep: bool = False,
        on_chunk: Callable[[int], None] = lambda count: None,
    ) -> Iterator[int]:
        """Yield new tokens one by one; see `generation.generate`."""
        return generate(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=stop_ids,
            keep=keep,
            on_chunk=on_chunk,
        )

    def cache_bytes(self) -> dict[str, int]:
        """Bytes of the states as allocated now: {"local": ..., "global": ...}, and "summary" if there are some."""
        sizes = {"local": 0, "global": 0}
        for state, array in self.runtime.state_arrays():
            kind = "summary" if not state.is_ring else "global" if state.window is None else "local"
            sizes[kind] = sizes.get(kind, 0) + array.nbytes
        return sizes


def _before_block(blocks: Sequence[tuple[int, int]], low: int, high: int) -> int:
    """`high`, or the first token of the block that a call from `low` to `high` would cut."""
    return next((first for first, end in blocks if low < first < high < end), high)


def nonfinite(logits: Float, positions: NDArray[np.int64]) -> NonFiniteError:
    bad = ~np.isfinite(logits)
    row = int(bad.any(-1).argmax())
    return NonFiniteError(
        f"{int(bad[row].sum()):,} of {logits.shape[-1]:,} logits at position {positions[row]} are NaN or infinite: "
        "`transom ranges` names the layers whose numbers leave a dtype's range; what computes in float16 is to be "
        "exported in another --dtype"
    )
