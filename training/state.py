"""A training run on disk: its state, so that it can go on after it was stopped, and the metrics of its steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from transom.errors import TrainingError

METRICS = "metrics.jsonl"
"""A line a step: its number, from 1, and its metrics."""


def digest(sequences: torch.Tensor) -> str:
    """Identity of a text as tokens."""
    return hashlib.sha256(sequences.numpy().tobytes()).hexdigest()


class TrainingState:
    """Two files beside the folder that the run will write: `.NAME.training` and `.NAME.metrics.jsonl`.

    Args:
        out: The folder.
        settings: The run's, a dataclass; a state of other settings is refused, apart from how often it is saved.
        revision: Of the model.
        data: Identity of what it learns from, such as a digest.
    """

    def __init__(self, out: Path, settings: Any, revision: str, data: str) -> None:
        parent = out.resolve().parent
        self.path, self._log = parent / f".{out.name}.training", parent / f".{out.name}.{METRICS}"
        fixed_settings = {key: value for key, value in dataclasses.asdict(settings).items() if key != "save_every"}
        self._identity = json.dumps([fixed_settings, revision, data], sort_keys=True)

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None if nothing was.

        Raises:
            TrainingError: If it is damaged, or of a run with another model, text or settings.
        """
        if not self.path.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            identity = saved.pop("identity")
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{self.path} cannot be read ({_line(error)}): remove it to begin again") from error
        if identity != self._identity:
            raise TrainingError(
                f"{self.path} is of a run with another model, text or settings: remove it to begin again, or choose "
                "another --out"
            )
        return saved

    def save(self, state: dict[str, Any]) -> None:
        """Replace what was saved; a reader sees the old state or the new one.

        Raises:
            TrainingError: If it cannot be written.
        """
        draft = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:8]}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "identity": self._identity}, draft)
            os.replace(draft, self.path)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"cannot save the state of the run to {self.path} ({_line(error)})") from error
        finally:
            draft.unlink(missing_ok=True)

    def begin_log(self, metrics: Iterable[Mapping[str, float]]) -> None:
        """Write the metrics of the steps that are saved; those of later ones will come again.

        Raises:
            TrainingError: If they cannot be written.
        """
        self._write("w", *({"step": step, **line} for step, line in enumerate(metrics, 1)))

    def log(self, line: Mapping[str, float]) -> None:
        """Add a step's metrics.

        Raises:
            TrainingError: If they cannot be written.
        """
        self._write("a", line)

    def _write(self, mode: str, *lines: Mapping[str, float]) -> None:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open(mode) as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise TrainingError(f"cannot write the metrics of the run to {self._log} ({_line(error)})") from error

    def finish(self, folder: Path) -> None:
        """Copy the metrics into the folder that the run writes."""
        shutil.copyfile(self._log, folder / METRICS)

    def remove(self) -> None:
        """Forget it: the run is over."""
        for path in (self.path, self._log):
            path.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
