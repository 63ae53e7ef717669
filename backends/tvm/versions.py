"""The one pair of Apache TVM packages that works together: other pairs crash while they are imported or compile."""

from __future__ import annotations

import importlib.metadata

from transom.errors import TargetError

PAIR = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
"""Version by distribution."""

INSTALL = "pip install 'transom[tvm]'"


def require(*distributions: str) -> None:
    """Check versions without importing anything.

    Raises:
        TargetError: If one of the distributions is missing, or of another version.
    """
    for name in distributions:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise TargetError(f"the target 'tvm' needs {name} {PAIR[name]}, which is missing: {INSTALL}") from None
        if installed != PAIR[name]:
            raise TargetError(f"the target 'tvm' needs {name} {PAIR[name]}, not {installed}: {INSTALL}")
