"""Quantisation-aware training: a checkpoint learns to be its own quantised self.

The recipe of the Gemma 3 report (section 2.3): the targets are the probabilities of the checkpoint that is not
quantised. Weights are kept in float32 and rounded on the way (`passes.fake_quantize`); what is written in the end are
the codes that were trained, so nothing is rounded again on deployment.

A run can be stopped at any step and goes on where it was last saved.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from transom.backends.folder import new_folder
from transom.compiler import compile_model
from transom.errors import QuantizationError
from transom.export.options import Options
from transom.formats.schemes import scheme
from transom.training.checkpoint import CHECKPOINT, REPORT, check_apart
from transom.training.qat_run import QatRun
from transom.training.quantize import write_converted
from transom.training.state import TrainingState
from transom.training.text import read_sequences
from transom.zoo.model import Model, load

OnStep = Callable[[int, int, float], None]
"""Called after every step with (steps done, steps in all, mean KL of the step in nats)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatSettings:
    """How to train.

    Attributes:
        quant: Name of a scheme. Its table is rounded once and stays; projections and norms are trained.
        steps: Of the optimiser; the report has about 5,000.
        length: Tokens of a sequence.
        batch: Sequences in a step.
        learning_rate: Of weights, at its peak: it warms up for a thirtieth of the steps and falls to a tenth (cosine).
        scale_rate: Of scales, as a share of each scale's own size.
        start: "nearest", or "gptq": begin with the codes that calibration on the same text finds.
        samples: Draws from the teacher's distribution that stand for it, as the report samples 256; None takes all.
        head_dtype: What the products with the table are computed in: "float32" or "bfloat16".
        recompute: Compute every layer again on the way back, for less memory.
        seed: Of the order of the text, of draws and of dither.
        device: Where to compute: "cpu", "cuda", "xla" and so on.
        save_every: Steps between two saved states.
    """

    quant: str
    steps: int = 5000
    length: int = 256
    batch: int = 1
    learning_rate: float = 5e-6
    scale_rate: float = 1e-4
    start: Literal["nearest", "gptq"] = "gptq"
    samples: int | None = None
    head_dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    seed: int = 0
    device: str = "cpu"
    save_every: int = 50


def train(
    model: Model,
    settings: QatSettings,
    *,
    text: Path,
    out: Path,
    target: str | None = "onnxruntime",
    overwrite: bool = False,
    on_step: OnStep = lambda done, total, kl: None,
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
        state = TrainingState(out, settings, model.revision, sequences)
        saved = state.load()
        run = QatRun(model, quant_scheme, settings, sequences, on_progress, begun=saved is not None)
        losses = [] if saved is None else run.resume(saved)
        for index in range(len(losses), settings.steps):
            losses.append(run.step(index))
            on_step(index + 1, settings.steps, losses[-1])
            if (index + 1) % settings.save_every == 0 and index + 1 < settings.steps:
                state.save({**run.state(), "losses": losses})
        graph = run.result()
        weights = {name: graph.weights.get(name, weight) for name, weight in model.weights.items()}
        trained = dataclasses.replace(model, weights=weights)
        write_converted(graph, trained, folder, quant=settings.quant, on_progress=on_progress)
        report = {"settings": dataclasses.asdict(settings), "kl": losses, "source": model.source}
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        if target is not None:
            # The folder has another name while it is written, and holds no more than the language model.
            again = dataclasses.replace(
                load(folder), source=str(out), config=model.config, tokenizer=model.tokenizer, left_out=model.left_out
            )
            compile_model(again, Options.of(again, target=target), out=folder / target, on_progress=on_progress)
    state.remove()
    return losses
