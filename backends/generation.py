"""Text from a session: tokens chosen one by one. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from transom.backends.prompt import Prompt
from transom.backends.sampling import Sampling
from transom.errors import SessionError

if TYPE_CHECKING:
    from transom.backends.session import Session

GREEDY = Sampling()


def generate(
    session: Session,
    prompt: str | Sequence[Any] | Prompt,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    keep: bool = False,
    on_chunk: Callable[[int], None] = lambda count: None,
) -> Iterator[int]:
    """Yield new tokens one by one; a stop token ends the stream and is not yielded.

    Args:
        session: What runs them.
        prompt: What `session.prompt` takes.
        max_new_tokens: At most this many.
        sampling: How to choose them.
        stop_ids: Tokens that end the text; by default the model's own.
        keep: Continue after the tokens that the caches hold, in place of starting afresh.
        on_chunk: Called with the number of prompt tokens done each time.

    Raises:
        ContextLengthError: If the prompt and the new tokens do not fit into the context.
        TokenizerError: If the prompt is empty, or is text and the model has no tokenizer.
        ImageError: If an image cannot be read, or the model takes none.
        SessionError: If the session was used for something else between two tokens.
        NonFiniteError: If logits are NaN or infinite, so that no token follows from them.
    """
    if not keep:
        session.reset()
    session.streams += 1
    stream = session.streams
    ids = session.prompt(prompt)
    stops = session.stop_ids if stop_ids is None else frozenset(stop_ids)
    if max_new_tokens < 1:
        return
    # The last new token is never run, so it needs no slot.
    session.reserve(session.position + len(ids) + max_new_tokens - 1)
    generator = sampling.generator()
    logits = session.prefill(ids, on_chunk=on_chunk)
    for count in range(1, max_new_tokens + 1):
        token = sampling.choose(logits, generator)
        if token in stops:
            return
        position = session.position
        yield token
        if count < max_new_tokens:
            if (stream, position) != (session.streams, session.position):
                raise SessionError("the session was used between two tokens of a stream: finish the stream first")
            logits = session.decode(token)
