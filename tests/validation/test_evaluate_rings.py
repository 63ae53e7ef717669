"""Calls that a runtime takes in two, because a ring ends within them, are scored like any others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.case import Case
from tests.conftest import WINDOW, Cli
from tests.tolerances import FP32_LOGITS
from transom.backends.reference.runtime import Reference
from transom.backends.session import Session
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.validation.compare import Differences, measure
from transom.validation.evaluation.text import read_sequences
from transom.validation.oracle import Reading
from transom.zoo.model import Model

FAST = ("--threads", 1, "--decode-tokens", 2)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 600 tokens: the tiny tokenizer knows bytes alone."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("A transom is the crossbar that divides a window into panes; some see far, most do not. " * 7)
    return path


class WholeWrites(Reference):
    """Writes into its rings only up to their ends, as TensorRT does, so that some calls are taken in two."""

    whole_writes = True


@pytest.mark.parametrize(("chunk", "length"), [(24, 200), (37, 83), (WINDOW, 3 * WINDOW), (1, 2 * WINDOW + 1)])
def test_a_ring_that_ends_within_a_call_changes_no_score(tiny: Model, words: Path, chunk: int, length: int) -> None:
    bounded = Case.of(tiny).run(Canonicalize(), FuseAttention(), FuseCacheWrites(), BoundLocalCaches(chunk)).graph
    (tokens,) = read_sequences(tiny, words, length=length, windows=1, most=256).sequences
    reading = Reading(tiny.eager(), tokens)
    counts: list[int] = []

    def run(kind: type[Reference], on_tokens: Callable[[int], None]) -> Differences:
        session = Session(kind(bounded, context=256, chunk=chunk))
        return measure(session, tokens, reading.logits, step=chunk, on_tokens=on_tokens).differences

    cut, whole = run(WholeWrites, counts.append), run(Reference, lambda count: None)
    assert sum(counts) == length and max(counts) <= chunk
    assert len(counts) > -(-length // chunk) or chunk == 1, "no ring ended within a call"
    assert (cut.gap == 0).all() and cut.kl.max() < FP32_LOGITS and len(cut.kl) == length
    assert np.abs(cut.log_likelihood - whole.log_likelihood).max() < FP32_LOGITS
    assert len(cut.log_likelihood) == length - 1


@pytest.mark.usefixtures("traced_once")
def test_tensorrt_where_rings_end_within_calls(cli: Cli, words: Path) -> None:
    """Chunks longer than the window, and a length that is no multiple of them."""
    code, out, err = cli(
        "evaluate", "gemma3-tiny", "--targets", "tensorrt", "--schemes", "none", "--text", words, "--chunk", 24,
        "--length", 200, *FAST, "--json", "-",
    )  # fmt: skip
    assert code == 0, err
    data = json.loads(out)
    assert not data["not_run"]
    assert data["rows"][1]["target"] == "tensorrt" and data["rows"][1]["kl"] < 1e-3
