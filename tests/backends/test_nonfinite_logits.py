"""Logits that are NaN or infinite are an error of every call that would go on from them, never a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.artifacts import CHUNK, Export
from tests.conftest import Cli, Stage
from transom.backends.reference.session import ReferenceSession
from transom.backends.runtime import Call, Result
from transom.backends.sampling import Sampling
from transom.backends.session import Session
from transom.errors import NonFiniteError, SessionError

BROKEN = 2 * CHUNK + 3
"""Position whose logits are no numbers: in the midst of the third call."""


@pytest.fixture(params=["reference", "onnxruntime", "xla"])
def session(request: pytest.FixtureRequest, exported: Export, stages: list[Stage]) -> Session:
    """A fresh session."""
    if request.param == "reference":
        return ReferenceSession(stages[-1].graph, context=512, chunk=CHUNK)
    return exported(request.param, "none").session()


def spoil(session: Session, monkeypatch: pytest.MonkeyPatch, value: float, position: int = BROKEN) -> None:
    """Replace one logit of a position."""
    honest = session.runtime.run

    def run(call: Call) -> Result:
        result = honest(call)
        logits = result.logits.copy()
        logits[:, call.start[0] + call.logit_positions == position, 7] = value
        return dataclasses.replace(result, logits=logits)

    monkeypatch.setattr(session.runtime, "run", run)


CALLS: dict[str, Callable[[Session, list[int]], Any]] = {
    "logits": lambda session, text: session.logits(text[:100]),
    "log_likelihoods": lambda session, text: session.log_likelihoods(text[:100]),
    "feed": lambda session, text: list(session.feed(text[:100], wanted="all")),
    "prefill": lambda session, text: session.prefill(text[: BROKEN + 1]),
    "decode": lambda session, text: (session.prefill(text[:BROKEN]), session.decode(text[BROKEN])),
    "greedy": lambda session, text: list(session.generate(text[: BROKEN + 1])),
    "sampled": lambda session, text: list(session.generate(text[: BROKEN + 1], sampling=Sampling(temperature=1.0))),
    "generated": lambda session, text: list(session.generate(text[: BROKEN - 2], stop_ids=())),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_refuses_them(
    session: Session, text: list[int], monkeypatch: pytest.MonkeyPatch, call: str, value: float
) -> None:
    spoil(session, monkeypatch, value)
    with pytest.raises(NonFiniteError, match=rf"1 of 512 logits at position {BROKEN} are NaN .* `transom ranges`"):
        CALLS[call](session, text)
    with pytest.raises(SessionError, match=r"call reset\(\) first"):
        session.prefill(text[:3])
    monkeypatch.undo()
    session.reset()
    assert np.isfinite(session.prefill(text[:100])).all()


def test_logits_that_nobody_wants_are_not_looked_at(
    session: Session, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(session, monkeypatch, np.nan)
    assert np.isfinite(session.prefill(text[: BROKEN + 10])).all()


def test_what_measures_them_may_ask_for_them(
    session: Session, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(session, monkeypatch, np.nan)
    session.refuses_nonfinite = False
    assert np.flatnonzero(np.isnan(session.logits(text[:100])).any(-1)).tolist() == [BROKEN]


def test_the_command_ends_with_one_line(exported: Export, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported("onnxruntime", "none").folder
    feed = Session.feed

    def spoiled(session: Session, *args: Any, **options: Any) -> Any:
        spoil(session, monkeypatch, np.nan, position=session.position)
        return feed(session, *args, **options)

    monkeypatch.setattr(Session, "feed", spoiled)
    code, out, err = cli("run", folder, "--prompt", "A")
    assert code == 2 and "logits at position" in err and "Traceback" not in out + err
