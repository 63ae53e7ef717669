"""jax, made ready: which device, how many threads, and what to do if it is missing. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transom.errors import TargetError

CACHES = 1
"""Index of the programs' argument that holds the caches, which every call gives up."""

GPUS = ("rocm", "cuda")
"""jax's names of the platforms of GPUs; a device of either calls itself "gpu". ROCm stands first: jax raises where its
plugin is missing, while it passes over CUDA without a card and takes the next platform."""

THREADS = "PJRT_NPROC"
"""Environment variable in which XLA's CPU client looks for the number of its threads, when it is made."""


def load_jax(threads: int | None = None) -> Any:
    """The `jax` module. It runs on a GPU if jax has one, else on the CPU, unless JAX_PLATFORMS or jax's configuration
    says otherwise. A TPU is used only where they name it: libtpu without a TPU waits for one.

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
    before = os.environ.get(THREADS)
    if threads is not None:
        os.environ[THREADS] = str(threads)
    try:
        if jax.config.jax_platforms is None:
            _choose_platform(jax)
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


def require_platform(jax: Any, platforms: Sequence[str]) -> None:
    """Compare where jax runs with the platforms that an artifact's programs were exported for.

    Raises:
        TargetError: If the programs are for other platforms.
    """
    platform = jax.default_backend()
    names = GPUS if platform == "gpu" else (platform,)
    if not set(names) & set(platforms):
        raise TargetError(
            f"the programs are for {', '.join(platforms)}, and jax runs on {platform}: export the model again, or set "
            f"JAX_PLATFORMS={platforms[0]}"
        )


def _choose_platform(jax: Any) -> None:
    """Name a GPU's platform if jax can start it, else the CPU. The CPU stays beside a GPU, for what runs there."""
    for platform in GPUS:
        jax.config.update("jax_platforms", f"{platform},cpu")
        try:
            jax.devices()
            return
        except (RuntimeError, AssertionError):  # no plugin, or no card
            continue
    jax.config.update("jax_platforms", "cpu")
