"""The state of a training run on disk, so that it can go on after it was stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import torch

from transom.errors import TrainingError


class TrainingState:
    """One file beside the folder that the run will write.

    Args:
        out: The folder.
        settings: The run's, a dataclass; a state of other settings is refused, apart from how often it is saved.
        revision: Of the model.
        sequences: The text as tokens.
    """

    def __init__(self, out: Path, settings: Any, revision: str, sequences: torch.Tensor) -> None:
        self.path = out.resolve().parent / f".{out.name}.training"
        fixed_settings = {key: value for key, value in dataclasses.asdict(settings).items() if key != "save_every"}
        digest = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
        self._identity = json.dumps([fixed_settings, revision, digest], sort_keys=True)

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

    def remove(self) -> None:
        """Forget it: the run is over."""
        self.path.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
