"""Fine-tuning of what makes soft tokens of images, on pairs of image and text: an adapter, or a whole checkpoint.

A run can be stopped at any step and goes on where it was last saved.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from transom.backends.folder import Kind, new_folder
from transom.errors import ConfigError, TrainingError
from transom.graphs.weight import Weight
from transom.images.pairs import read_pairs
from transom.json_object import read_object
from transom.training.checkpoint import REPORT, check_apart, checkpoint_files
from transom.training.loop import Loop, Metrics, OnStep
from transom.training.objectives.vision import Vision, VisionSettings, identity, read_examples
from transom.training.state import TrainingState
from transom.zoo.checkpoints.adapter import Adapter, write_adapter
from transom.zoo.checkpoints.containers import ADAPTER
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.companions import write_companions
from transom.zoo.model import Model


def _files_of_run(folder: Path) -> frozenset[str] | None:
    try:
        report = read_object(folder / REPORT)
    except ConfigError:
        return None
    if report is None or report.get("kind") != _KIND:
        return None
    return frozenset({*ADAPTER[:2], *checkpoint_files(folder)})


_KIND = "finetune-vision"
RUN = Kind(title="what transom finetune-vision wrote", files=_files_of_run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetuned:
    """A run that is over.

    Attributes:
        folder: What it wrote.
        metrics: Of every step.
        before: Loss and exact match on the pairs that were held out, before the first step; empty without such pairs.
        after: The same after the last one.
    """

    folder: Path
    metrics: tuple[Metrics, ...]
    before: Metrics
    after: Metrics


def finetune_vision(
    model: Model,
    settings: VisionSettings,
    *,
    data: Path,
    out: Path,
    held_out: int = 0,
    merge: bool = False,
    overwrite: bool = False,
    on_step: OnStep = lambda done, total, metrics: None,
) -> Finetuned:
    """Train, and write an adapter in peft's format, or a whole checkpoint.

    Args:
        model: What to begin with, opened with its encoder of images.
        settings: How to train.
        data: JSON lines; see `read_pairs`.
        out: Folder to write. It appears only when it is whole; until then the state of the run stands beside it.
        held_out: So many pairs at the end of the file are not learnt from, but measured before and after.
        merge: Whether to write a checkpoint with the adapter in its weights. What `full` trained is always one.
        overwrite: Whether to replace a folder that an earlier run wrote.
        on_step: Told of every step.

    Raises:
        PairsError: If the pairs cannot be read.
        ImageError: If an image cannot, or a prompt has several places for it.
        TrainingError: If the model sees no images, no pair is left to learn from, the device is missing, a saved state
            is of another run, or training diverges.
        ArtifactError: If `out` exists or cannot be written.
    """
    check_apart(out, model)
    with new_folder(out, overwrite=overwrite, kind=RUN) as folder:
        pairs = read_pairs(data)
        if held_out >= len(pairs):
            raise TrainingError(f"{data} has {len(pairs)} pairs, of which {held_out} are held out: hold out fewer")
        examples = read_examples(model, pairs)
        learnt, kept = examples[: len(pairs) - held_out], examples[len(pairs) - held_out :]
        objective = Vision(model, settings, learnt)
        state = TrainingState(out, settings, model.revision, identity(pairs, held_out))
        saved = state.load()
        # Measured before a saved state is taken up.
        before = objective.measure(kept) if kept else {}
        loop = Loop(objective, settings.loop, state=state, saved=saved, on_step=on_step)
        metrics = loop.run()
        after = objective.measure(kept) if kept else {}
        _write(objective, model, settings, folder, merge=merge)
        report = {
            "kind": _KIND,
            "settings": dataclasses.asdict(settings),
            "source": model.source,
            "revision": model.revision,
            "pairs": len(learnt),
            "loss": [step["loss"] for step in metrics],
            "held_out": {"pairs": held_out, "before": before, "after": after},
        }
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        state.finish(folder)
    state.remove()
    return Finetuned(folder=out, metrics=tuple(metrics), before=before, after=after)


def _write(objective: Vision, model: Model, settings: VisionSettings, folder: Path, *, merge: bool) -> None:
    """The adapter, or the checkpoint."""
    if settings.method == "full":
        trained = {name: Weight.of(tensor, "training") for name, tensor in objective.weights().items()}
        weights = {**model.weights, **trained}
    elif merge:
        weights = Adapter(factors=objective.factors(), scale=settings.factor / settings.rank).merged(model.weights)
    else:
        write_adapter(folder, objective.factors(), alpha=settings.factor, base=model.source)
        return
    write_checkpoint(folder, model.config, weights, dtype=None)
    write_companions(model, folder)
