"""What every contender can do. Each lives in a process of its own; see `benchmarks.worker`."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WEIGHT_FILES = {".onnx", ".data", ".gguf", ".safetensors"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What all contenders share.

    Attributes:
        artifacts: Folder of what they run, one folder each.
        context: Tokens that their caches must be able to hold.
        threads: Threads of the runtime.
    """

    artifacts: str
    context: int
    threads: int


class Contender(abc.ABC):
    """A runtime with the model, and one sequence in its caches."""

    model = "gemma3-270m"

    def __init__(self, folder: Path, setup: Setup, **options: Any) -> None:
        self.folder, self.context, self.threads, self.options = folder, setup.context, setup.threads, options

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make in `self.folder` what `load` reads. Runs in another process than all else."""

    @abc.abstractmethod
    def load(self) -> None:
        """Open the model, ready for the first token."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Version and settings."""

    @abc.abstractmethod
    def clear(self, room: int) -> None:
        """Empty the caches and make room for so many tokens. Is not timed."""

    @abc.abstractmethod
    def run(self, ids: Sequence[int]) -> None:
        """Run tokens after those that the caches hold, up to the logits of the last one, in reach of the CPU."""

    @abc.abstractmethod
    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        """Log probability (nats) of every token but the first given all before it, from empty caches."""

    @abc.abstractmethod
    def cache_bytes(self) -> int | None:
        """Bytes of the caches as allocated now; None if it does not say."""

    def prefill(self, ids: Sequence[int], room: int) -> float:
        """Seconds to read a prompt from empty caches."""
        self.clear(len(ids) + room)
        began = time.perf_counter()
        self.run(ids)
        return time.perf_counter() - began

    def decode(self, ids: Sequence[int]) -> float:
        """Seconds a token, one at a time after what the caches hold."""
        began = time.perf_counter()
        for token in ids:
            self.run([token])
        return (time.perf_counter() - began) / len(ids)

    def open(self, first: int) -> float:
        """Seconds to load the model and run one token, which is when mapped weights are read."""
        began = time.perf_counter()
        self.load()
        self.clear(1)
        self.run([first])
        return time.perf_counter() - began

    def weight_bytes(self) -> int:
        """Bytes of the model's files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.suffix in WEIGHT_FILES)
