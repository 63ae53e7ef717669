"""Honest programs in the sandbox, references that are wrong, and machines where no box can be."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.training.rewards.boxes import code, needs_bubblewrap
from transom.errors import RewardError
from transom.training.rewards import boxed, sandbox, syscalls
from transom.training.rewards.code import Code, code_of, equal
from transom.training.rewards.reward import Sample, score_many
from transom.training.rewards.sandbox import Sandbox

SUM = {"cases": [{"stdin": "2 5\n", "stdout": "7"}, {"stdin": "30 12\n", "stdout": "42"}]}
SOURCE = "print(sum(map(int, input().split())))"
HEADERS = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))


@needs_bubblewrap
@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (SOURCE, 1.0),
        (f"First:\n```python\nprint(0)\n```\nBetter:\n```python\n{SOURCE}\n```\nDone.", 1.0),
        ("if __name__ == '__main__':\n    a, b = map(int, open(0).read().split())\n    print(a + b)", 1.0),
        (f"def work(): {SOURCE}\nimport threading\nthread = threading.Thread(target=work)\nthread.start()", 1.0),
        ("open('/tmp/x', 'w').write(input())\nprint(sum(map(int, open('/tmp/x').read().split())))", 1.0),
        (f"import numbers, math, re, json, heapq, decimal, random, datetime, itertools\n{SOURCE}", 1.0),
        (f"{SOURCE}\nraise SystemExit", 1.0),
        ("a, b = input().split()\nprint(a + b)", 0.0),
        ("print(7, 'or', 42)", 0.0),
    ],
)  # fmt: skip
def test_programs(completion: str, value: float) -> None:
    score = code().score("", completion, SUM)
    assert score.value == value, score


@needs_bubblewrap
def test_large_inputs_and_outputs_cross() -> None:
    text = "\n".join(map(str, range(9_000)))
    reference = {"cases": [{"stdin": text, "stdout": text}]}
    assert code().score("", "import sys\nfor line in sys.stdin: print(line, end='')", reference).value == 1.0
    ignored = {"cases": [{"stdin": text * 20, "stdout": "done"}]}
    assert code().score("", "print('done')", ignored).value == 1.0


@needs_bubblewrap
def test_a_failure_says_what_failed() -> None:
    assert "case 1: it printed '7'" in code().score("", "print(7)", SUM).reason
    assert "ZeroDivisionError" in code().score("", "1 / 0", SUM).reason
    assert "longer than 1 s" in Code(limits=sandbox.Limits(seconds=1)).score("", "while True: pass", SUM).reason
    function = {"function": "f", "cases": [{"args": [1], "returns": 2}]}
    assert "ValueError" in code().score("", "def f(x): raise ValueError", function).reason
    assert "case 0: it returned 1" in code().score("", "def f(x): return x", function).reason


@needs_bubblewrap
@pytest.mark.parametrize(
    ("source", "args", "returns", "value"),
    [
        ("def f(x): return x[::-1]", [[1, "a", None]], [None, "a", 1], 1.0),
        ("def f(x): return tuple(x)", [[1, 2]], [1, 2], 1.0),
        ("def f(x): return {'a': [x, True]}", [1.5], {"a": [1.5, True]}, 1.0),
        ("def f(x): return x['k']['n']", [{"k": {"n": 3}}], 3, 1.0),
        ("def f(x): return {x}", [1], [1], 0.0),
        ("def f(x): return x / 3", [1], 0.333333, 0.0),
        ("def f(x): print('words'); return x", [1], 1, 1.0),
        ("def f(x): return 2 ** x", [4000], 2**4000, 1.0),
    ],
)
def test_functions(source: str, args: list[Any], returns: Any, value: float) -> None:
    assert code().score("", source, {"function": "f", "cases": [{"args": args, "returns": returns}]}).value == value


@needs_bubblewrap
def test_checks_see_every_kind_of_plain_data() -> None:
    check = """
import math
def check(candidate):
    for value in ((1, (2,)), {1, 2}, {1: "a", (2, 3): None}, b"x", 1j, frozenset({4}), [float("inf")], "\\ud800"):
        got = candidate(value, again=value)
        assert got == [value, value] and type(got[0]) is type(value), got
