"""A contender in a process of its own, so that memory and threads are its own, and the line to it.

One request at a time, one JSON object a line: {"call": method, "args": [...]} is answered by {"value": ...} or
{"error": ...}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import select
import subprocess
import sys
from types import TracebackType
from typing import Any

from benchmarks.contender import Setup
from benchmarks.contenders import build


class ContenderError(RuntimeError):
    """A contender cannot take part, or gave up."""


class Worker:
    """The near end. Use it in a `with`, or call `close`."""

    def __init__(self, name: str, setup: Setup) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name, json.dumps(dataclasses.asdict(setup))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": str(setup.threads), "HF_HUB_OFFLINE": "1"},
        )

    def call(self, method: str, *args: Any, cap: float | None = None) -> Any:
        """Call a method of the contender.

        Args:
            method: Its name.
            *args: What JSON can hold.
            cap: Most seconds to wait for the answer; then the process is ended.

        Raises:
            ContenderError: If it failed, died or took longer.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"call": method, "args": args}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderError(f"ended with code {self._process.wait()} before {method}") from None
        if not select.select([self._process.stdout], [], [], cap)[0]:
            self.close()
            raise ContenderError(f"skipped: over {cap:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(f"ended with code {self._process.wait()} during {method}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer["value"]

    def cpu_seconds(self) -> float | None:
        """CPU time of the process so far; None where there is no /proc."""
        try:
            with open(f"/proc/{self._process.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()


def peak_rss() -> int:
    """Most bytes of this process that were in memory at once, mapped files included."""
    try:
        with open("/proc/self/status") as file:
            # Not `ru_maxrss`, which starts from the parent's size.
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """The far end."""
    # Libraries print; the answers go where they cannot.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if contender is None:
                contender = build(sys.argv[1], Setup(**json.loads(sys.argv[2])))
            method = peak_rss if request["call"] == "peak_rss" else getattr(contender, request["call"])
            answer = {"value": method(*request["args"])}
        except ModuleNotFoundError as error:
            answer = {"error": f"not installed ({error.name}): pip install 'transom[bench]'"}
        except Exception as error:  # whatever it is, the others go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
