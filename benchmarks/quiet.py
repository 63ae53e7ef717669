"""Whether anything else uses the CPUs. Without that no timing is worth printing.

With two threads on two busy CPUs, llama.cpp and PyTorch (OpenMP, whose threads spin while they wait for each other)
were once seen to decode about 100 times slower than on quiet ones, ONNX Runtime 3 times: such ratios are fiction. Linux
only; elsewhere nothing is known, and the report says so.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.worker import Worker

QUIET = 0.15
"""CPUs that all else may keep busy during a timing that counts."""

_SAMPLE_SECONDS, _SHORTEST_SECONDS = 0.3, 0.2


class OtherCpu:
    """CPUs that all but one process keep busy: contenders that should sleep, and whatever else runs."""

    def __init__(self, worker: Worker | None = None) -> None:
        self._worker, self._before = worker, self._now(worker)

    def read(self) -> float | None:
        """The mean since the start; None where there is no /proc, or the time was too short for its clock."""
        after = self._now(self._worker)
        if self._before is None or after is None or after[0] - self._before[0] < _SHORTEST_SECONDS:
            return None
        return max(0.0, (after[1] - self._before[1]) / (after[0] - self._before[0]))

    @staticmethod
    def _now(worker: Worker | None) -> tuple[float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split()[1:9]
        except OSError:
            return None
        own = worker.cpu_seconds() if worker else 0.0
        if own is None:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy - own


def wait_for_quiet(patience: float) -> None:
    """Return once the CPUs are idle, or after `patience` seconds."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        meter = OtherCpu()
        time.sleep(_SAMPLE_SECONDS)
        if (busy := meter.read()) is None or busy < QUIET:
            return
