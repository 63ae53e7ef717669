"""Quantisation-aware training: a checkpoint learns to be its own quantised self.

What is written in the end are the codes that were trained, so nothing is rounded again on deployment.

A run can be stopped at any step and goes on where it was last saved.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from transom.backends.folder import new_folder
from transom.compiler import compile_model
from transom.errors import QuantizationError
from transom.export.options import Options
from transom.formats.schemes import scheme
from transom.training.checkpoint import CHECKPOINT, REPORT, check_apart
from transom.training.loop import Loop, OnStep
from transom.training.objectives.qat import Qat, QatSettings
from transom.training.quantize import write_converted
from transom.training.state import TrainingState, digest
from transom.training.text import read_sequences
from transom.zoo.model import Model, load


def train(
    model: Model,
    settings: QatSettings,
    *,
    text: Path,
    out: Path,
    target: str | None = "onnxruntime",
    overwrite: bool = False,
    on_step: OnStep = lambda done, total, metrics: None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[float]:
    """Train, and write the checkpoint and an artifact of it.

    Args:
        model: The checkpoint that is not quantised: the teacher, and where the student begins.
        settings: How to train.
        text: Text to train on.
        out: Folder of the checkpoint (Hugging Face layout and `codes.safetensors`); the artifact is in it, under its
            target's name. It appears only when it is whole; until then the state of the run stands beside it.
        target: What to compile the result for; None for no artifact.
        overwrite: Whether to replace a folder that an earlier run wrote.
        on_step: Told of every step.
        on_progress: Told of what comes before and after: (stage, done, total).

    Returns:
        Mean KL(teacher || student) of every step, in nats.

    Raises:
        QuantizationError: If the scheme is unknown, or quantises no projection.
        TokenizerError: If the text cannot be read or is too short.
        TrainingError: If the device is missing, a saved state is of another run, or training diverges.
        ArtifactError: If `out` exists or cannot be written.
    """
    quant_scheme = scheme(settings.quant)
    if not quant_scheme.linears:
        raise QuantizationError(f"the scheme {settings.quant!r} quantises no projection, so there is nothing to train")
    check_apart(out, model)
    with new_folder(out, overwrite=overwrite, kind=CHECKPOINT) as folder:
        sequences = read_sequences(model, text, settings.length)
        state = TrainingState(out, settings, model.revision, digest(sequences))
        saved = state.load()
        run = Qat(model, quant_scheme, settings, sequences, on_progress, begun=saved is not None)
        loop = Loop(run, settings.loop, state=state, saved=saved, on_step=on_step)
        losses = [metrics["loss"] for metrics in loop.run()]
        graph = run.result()
        weights = {name: graph.weights.get(name, weight) for name, weight in model.weights.items()}
        trained = dataclasses.replace(model, weights=weights)
        write_converted(graph, trained, folder, quant=settings.quant, on_progress=on_progress)
        report = {"settings": dataclasses.asdict(settings), "kl": losses, "source": model.source}
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        state.finish(folder)
        if target is not None:
            # The folder has another name while it is written, and holds no more than the language model.
            again = dataclasses.replace(
                load(folder), source=str(out), config=model.config, tokenizer=model.tokenizer, left_out=model.left_out
            )
            compile_model(again, Options.of(again, target=target), out=folder / target, on_progress=on_progress)
    state.remove()
    return losses
