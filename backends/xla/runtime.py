"""jax, made ready: which device, how many threads, and what to do if it is missing. Needs no torch."""

from __future__ import annotations

import os
from typing import Any

from transom.errors import TargetError

CACHES = 1
"""Index of the programs' argument that holds the caches, which every call gives up."""

THREADS = "PJRT_NPROC"
"""Environment variable in which XLA's CPU client looks for the number of its threads, when it is made."""


def load_jax(threads: int | None = None) -> Any:
    """The `jax` module. It runs on the CPU unless JAX_PLATFORMS or jax's configuration says otherwise.

    Args:
        threads: Threads of the CPU client; by default one a core. A process has one client, made at first use, so the
            first session decides for all.

    Raises:
        TargetError: If jax is not installed, or has no device of the platform that was chosen.
    """
    try:
        import jax
    except ImportError as error:
        raise TargetError(f"the target 'xla' needs jax ({error}): pip install 'transom[xla]'") from None
    if jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")
    before = os.environ.get(THREADS)
    if threads is not None:
        os.environ[THREADS] = str(threads)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # which one depends on the platform
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TargetError(f"jax finds no device of JAX_PLATFORMS ({reason}): set JAX_PLATFORMS=cpu") from error
    finally:
        if threads is not None:
            os.environ.pop(THREADS)
            if before is not None:
                os.environ[THREADS] = before
    return jax