"""
    reference = {"function": "f", "check": check}
    assert code().score("", "def f(x, again): return [x, again]", reference).value == 1.0
    assert code().score("", "def f(x, again): return [x, 0]", reference).value == 0.0


@needs_bubblewrap
def test_a_prefix_is_completed() -> None:
    """As HumanEval's prompts are."""
    reference = {"prefix": "def f(x):\n", "function": "f", "check": "def check(candidate): assert candidate(2) == 3"}
    assert code().score("", "    return x + 1\n", reference).value == 1.0


@needs_bubblewrap
@pytest.mark.parametrize(
    "check",
    ["def check(candidate): pass", "check = 7", "no Python", "def check(candidate): candidate(print)",
     "import os\nos._exit(0)"],
)  # fmt: skip
def test_a_check_that_fails_by_itself_gives_no_score(check: str) -> None:
    score = code().score("", "def f(x): return x", {"function": "f", "check": check})
    assert score.value is None and "the reference's check" in score.reason


@pytest.mark.parametrize(
    "reference",
    [
        {}, {"cases": []}, {"cases": [{"stdin": "x"}]}, {"cases": [{"stdin": 1, "stdout": "x"}]}, {"cases": ["x"]},
        {"function": 1, "cases": [{"args": [], "returns": 1}]}, {"function": "f", "cases": [{"args": 1, "returns": 1}]},
        {"function": "f", "cases": [{"args": []}]}, {"check": "x"}, {"function": "f", "check": 1},
        {"cases": [], "check": "x"},
        {"prefix": 1, **SUM}, {"function": "f", "cases": [{"args": [], "returns": [float("nan")]}]},
        {"function": "f", "cases": [{"args": [], "returns": 1}], "tolerance": "x"},
    ],
)  # fmt: skip
def test_a_broken_reference_gives_no_score(reference: dict[str, Any]) -> None:
    assert Code().score("", "print(1)", reference).value is None


def test_equality() -> None:
    assert equal([1, (2.0, "a")], [1.0, [2, "a"]])
    assert not equal(True, 1) and not equal(1, True) and not equal("1", 1) and not equal(None, False)
    assert not equal(0.1 + 0.2, 0.3) and equal(0.1 + 0.2, 0.3, 1e-9)
    assert not equal(10**400, 1.0) and not equal({"a": 1}, {"a": 1, "b": 2}) and not equal([1], [1, 1])


def test_the_last_block_is_the_code() -> None:
    assert code_of("```\na\n```\ntext\n```py\nb\n```") == "b\n"
    assert code_of("x = 1") == "x = 1"


@pytest.mark.parametrize(
    "data", [{"bytes": 10**12}, {"set": [[1]]}, {"complex": [1, 2, 3]}, {"x": []}, {}, {"dict": [1]}]
)
def test_what_no_box_writes_is_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        boxed.decode(data)


@needs_bubblewrap
def test_many_at_a_time() -> None:
    samples = [Sample("", source, SUM) for source in (SOURCE, "print(1)") * 2]
    scores = score_many(code(), samples, workers=4)
    assert [score.value for score in scores.scores] == [1.0, 0.0, 1.0, 0.0]


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewardError, match="bwrap is missing: install bubblewrap"):
        Code().score("", "print(1)", SUM)


def test_a_box_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    """Not a completion's failure."""
    with pytest.raises(RewardError, match="is no program that can be run"):
        Sandbox(bwrap=tmp_path / "bwrap")
    with pytest.raises(RewardError, match="does not run"):
        Sandbox(bwrap="/bin/false")


def test_no_filter_for_other_machines() -> None:
    with pytest.raises(RewardError, match="known for riscv64"):
        syscalls.program("riscv64")
    assert len(syscalls.program("x86_64")) % 8 == len(syscalls.program("aarch64")) % 8 == 0


@pytest.mark.skipif(not all(path.is_file() for path in HEADERS), reason="the kernel's headers are not installed")
def test_numbers_of_calls_are_those_of_the_kernel() -> None:
    for index, path in enumerate(HEADERS):
        pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
        numbers = {name: int(number) for name, number in re.findall(pattern, path.read_text())}
        numbers.setdefault("newfstatat", numbers.get("fstatat", -1))
        for name, ours in {**syscalls.ALLOWED, "clone": syscalls.CLONE}.items():
            assert ours[index] == numbers.get(name), name


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_starts_boxes_as_nobody() -> None:
    with code().sandbox.open({"mode": "program", "source": "import time\ntime.sleep(60)"}) as box:
        shown = subprocess.run(["ps", "-o", "uid=", "-p", str(box._process.pid)], capture_output=True, check=False)
        assert int(shown.stdout) == sandbox.NOBODY
