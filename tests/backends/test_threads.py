"""No session is given far more threads than there are cores."""

from __future__ import annotations

import os

import pytest

import transom
from tests.artifacts import Export
from transom.backends.threads import PER_CORE, check_threads
from transom.errors import TargetError

MOST = PER_CORE * (os.cpu_count() or 1)


@pytest.mark.parametrize("threads", [None, 1, MOST])
def test_what_is_taken(threads: int | None) -> None:
    check_threads(threads)


@pytest.mark.parametrize("target", ["onnxruntime", "xla", "tvm", "tensorrt"])
@pytest.mark.parametrize("threads", [-1, 0, MOST + 1, 4096])
def test_what_is_refused(target: str, threads: int, exported: Export) -> None:
    with pytest.raises(TargetError, match=f"^{threads} threads on .* cores: choose from 1 to {MOST}"):
        transom.open(exported(target, "none").folder, threads=threads)
