"""What sessions promise, on the reference and on ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.artifacts import CHUNK, Export, Exported
from tests.conftest import WINDOW, Stage
from tests.tolerances import FP32_LOGITS
from transom.backends import session as session_module
from transom.backends.reference.session import ReferenceSession
from transom.backends.runtime import Runtime
from transom.backends.sampling import Sampling
from transom.backends.session import Session
from transom.errors import ContextLengthError, SessionError, TokenizerError

PER_SLOT = 2 * 2 * 32 * 4
"""Bytes of keys and values of one slot of a layer of gemma3-tiny."""

LOCAL = 4 * PER_SLOT * (WINDOW + CHUNK - 1)


@pytest.fixture(params=["reference", "onnxruntime", "onnx"])
def session(request: pytest.FixtureRequest, exported: Export, stages: list[Stage]) -> Session:
    """A fresh session."""
    if request.param == "reference":
        return ReferenceSession(stages[-1].graph, context=512, chunk=CHUNK)
    return exported(request.param, "none").session()


@pytest.fixture(scope="module")
def artifact(exported: Export) -> Exported:
    return exported("onnxruntime", "none")


def test_feeding_in_pieces(session: Session, text: list[int], text_logits: NDArray[np.float32]) -> None:
    counts: list[int] = []
    last = session.prefill(text[:100], on_chunk=counts.append)
    assert counts == [CHUNK, CHUNK, 100 - 2 * CHUNK] and session.position == 100
    assert last.shape == (512,) and np.abs(last - text_logits[99]).max() < FP32_LOGITS
    kept = last.copy()
    pieces = list(session.feed(text[100:140], wanted="all"))
    assert [piece.shape for piece in pieces] == [(CHUNK, 512), (3, 512)]
    assert np.abs(np.concatenate(pieces) - text_logits[100:140]).max() < FP32_LOGITS
    (only,) = session.feed(text[140:141])
    assert only.shape == (1, 512)
    assert np.array_equal(last, kept), "logits are the caller's to keep"


def test_reset_forgets(session: Session, text: list[int], text_logits: NDArray[np.float32]) -> None:
    session.prefill(text[50:150])
    size = session.cache_bytes()
    session.reset()
    assert session.position == 0 and session.cache_bytes() == size
    assert np.abs(session.prefill(text[:20]) - text_logits[19]).max() < FP32_LOGITS


def test_a_text_longer_than_the_context_runs_nothing(session: Session, text: list[int]) -> None:
    session.prefill(text[:20])
    ran: list[int] = []
    for call in (
        lambda: session.prefill([1] * 493, on_chunk=ran.append),
        lambda: list(session.generate(text[:20], max_new_tokens=494, on_chunk=ran.append)),
        lambda: list(session.generate(text[:20], max_new_tokens=474, keep=True, on_chunk=ran.append)),
        lambda: session.reserve(513),
    ):
        session.reset()
        session.prefill(text[:20])
        with pytest.raises(ContextLengthError, match="do not fit into a context of 512"):
            call()
        assert ran == []
    session.reset()
    session.prefill([1] * 512)
    assert session.position == 512
    with pytest.raises(ContextLengthError):
        session.decode(1)


def test_the_whole_context_can_be_used(artifact: Exported, text: list[int]) -> None:
    session = artifact.session()
    assert len(list(session.generate((text * 4)[:500], max_new_tokens=13, stop_ids=()))) == 13
    assert session.position == 512


@pytest.mark.parametrize("bad", [[], [512], [-1], [3, 600]])
def test_ids_out_of_the_vocabulary(session: Session, bad: list[int]) -> None:
    with pytest.raises(TokenizerError):
        session.prefill(bad)
    assert session.position == 0


def test_text_needs_a_tokenizer(stages: list[Stage]) -> None:
    session = ReferenceSession(stages[-1].graph, context=512, chunk=CHUNK)
    with pytest.raises(TokenizerError, match="give token ids"):
        list(session.generate("Hello"))


def test_text_and_its_ids_are_the_same_prompt(artifact: Exported) -> None:
    session = artifact.session()
    assert session.tokenizer is not None
    ids = session.tokenizer.encode("Hello")
    first = list(session.generate("Hello", max_new_tokens=8, stop_ids=()))
    assert first == list(session.generate(ids, max_new_tokens=8, stop_ids=()))


def test_greedy_text_is_the_references_far_past_the_window(artifact: Exported, text: list[int]) -> None:
    """Each of 200 tokens is the one that the reference, fed with the same text in chunks, likes best."""
    new = list(artifact.session().generate(text[:20], max_new_tokens=200, stop_ids=()))
    expected = artifact.reference().logits([*text[:20], *new[:-1]])[19:]
    best = np.sort(expected, axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > FP32_LOGITS, "no two tokens are as good as each other"
    assert new == expected.argmax(-1).tolist()
    assert len(set(new)) > 5, "this compares nothing but one token over and over"


def test_generating_less(session: Session, text: list[int]) -> None:
    assert list(session.generate(text[:5], max_new_tokens=0)) == []
    assert len(list(session.generate(text[:5], max_new_tokens=1, stop_ids=()))) == 1
    assert session.position == 5, "the last token is not run"


def test_stop_tokens_end_the_text(artifact: Exported, text: list[int]) -> None:
    session = artifact.session()
    free = list(session.generate(text[:20], max_new_tokens=30, stop_ids=()))
    stop = free[10]
    cut = free[: free.index(stop)]
    assert list(session.generate(text[:20], max_new_tokens=30, stop_ids=[stop])) == cut
    session.stop_ids = frozenset([stop])
    assert list(session.generate(text[:20], max_new_tokens=30)) == cut
    assert list(session.generate(text[:20], max_new_tokens=30, stop_ids=())) == free


def test_keeping_on_equals_one_long_prompt(session: Session, text: list[int]) -> None:
    whole = list(session.generate(text[:70], max_new_tokens=12, stop_ids=()))
    session.reset()
    session.prefill(text[:33])
    assert list(session.generate(text[33:70], max_new_tokens=12, stop_ids=(), keep=True)) == whole
    # And on from there: what was generated is in the caches, but for its last token.
    assert session.position == 70 + 11
    more = list(session.generate(whole[-1:], max_new_tokens=4, stop_ids=(), keep=True))
    assert list(session.generate(text[:70], max_new_tokens=16, stop_ids=())) == whole + more


def test_a_seed_repeats_a_text(artifact: Exported, text: list[int]) -> None:
    session = artifact.session()

    def new(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, top_k=50, seed=seed)
        return list(session.generate(text[:20], max_new_tokens=20, sampling=sampling, stop_ids=()))

    assert new(3) == new(3) != new(4)


def test_global_caches_grow_geometrically_and_local_ones_never(
    session: Session, text: list[int], text_logits: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "FIRST_SLOTS", 16)
    assert sum(session.cache_bytes().values()) == 0
    sizes = []
    for position, token in enumerate(text):
        assert np.abs(session.decode(token) - text_logits[position]).max() < FP32_LOGITS, position
        sizes.append(session.cache_bytes())
    assert {size["local"] for size in sizes} == {LOCAL}
    slots = [size["global"] // (2 * PER_SLOT) for size in sizes]
    assert all(room >= position for position, room in enumerate(slots, 1))
    assert sorted(set(slots)) == [16, 32, 64, 128, 256]
    session.reserve(300)
    assert session.cache_bytes()["global"] == 2 * PER_SLOT * 512, "never more than the context"


def test_growing_and_reserving_give_the_same_text(
    artifact: Exported, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "FIRST_SLOTS", 16)
    growing, reserved = artifact.session(), artifact.session()
    reserved.reserve(512)
    expected = reserved.prefill(text[:150])
    for low in range(0, 150, 10):
        logits = growing.prefill(text[low : low + 10])
    assert np.abs(logits - expected).max() < FP32_LOGITS
    assert growing.cache_bytes()["global"] < reserved.cache_bytes()["global"]


def test_log_likelihoods_are_log_softmax(session: Session, text: list[int]) -> None:
    counts: list[int] = []
    likelihoods = session.log_likelihoods(text[:90], on_chunk=counts.append)
    logits = session.logits(text[:90]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert likelihoods.shape == (89,) and sum(counts) == 90
    assert np.abs(likelihoods - table[np.arange(89), text[1:90]]).max() < FP32_LOGITS
    assert session.log_likelihoods(text[:1]).shape == (0,)
    assert session.log_likelihoods(text[: CHUNK + 1]).shape == (CHUNK,)


@pytest.mark.parametrize(
    "module",
    ["transom", "transom.backends.onnxruntime.runtime", "transom.backends.artifact", "transom.backends.opening"],
)
def test_running_an_artifact_needs_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_generating_from_an_artifact_needs_no_torch(artifact: Exported) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import transom; session = transom.open(sys.argv[1], threads=1)\n"
        "print(len(list(session.generate('Hello', max_new_tokens=3, stop_ids=()))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(artifact.folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "3", done.stderr
    assert Path(artifact.folder).is_dir()


def test_a_call_cut_short_must_be_followed_by_a_reset(
    exported: Export, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = exported("onnxruntime", "none").session()
    expected = session.prefill(text[:9])
    run = type(session.runtime)._run

    def interrupted(self: Runtime, *args: Any) -> Any:
        run(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(session.runtime), "_run", interrupted)
        session.decode(text[9])
    with pytest.raises(SessionError, match="reset"):
        session.decode(text[9])
    session.reset()
    np.testing.assert_array_equal(session.prefill(text[:9]), expected)


def test_two_streams_do_not_mix(exported: Export, text: list[int]) -> None:
    session = exported("onnxruntime", "none").session()
    first = session.generate(text[:9], max_new_tokens=5, stop_ids=())
    second = session.generate(text[9:18], max_new_tokens=5, stop_ids=())
    next(first)
    next(second)
    with pytest.raises(SessionError, match="between two tokens"):
        next(first)
    next(second)
    session.decode(text[0])
    with pytest.raises(SessionError, match="between two tokens"):
        next(second)


def test_room_that_could_not_be_made_is_not_counted(
    exported: Export, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = exported("onnxruntime", "none").session()
    with monkeypatch.context() as patch, pytest.raises(SessionError, match="no memory for caches of 512 tokens"):
        patch.setattr(np, "zeros", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError))
        session.reserve(100)
    assert session.cache_bytes() == {"local": 0, "global": 0}
    session.prefill(text[:100])
