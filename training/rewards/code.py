"""Whether a completion's Python code gives the right answers, run in a sandbox that never holds them.

The code runs in a box (`sandbox.py`); what comes out is plain data, compared outside. So nothing that code does in its
box, to the interpreter, to equality or to exit codes, makes a wrong answer right. A test that is itself code, such as
HumanEval's `check(candidate)`, runs in a second box: its candidate sends arguments to the first and gets values back.

Reference, one of:
    `cases`: a list of {`stdin`, `stdout`}: each runs the whole program once. Space at the ends of lines does not count.
    `function`, `cases`: a name and a list of {`args`, `returns`}. A tuple equals a list; floats are equal exactly, or
        within `tolerance`, relative.
    `function`, `check`: a name and a source that defines `check(candidate)`, which raises if the function is wrong.
`prefix` goes before the code. The code is the last fenced block of the completion, or all of it.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Mapping
from typing import Any

from transom.training.rewards.boxed import decode
from transom.training.rewards.reward import Score
from transom.training.rewards.sandbox import Box, BoxError, Limits, Sandbox
from transom.wording import shortened

_FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def code_of(completion: str) -> str:
    """The last fenced block, or all."""
    blocks = _FENCE.findall(completion)
    return blocks[-1] if blocks else completion


def equal(actual: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Whether plain data is equal to what JSON can hold.

    Args:
        actual: What `decode` gave.
        expected: From JSON.
        tolerance: Largest relative difference of two numbers of which one is a float.
    """
    if isinstance(expected, list):
        return (
            isinstance(actual, list | tuple)
            and len(actual) == len(expected)
            and all(equal(*pair, tolerance) for pair in zip(actual, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(actual, dict)
            and actual.keys() == expected.keys()
            and all(equal(actual[key], value, tolerance) for key, value in expected.items())
        )
    if (isinstance(expected, float) and type(actual) in (int, float)) or (
        isinstance(actual, float) and type(expected) is int
    ):
        try:
            return bool(actual == expected or math.isclose(actual, expected, rel_tol=tolerance))
        except OverflowError:
            return False
    return type(actual) is type(expected) and bool(actual == expected)


class Code:
    """1 if every test passes, else 0.

    Args:
        sandbox: Where code runs. None: one with the default limits, made at the first score.
        limits: Of that one.
    """

    def __init__(self, sandbox: Sandbox | None = None, limits: Limits | None = None) -> None:
        self._sandbox, self._limits = sandbox, limits
        self._lock = threading.Lock()

    @property
    def sandbox(self) -> Sandbox:
        with self._lock:
            if self._sandbox is None:
                self._sandbox = Sandbox(self._limits)
            return self._sandbox

    def score(self, prompt: str, completion: str, reference: Mapping[str, Any]) -> Score:
        if (broken := _broken(reference)) is not None:
            return Score(None, broken)
        source = reference.get("prefix", "") + code_of(completion)
        sandbox, name = self.sandbox, reference.get("function")
        try:
            if name is None:
                return _run_programs(sandbox, source, reference)
            with sandbox.open({"mode": "function", "source": source, "name": name}) as box:
                _reply(box)
                if "check" in reference:
                    return _run_check(sandbox, box, reference["check"])
                return _run_cases(box, reference)
        except BoxError as reason:
            return Score(0.0, str(reason))


def _run_programs(sandbox: Sandbox, source: str, reference: Mapping[str, Any]) -> Score:
    for index, case in enumerate(reference["cases"]):
        output = sandbox.run(source, case["stdin"])
        if _lines(output) != _lines(case["stdout"]):
            return Score(0.0, f"case {index}: it printed {shortened(output.strip())!r}")
    return Score(1.0, "every case passes")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _reply(box: Box) -> dict[str, Any]:
    """What the box answers: it is ready, or a value.

    Raises:
        BoxError: If it is an error, or no answer.
    """
    message = box.line()
    if "error" in message:
        raise BoxError(f"it raised {shortened(json.dumps(message['error']))}")
    return message


def _run_cases(box: Box, reference: Mapping[str, Any]) -> Score:
    tolerance = reference.get("tolerance", 0.0)
    for index, case in enumerate(reference["cases"]):
        box.put(json.dumps({"call": [_encoded(case["args"]), {"dict": []}]}).encode() + b"\n")
        try:
            value = decode(_reply(box).get("value"))
        except (ValueError, TypeError, RecursionError) as reason:
            raise BoxError("its answer is no value") from reason
        if not equal(value, case["returns"], tolerance):
            return Score(0.0, f"case {index}: it returned {shortened(repr(value))}")
    return Score(1.0, "every case passes")


def _encoded(value: Any) -> Any:
    """JSON as `boxed.decode` reads it."""
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    return {"dict": [[key, _encoded(item)] for key, item in value.items()]} if isinstance(value, dict) else value


def _run_check(sandbox: Sandbox, box: Box, check: str) -> Score:
    """Carry calls from the box of the check to that of the code.

    What fails before the code has given a value is the check's fault, and has no score.
    """
    answers = 0
    with sandbox.open({"mode": "check", "source": check}) as judge:
        while True:
            try:
                message = judge.line()
            except BoxError as reason:
                return Score(0.0 if answers else None, f"the reference's check: {reason}")
            if "call" not in message:
                break
            box.put(json.dumps({"call": message["call"]["tuple"]}).encode() + b"\n")
            reply = box.line()
            try:
                data = json.dumps({key: reply[key] for key in ("value", "error") if key in reply})
            except RecursionError as reason:
                raise BoxError("its answer is no value") from reason
            judge.put(data.encode() + b"\n")
            answers += 1
    if not answers:
        return Score(None, f"the reference's check does not call the function: {shortened(json.dumps(message))}")
    if message == {"passed": True}:
        return Score(1.0, "the check passes")
    return Score(0.0, f"the check raised {shortened(json.dumps(message.get('error')))}")


def _broken(reference: Mapping[str, Any]) -> str | None:
    """What is wrong with a reference; None if nothing is."""
    name, cases, check = reference.get("function"), reference.get("cases"), reference.get("check")
    tolerance = reference.get("tolerance", 0.0)
    if type(tolerance) not in (int, float) or not 0 <= tolerance < 1:
        return "the reference's 'tolerance' is no number from 0 to 1"
    if not isinstance(reference.get("prefix", ""), str):
        return "the reference's 'prefix' is no text"
    if name is not None and not isinstance(name, str):
        return "the reference's 'function' is no name"
    if (cases is None) == (check is None):
        return "the reference needs either 'cases' or 'check'"
    if check is not None:
        return None if isinstance(check, str) and name is not None else "a 'check' is a source, and needs a 'function'"
    keys = {"stdin": str, "stdout": str} if name is None else {"args": list, "returns": object}
    if not isinstance(cases, list) or not cases:
        return "the reference's 'cases' is no list of any case"
    for index, case in enumerate(cases):
        if not isinstance(case, dict) or not all(
            key in case and isinstance(case[key], kind) for key, kind in keys.items()
        ):
            return f"the reference's case {index} needs {' and '.join(keys)}"
        if "returns" in case and _has_nan(case["returns"]):
            return f"the reference's case {index} expects NaN, which equals nothing"
    return None


def _has_nan(value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(map(_has_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isnan(value)


REWARD = Code
