"""Runtimes by themselves: rows of a call, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.artifacts import CHUNK, Export
from tests.tolerances import FP32_LOGITS
from transom.backends.artifact import read_manifest
from transom.backends.batch import Batch
from transom.backends.onnxruntime.runtime import OnnxRuntime
from transom.backends.reference.runtime import Reference
from transom.backends.runtime import Call, Result, Runtime
from transom.errors import NonFiniteError, SessionError, TargetError

OPENED = ["reference", "onnx"]
"""What runs several sequences in one call."""


def runtime_of(target: str, exported: Export, rows: int) -> Runtime:
    """A runtime with caches of 128 slots for so many sequences."""
    pair = exported(target if target != "reference" else "onnxruntime", "none")
    runtime = (
        Reference(pair.graph, context=512, chunk=CHUNK, rows=rows)
        if target == "reference"
        else OnnxRuntime(pair.folder, read_manifest(pair.folder), threads=1, rows=rows)
    )
    runtime.allocate(128)
    return runtime


def call(tokens: list[list[int]], *starts: int) -> Call:
    """New tokens, the logits of all wanted."""
    return Call(
        tokens=np.array(tokens), start=np.array(starts), logit_positions=np.arange(len(tokens[0]), dtype=np.int64)
    )


def bytes_of(runtime: Runtime) -> int:
    return sum(array.nbytes for _, array in runtime.state_arrays())


@pytest.mark.parametrize("target", OPENED)
def test_two_rows_have_the_logits_of_two_sessions(target: str, exported: Export, text: list[int]) -> None:
    """Far past the window, in chunks and then token by token, in caches that grow on the way."""
    texts = [text[:110], text[40:150]]
    runtime = runtime_of(target, exported, rows=2)
    single = runtime_of(target, exported, rows=1)
    assert bytes_of(runtime) == 2 * bytes_of(single)
    sizes = [CHUNK, CHUNK, 5, *[1] * (110 - 2 * CHUNK - 5)]
    parts: list[NDArray[np.float32]] = []
    position = 0
    for size in sizes:
        if position == 2 * CHUNK:
            runtime.allocate(256)
        result = runtime.run(call([row[position : position + size] for row in texts], position, position))
        assert result.logits.shape == (2, size, 512) and result.logits.dtype == np.float32
        parts.append(result.logits)
        position += size
    logits = np.concatenate(parts, axis=1)
    for row, tokens in enumerate(texts):
        expected = exported("onnxruntime", "none").session().logits(tokens)
        assert np.abs(logits[row] - expected).max() < FP32_LOGITS, row
    assert np.abs(logits[0] - logits[1]).max() > 1, "the rows are different texts"


@pytest.mark.parametrize("target", ["reference", "onnxruntime", "onnx", "xla", "tvm", "tensorrt"])
def test_another_number_of_rows_is_refused(target: str, exported: Export, text: list[int]) -> None:
    if target in ("xla", "tvm"):
        pytest.importorskip({"xla": "jax", "tvm": "tvm"}[target])
    session = (
        exported("onnxruntime", "none").reference() if target == "reference" else exported(target, "none").session()
    )
    session.prefill(text[:3])
    runtime = session.runtime
    with pytest.raises(SessionError, match=rf"{runtime.title} was given 2 sequences in one call and has room for 1"):
        runtime.run(call([text[3:7], text[3:7]], 3, 3))
    # Refused before anything ran: the states hold what they held.
    alone = runtime.run(call([text[3:7]], 3)).logits[0]
    session.reset()
    assert np.abs(session.logits(text[:7])[3:] - alone).max() < FP32_LOGITS


@pytest.mark.parametrize("target", OPENED)
def test_rows_that_start_at_different_positions_are_refused(target: str, exported: Export, text: list[int]) -> None:
    runtime = runtime_of(target, exported, rows=2)
    with pytest.raises(SessionError, match=r"2 sequences that start at \[0, 4\], and takes one position for all"):
        runtime.run(call([text[:4], text[:4]], 0, 4))
    with pytest.raises(SessionError, match=r"2 sequences that start at \[4\]"):
        runtime.run(call([text[:4], text[:4]], 4))


def test_an_artifact_for_one_sequence_at_a_time(exported: Export) -> None:
    with pytest.raises(TargetError, match="one sequence at a time, not 2: export it with --target onnx"):
        runtime_of("onnxruntime", exported, rows=2)


def test_a_batch_wants_a_runtime_that_takes_rows(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what a session says of logits that are no numbers."""
    reference = runtime_of("reference", exported, rows=1)
    with pytest.raises(SessionError, match="the reference runs one sequence at a time here"):
        Batch(reference)
    with pytest.raises(SessionError, match="the reference holds the states of 1 here"):
        reference.hold({}, 2)

    def broken(self: OnnxRuntime, call: Call) -> Result:
        return Result(logits=np.full((len(call.tokens), 1, self.vocab_size), np.nan, np.float32))

    monkeypatch.setattr(OnnxRuntime, "_run", broken)
    with pytest.raises(NonFiniteError, match="512 of 512 logits at position 2 are NaN"):
        Batch(runtime_of("onnxruntime", exported, rows=1)).begin([[2, 3, 4], [2, 4, 3]], 8)


class Failing(Reference):
    error: Exception

    def _run(self, call: Call) -> Result:
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("\nout of\nmemory"), r"the reference failed at position 9 \(out of\): export"),
        (KeyError(), r"the reference failed at position 9 \(KeyError\)"),
        (ValueError("x" * 1000), r"\(x{300}\)"),
        (SessionError("of its own"), "^of its own$"),
    ],
)
def test_what_a_runtime_raises_is_one_error_of_ours(error: Exception, message: str, exported: Export) -> None:
    runtime = Failing(exported("onnxruntime", "none").graph, context=512, chunk=CHUNK)
    runtime.error = error
    with pytest.raises(SessionError, match=message):
        runtime.run(call([[1, 2]], 9))
