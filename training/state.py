"""A training run on disk: its state, so that it can go on after it was stopped, and the metrics of its steps."""

from __future__ import annotations

import dataclasses
import glob
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
from transom.training.parallel import ONE, Shards

METRICS = "metrics.jsonl"
"""A line a step: its number, from 1, and its metrics."""


def digest(sequences: torch.Tensor) -> str:
    """Identity of a text as tokens."""
    return hashlib.sha256(sequences.numpy().tobytes()).hexdigest()


class TrainingState:
    """Two files beside the folder that the run will write: `.NAME.training` and `.NAME.metrics.jsonl`.

    Several processes write tensors into a folder `.NAME.training.step-N`, each its own. Then the first one writes the
    file, which names the folder. Any number of processes takes up either.

    Args:
        out: The folder.
        settings: The run's, a dataclass; a state of other settings is refused, apart from how often it is saved.
        revision: Of the model.
        data: Identity of what it learns from, such as a digest.
        shards: Where tensors are. Only the first process writes files.
    """

    def __init__(self, out: Path, settings: Any, revision: str, data: str, shards: Shards = ONE) -> None:
        self._shards = shards
        parent = out.resolve().parent
        self.path, self._log = parent / f".{out.name}.training", parent / f".{out.name}.{METRICS}"
        fixed_settings = {key: value for key, value in dataclasses.asdict(settings).items() if key != "save_every"}
        self._identity = json.dumps([fixed_settings, revision, data], sort_keys=True)

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None if nothing was.

        Raises:
            TrainingError: If it is damaged, or of a run with another model, text or settings, or not all processes see
                the same.
        """
        saved = self._load()
        self._shards.check_same(
            (self._identity, None if saved is None else len(saved["metrics"])),
            f"the processes don't see the same {self.path}, model or text: name folders that all of them share",
        )
        return saved

    def _load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            # Of several processes, each reads its rows only.
            saved: dict[str, Any] = torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=self._shards.count > 1
            )
            identity = saved.pop("identity")
            if identity == self._identity and isinstance(saved["tensors"], str):
                saved["tensors"] = self._shards.load(self.path.with_name(saved["tensors"]))
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
            folder = None
            if self._shards.count > 1:
                folder = self.path.with_name(f"{self.path.name}.step-{len(state['metrics'])}")
                self._shards.save(state["tensors"], folder)
                state = {**state, "tensors": folder.name}
            if self._shards.is_first:
                torch.save({**state, "identity": self._identity}, draft)
                os.replace(draft, self.path)
                self._remove_folders(but=folder)
        except (OSError, RuntimeError) as error:
            raise TrainingError(f"cannot save the state of the run to {self.path} ({_line(error)})") from error
        finally:
            draft.unlink(missing_ok=True)

    def _remove_folders(self, but: Path | None = None) -> None:
        for folder in self.path.parent.glob(f"{glob.escape(self.path.name)}.step-*"):
            if folder != but:
                shutil.rmtree(folder, ignore_errors=True)

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
        if not self._shards.is_first:
            return
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open(mode) as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise TrainingError(f"cannot write the metrics of the run to {self._log} ({_line(error)})") from error

    def finish(self, folder: Path) -> None:
        """Copy the metrics into the folder that the run writes."""
        if self._shards.is_first:
            shutil.copyfile(self._log, folder / METRICS)

    def remove(self) -> None:
        """Forget it: the run is over."""
        if self._shards.is_first:
            for path in (self.path, self._log):
                path.unlink(missing_ok=True)
            self._remove_folders()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
