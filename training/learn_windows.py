"""Learn the window of every layer of a checkpoint: the run from text to folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from transom.backends.folder import new_folder
from transom.graphs.weight import Weight
from transom.training.checkpoint import TRAINED, check_apart, write_trained
from transom.training.loop import Loop, Metrics, OnStep
from transom.training.objectives.windows import LearnWindows, WindowSettings
from transom.training.state import TrainingState, digest
from transom.training.text import read_sequences
from transom.zoo.architectures import with_windows
from transom.zoo.model import Model


def learn_windows(
    model: Model,
    settings: WindowSettings,
    *,
    text: Path,
    out: Path,
    length: int,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    on_step: OnStep = lambda done, total, metrics: None,
) -> tuple[tuple[int | None, ...], list[Metrics]]:
    """Learn windows and weights, and write a checkpoint that has them.

    Args:
        model: Where it begins, of a family whose layers may have windows of their own.
        settings: How.
        text: To learn on.
        out: Folder of the checkpoint; it appears only when it is whole.
        length: Tokens of a sequence; a window that is longer cannot be told from a global layer.
        dtype: Of the weights that are written.
        overwrite: Whether to replace a folder that an earlier run wrote.
        on_step: Told of every step.

    Returns:
        Every layer's window, None for a global one; and the metrics of every step.

    Raises:
        ConfigError: If the family's layers cannot have windows of their own.
        TrainingError: If the device is missing, a saved state is of another run, or training diverges.
        TokenizerError: If the text cannot be read or is too short.
        ArtifactError: If `out` exists or cannot be written.
    """
    model = model.text()
    # What cannot be written is not trained.
    with_windows(model.config, (None,) * model.config.num_layers)
    check_apart(out, model)
    with new_folder(out, overwrite=overwrite, kind=TRAINED) as folder:
        sequences = read_sequences(model, text, length)
        state = TrainingState(out, settings, model.revision, digest(sequences))
        saved = state.load()
        objective = LearnWindows(model, settings, sequences)
        metrics = Loop(objective, settings.loop, state=state, saved=saved, on_step=on_step).run()
        assert objective.windows is not None
        windows = tuple(window or None for window in objective.windows)
        learned = {name: Weight.of(tensor.cpu(), "training") for name, tensor in objective.learned.items()}
        config = with_windows(model.config, windows)
        report = {"settings": dataclasses.asdict(settings), "source": model.source, "windows": windows}
        trained = dataclasses.replace(model, config=config, weights={**model.weights, **learned}, quant="none")
        write_trained(folder, trained, report, dtype=dtype)
        state.finish(folder)
    state.remove()
    return windows, list(metrics)
