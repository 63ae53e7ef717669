"""Several training runs that end in one checkpoint, kept on disk so that the whole can be stopped at any step.

The runs come one after the other, each through a loop of its own. The weights that a run ends with stand in a file
until they are merged, so that memory never holds more than the run that is going on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transom.errors import TrainingError
from transom.graphs.threads import one_thread
from transom.graphs.weight import Weight
from transom.training.averaging import Average, merge_weights
from transom.training.loop import Loop, LoopSettings, Metrics, Objective
from transom.training.state import METRICS, TrainingState
from transom.zoo.checkpoints import safetensors_writer
from transom.zoo.checkpoints.safetensors import open_weights

_IDENTITY = "runs.json"


class Runs:
    """A folder beside the one that the whole will write: `.NAME.runs`.

    Args:
        out: What the whole will write.
        settings: Of the whole, a dataclass; a folder of other settings is refused, apart from how often a run is saved.
        revision: Of the model.
        data: Identity of what it learns from, such as a digest.
        total: Steps of all runs.
        on_step: Told of every step of a run that is taken: (steps done in all runs, total, its metrics).

    Attributes:
        metrics: Of every step of the runs that are over, with the labels of its run.

    Raises:
        TrainingError: If the folder is of another model, text or settings, or cannot be written.
    """

    def __init__(
        self,
        out: Path,
        settings: Any,
        revision: str,
        data: str,
        *,
        total: int,
        on_step: Callable[[int, int, Metrics], None] = lambda done, total, metrics: None,
    ) -> None:
        self.folder = out.resolve().parent / f".{out.name}.runs"
        self._settings, self._revision, self._data = settings, revision, data
        self._total, self._on_step = total, on_step
        self.metrics: list[Metrics] = []
        self._lines: list[Mapping[str, float]] = []
        fixed_settings = {key: value for key, value in dataclasses.asdict(settings).items() if key != "save_every"}
        identity = json.dumps([fixed_settings, revision, data], sort_keys=True)
        path = self.folder / _IDENTITY
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(identity)
            same = path.read_text() == identity
        except OSError as error:
            raise TrainingError(
                f"cannot keep runs in {self.folder} ({error.strerror}): choose another place"
            ) from error
        if not same:
            raise TrainingError(
                f"{self.folder} is of runs with another model, text or settings: remove it to begin again, or choose "
                "another --out"
            )

    def train(
        self,
        name: str,
        objective: Callable[[], Objective],
        settings: LoopSettings,
        labels: Mapping[str, int],
        *,
        merged: bool = False,
    ) -> None:
        """Take a run to its end, from where it was stopped; its parameters are then `weights(name)`.

        Args:
            name: Of the run.
            objective: Makes it; not called if the run is over.
            settings: How it steps.
            labels: What its metrics are marked with.
            merged: Whether its weights went into others already, and only its metrics are wanted.

        Raises:
            TrainingError: As a loop does, or if weights cannot be written.
        """
        state = TrainingState(self.folder / name, self._settings, f"{self._revision} {name}", self._data)
        log = self.folder / f".{name}.{METRICS}"
        if not merged and not self._path(name).exists():
            saved, before = state.load(), len(self._lines)
            trained = objective()

            def on_step(done: int, total: int, metrics: Metrics) -> None:
                self._on_step(before + done, self._total, {**labels, **metrics})

            Loop(trained, settings, state=state, saved=saved, on_step=on_step).run()
            self.write(name, {key: Weight.of(value.detach().cpu()) for key, value in trained.parameters.items()})
        state.path.unlink(missing_ok=True)
        for text in log.read_text().splitlines():
            line = {**labels, **json.loads(text)}
            self._lines.append(line)
            self.metrics.append({key: value for key, value in line.items() if key not in ("step", "seconds")})

    def write(self, name: str, weights: Mapping[str, Weight], note: Callable[[], Any] = lambda: None) -> None:
        """Keep weights under a name; a reader sees all of them or none.

        Args:
            name: What to call them.
            weights: By name.
            note: Gives what to keep with them for good, when they have been read.

        Raises:
            TrainingError: If they cannot be written.
        """
        draft = self.folder / f"{name}.{uuid.uuid4().hex[:8]}"
        try:
            safetensors_writer.write(weights, draft)
            (self.folder / f"{name}.json").write_text(json.dumps(note()))
            os.replace(draft, self._path(name))
        except OSError as error:
            raise TrainingError(f"cannot keep weights in {self.folder} ({error.strerror or error})") from error
        finally:
            draft.unlink(missing_ok=True)

    def merge(self, name: str, average: Average, ends: list[str], start: Mapping[str, Weight] | None = None) -> None:
        """Merge the weights of runs; the result is kept under a name, float32, with the median angle as its note.

        That is the angle between what two runs added to a tensor, in degrees; None for averages without angles, or if
        no tensor has one.
        """
        names = self.weights(ends[0])
        begin = None if start is None else {key: start[key] for key in names}
        parts = merge_weights(average, [self.weights(end) for end in ends], begin)

        def note() -> float | None:
            arcs = [part.arc for part in parts.values() if part.arc is not None]
            angles = [angle for arc in arcs for angle in arc.angles if angle is not None]
            return math.degrees(statistics.median(angles)) if angles else None

        with one_thread():
            self.write(name, {key: part.weight(f"the merged {key}") for key, part in parts.items()}, note)

    def note(self, name: str) -> Any:
        """What was kept with weights, which may be forgotten by now."""
        return json.loads((self.folder / f"{name}.json").read_bytes())

    def has(self, name: str) -> bool:
        """Whether weights are kept under a name."""
        return self._path(name).exists()

    def weights(self, name: str) -> dict[str, Weight]:
        """What is kept under a name; nothing is in memory until read."""
        return open_weights(self._path(name))

    def forget(self, *names: str) -> None:
        """Remove weights."""
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def finish(self, folder: Path) -> None:
        """Write the metrics of all runs into the folder that the whole writes."""
        (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in self._lines))

    def remove(self) -> None:
        """Forget all: the whole is over."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
