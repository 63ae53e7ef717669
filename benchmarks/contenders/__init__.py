"""Who takes part, by name. A contender's module is imported in its own process only."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from benchmarks.contender import Contender, Setup

BASELINE = "llama.cpp"

CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transom-fp32": ("transom", {"quant": "none"}),
    "transom-int8": ("transom", {"quant": "int8"}),
    "transom-int4": ("transom", {"quant": "int4"}),
    BASELINE: ("llama_cpp", {"flash_attention": True}),
    "transformers": ("transformers_eager", {"attention": "sdpa"}),
    "llama.cpp-noflash": ("llama_cpp", {"flash_attention": False}),
    "transformers-noflash": ("transformers_eager", {"attention": "eager"}),
}
"""Name -> (module, options)."""

DEFAULT = [name for name in CONTENDERS if not name.endswith("-noflash")]
"""The others with flash attention or its like; the `-noflash` ones are there to check which way is faster."""


def build(name: str, setup: Setup) -> Contender:
    """Import a contender and build it.

    Raises:
        ModuleNotFoundError: If its runtime is not installed.
    """
    module, options = CONTENDERS[name]
    contender = importlib.import_module(f"benchmarks.contenders.{module}").CONTENDER
    built: Contender = contender(Path(setup.artifacts) / name, setup, **options)
    return built
