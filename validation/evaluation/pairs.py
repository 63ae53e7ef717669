"""Answers about images: how likely an artifact finds them, and how many it gives itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transom.backends.prompt import MARKER, Prompt, split_at
from transom.backends.session import Session
from transom.errors import ContextLengthError, EvaluationError
from transom.images.pairs import Pair, read_pairs
from transom.images.pan_and_scan import PanAndScan
from transom.validation.evaluation.contest import (
    Contest,
    Entrant,
    Measured,
    OnProgress,
    log_softmax,
    read_entrants,
    run_contest,
)


def evaluate_pairs(
    folders: Sequence[str | Path],
    pairs: str | Path,
    *,
    pan_and_scan: PanAndScan | None = None,
    seed: int = 0,
    threads: int | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Contest:
    """Measure artifacts that see images on pairs of image and text, as `transom finetune-vision` measures a model.

    "loss" is the mean negative log-likelihood of an answer's tokens, in nats a token. "exact match" is 1 where each of
    them is the likeliest after those before it, so that greedy decoding gives the answer, else 0.

    Args:
        folders: Artifacts; the others are compared with the first.
        pairs: JSON lines of `image`, `prompt` and `answer`.
        pan_and_scan: How images are cut into parts that are seen too.
        seed: Of the bootstrap.
        threads: Threads of the runtimes.
        on_progress: Called with (artifact, done, total).

    Raises:
        EvaluationError: If there is no artifact, or one that sees no images, or an answer has no tokens.
        PairsError: If the pairs cannot be read.
        ImageError: If an image cannot.
        ContextLengthError: If a pair does not fit.
    """
    path = Path(pairs)
    rows, entrants = read_pairs(path), read_entrants(folders, threads=threads)
    for entrant in entrants:
        if entrant.manifest.images is None:
            raise EvaluationError(f"{entrant.folder} sees no images: leave it out, or export a model that does")

    def measure(entrant: Entrant) -> Measured:
        session, scores = entrant.open(threads), []
        for done, pair in enumerate(rows):
            on_progress(entrant.name, done, len(rows))
            scores.append(_score(session, entrant, pair, pan_and_scan))
        on_progress(entrant.name, len(rows), len(rows))
        loss, exact = np.array(scores, np.float64).T
        return Measured(scores={"loss": loss, "exact match": exact})

    return run_contest(
        entrants,
        measure,
        kind="pairs",
        file=path,
        rows=len(rows),
        settings={"pan_and_scan": pan_and_scan is not None, "seed": seed},
        seed=seed,
    )


def _score(session: Session, entrant: Entrant, pair: Pair, pan_and_scan: PanAndScan | None) -> tuple[float, float]:
    """Nats a token of the answer, and whether each is the likeliest."""
    answer = np.array(entrant.tokenizer.encode(pair.answer, bos=False), np.int64)
    if not len(answer):
        raise EvaluationError(f"the answer {pair.answer!r} to {pair.image} has no tokens: give another one")
    session.reset()
    prompt = session.prompt(split_at(pair.prompt, MARKER, [pair.image]), pan_and_scan=pan_and_scan)
    if len(prompt) + len(answer) > session.context:
        raise ContextLengthError(
            f"the pair of {pair.image} has {len(prompt) + len(answer)} tokens, the context of {entrant.folder} is "
            f"{session.context}: shorten it, or export with a larger --context"
        )
    nats, exact, done = 0.0, True, 0
    # The last token of an answer predicts nothing that is known.
    parts = [session.prefill(prompt)[None]]
    if len(answer) > 1:
        parts += session.feed(Prompt(tokens=answer[:-1]), wanted="all")
    for logits in parts:
        following = answer[done : done + len(logits)]
        nats -= float(log_softmax(logits)[np.arange(len(following)), following].sum())
        exact = exact and bool((logits.argmax(-1) == following).all())
        done += len(logits)
    return nats / len(answer), float(exact)
