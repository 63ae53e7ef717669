"""Quantisation-aware training: a checkpoint learns to be its own quantised self.

The recipe of the Gemma 3 report (section 2.3): the targets are the probabilities of the checkpoint that is not
quantised. Weights are kept in float32 and rounded on the way (`passes.fake_quantize`); what is written in the end are
the codes that were trained, so nothing is rounded again on deployment.

A run can be stopped at any step and goes on where it was last saved.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from transom.backends.artifact import new_folder
from transom.export.compile import compile_model
from transom.graphs.errors import QuantizationError, TrainingError
from transom.graphs.graph import Graph
from transom.graphs.rounding import Grid, encode
from transom.graphs.schemes import TABLE, QuantSpec, Scheme, scheme
from transom.graphs.weight import Weight
from transom.passes.base import Pipeline
from transom.passes.convert_quantized import meant_numbers
from transom.passes.fake_quantize import FakeQuantize
from transom.training.calibrate import calibrate
from transom.training.checkpoint import with_codes
from transom.training.distill import Full, Head, Sampled, Targets, distillation_loss
from transom.training.quantize import score_graph, write_converted
from transom.training.stages import Stages
from transom.training.state import TrainingState
from transom.training.text import read_sequences
from transom.zoo.checkpoints.lattice import LATTICE
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
    learning_rate: float = 1e-5
    scale_rate: float = 1e-3
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
        out: Folder of the checkpoint (Hugging Face layout and `lattice.safetensors`); the artifact is in it, under its
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
    made = scheme(settings.quant)
    if not made.linears:
        raise QuantizationError(f"the scheme {settings.quant!r} quantises no projection, so there is nothing to train")
    with new_folder(out, overwrite=overwrite, proof=LATTICE) as folder:
        sequences = read_sequences(model, text, settings.length)
        run = _Run(model, made, settings, sequences, on_progress)
        state = TrainingState(out, settings, model.revision, sequences)
        losses = run.resume(state)
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
        (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")
        if target is not None:
            again = dataclasses.replace(load(folder), source=str(out), tokenizer=model.tokenizer)
            compile_model(again, target=target, out=folder / target, on_progress=on_progress)
    state.remove()
    return losses


class _Run:
    """The student and the teacher while they are trained."""

    def __init__(
        self,
        model: Model,
        made: Scheme,
        settings: QatSettings,
        sequences_NT: torch.Tensor,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self.settings, self.device = settings, _device(settings.device)
        self._sequences = sequences_NT
        self._generator = torch.Generator().manual_seed(settings.seed)
        traced = score_graph(model)
        self._traced = traced
        # The table is a third or more of a small model and is only rounded to 8 bits: it is not worth its gradients.
        fake = FakeQuantize(dataclasses.replace(made, table=None), "mse")
        self._graph, _ = Pipeline([fake]).run(traced)
        self.specs: dict[str, QuantSpec] = fake.specs
        table = next(name for name in traced.weights if TABLE in name)
        self._table = table
        raw = {name: weight.read().float() for name, weight in traced.weights.items()}
        frozen = {table: meant_numbers(table, traced.weights[table], made)}
        self._teacher = {name: tensor.to(self.device) for name, tensor in raw.items()}
        self._teacher_stages = Stages(traced, device=self.device)
        self._student_stages = Stages(self._graph, device=self.device)
        cap = model.config.logit_softcap
        narrow = getattr(torch, settings.head_dtype)
        self._teacher_head = Head(table=self._teacher[table].to(narrow), softcap=cap)
        student = {name: raw[name].clone() for name in raw if name != table}
        student |= self._grids(raw, on_progress)
        for name, spec in self.specs.items():
            if settings.start != "gptq":
                student[name] = dithered(student[name], student[f"{name}.divisors"], spec, self._generator)
        self._student = {name: tensor.to(self.device) for name, tensor in (student | frozen).items()}
        self._student_head = Head(table=self._student[table].to(narrow), softcap=cap)
        self._trained = {
            name: tensor.requires_grad_(True)
            for name, tensor in self._student.items()
            if name != table and tensor.is_floating_point() and not name.endswith(".zero_points")
        }
        self._optimizer = torch.optim.Adam(
            [{"params": [tensor], "name": name} for name, tensor in self._trained.items()], betas=(0.9, 0.95), eps=1e-12
        )

    def _grids(self, raw: dict[str, torch.Tensor], on_progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Scales to begin with; with "gptq" also weights, moved into the cells of the codes that were found."""
        found = {}
        for name in self.specs:
            for part in (f"{name}.divisors", f"{name}.zero_points"):
                if part in self._graph.weights:
                    found[part] = self._graph.weights[part].read()
        if self.settings.start != "gptq":
            return found
        count = min(len(self._sequences), max(1, 8192 // self.settings.length))
        # Not those that training begins with: what they lose would tell nothing.
        order = self._order(0)[-count:]
        rounded, _ = calibrate(
            self._traced,
            {name: spec for name, spec in self.specs.items() if spec.block != "tensor"},
            self._sequences[order],
            on_progress=lambda done, total: on_progress("calibrate", done, total),
        )
        for name, weight in rounded.items():
            lattice = weight.lattice
            assert lattice is not None
            _, scales, zeros = lattice.read_rows(0, weight.shape[0])
            repeats = scales.shape[1] // found[f"{name}.divisors"].shape[1]
            found[f"{name}.divisors"] = scales[:, ::repeats].contiguous()
            if zeros is not None:
                found[f"{name}.zero_points"] = zeros[:, ::repeats].float().contiguous()
            found[name] = into_cells(raw[name], weight.read(), found[f"{name}.divisors"])
        return found

    def step(self, index: int) -> float:
        """One step of the optimiser; returns the mean KL."""
        settings = self.settings
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(group["name"], index)
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for tokens_T in self._batch(index):
            tokens_BT = tokens_T[None].to(self.device)
            with torch.no_grad():
                taught = self._teacher_stages.hidden(tokens_BT, self._teacher).flatten(0, 1)
                targets = self._targets(taught)
            hidden = self._student_stages.hidden(tokens_BT, self._student, recompute=settings.recompute)
            loss = distillation_loss(hidden.flatten(0, 1), self._student_head, targets)
            (loss / settings.batch).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise TrainingError(f"the loss of step {index + 1} is {total}: try a smaller learning rate")
        self._optimizer.step()
        if self.device.type == "xla":
            importlib.import_module("torch_xla").sync()
        return total / settings.batch

    def _targets(self, taught: torch.Tensor) -> Targets:
        if self.settings.samples is None:
            return Full(hidden=taught, head=self._teacher_head)
        # A generator belongs to a device, and ours draws the dither too.
        generator = self._generator if self.device.type == "cpu" else None
        return Sampled.draw(taught, self._teacher_head, self.settings.samples, generator)

    def _rate(self, name: str, index: int) -> float:
        settings = self.settings
        warm = max(1, settings.steps // 30)
        progress = max(0.0, (index - warm) / max(1, settings.steps - warm))
        shape = min(1.0, (index + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * progress))
        if name.endswith(".divisors"):
            return shape * settings.scale_rate * float(self._student[name].detach().abs().mean())
        return shape * settings.learning_rate

    def _batch(self, index: int) -> Iterator[torch.Tensor]:
        """Every sequence once before any comes again, in an order that the seed alone decides."""
        count = len(self._sequences)
        for place in range(index * self.settings.batch, (index + 1) * self.settings.batch):
            epoch, offset = divmod(place, count)
            yield self._sequences[self._order(epoch)[offset]]

    def _order(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        return torch.randperm(len(self._sequences), generator=generator)

    def state(self) -> dict[str, Any]:
        """All that a later step depends on."""
        return {
            "weights": {name: tensor.detach() for name, tensor in self._trained.items()},
            "zero_points": {n: t for n, t in self._student.items() if n.endswith(".zero_points")},
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def resume(self, state: TrainingState) -> list[float]:
        """Take up a saved state, if there is one; returns the losses so far."""
        found = state.load()
        if found is None:
            return []
        with torch.no_grad():
            for name, tensor in {**found["weights"], **found["zero_points"]}.items():
                self._student[name].copy_(tensor)
        self._optimizer.load_state_dict(found["optimizer"])
        self._generator.set_state(found["generator"])
        losses: list[float] = found["losses"]
        return losses

    def result(self) -> Graph:
        """The traced graph with the trained weights; those that were rounded carry their codes."""
        graph = self._traced.clone()
        for name, weight in graph.weights.items():
            if name == self._table:
                continue
            tensor = self._student[name].detach().cpu()
            spec = self.specs.get(name)
            if spec is None:
                graph.weights[name] = Weight.of(tensor, weight.origin)
                continue
            zeros = self._student.get(f"{name}.zero_points")
            divisors = self._student[f"{name}.divisors"].detach().cpu()
            grid = Grid(divisors=divisors, zero_points=None if zeros is None else zeros.cpu())
            found = encode(tensor.view(*divisors.shape, -1), grid, spec)
            graph.weights[name] = with_codes(Weight.of(tensor, weight.origin), spec, found)
        return graph


def into_cells(weight_RK: torch.Tensor, meant_RK: torch.Tensor, divisors_RG: torch.Tensor) -> torch.Tensor:
    """Move every number as little as possible, so that it rounds to what it should mean.

    A little inside the border of the cell: there it may still turn to either side, which is what training is for.
    """
    half_RK = 0.49 * _by_column(divisors_RG.abs(), weight_RK)
    return torch.maximum(torch.minimum(weight_RK, meant_RK + half_RK), meant_RK - half_RK)


def _by_column(x_RG: torch.Tensor, weight_RK: torch.Tensor) -> torch.Tensor:
    return x_RG.repeat_interleave(weight_RK.shape[1] // x_RG.shape[1], 1)


def dithered(
    weight_RK: torch.Tensor, divisors_RG: torch.Tensor, spec: QuantSpec, generator: torch.Generator
) -> torch.Tensor:
    """Noise for weights that were quantised before: many then stand just between two codes, and all turn at once.

    On the 270M's GGUF half of the numbers of Q5_0 tensors are ties of Q4_0, and the first step of Adam explodes
    without noise. A sixteenth of a step of the grid to either side is no loss.
    """
    if not spec.is_integer:
        return weight_RK
    noise_RK = torch.rand(weight_RK.shape, generator=generator) - 0.5
    return weight_RK + 0.125 * noise_RK * _by_column(divisors_RG.abs(), weight_RK)


def _device(name: str) -> torch.device:
    try:
        if name == "xla":
            found: torch.device = importlib.import_module("torch_xla").device()
            return found
        device = torch.device(name)
        torch.zeros(1, device=device)
    except ImportError as error:
        raise TrainingError(f"the device 'xla' needs torch-xla ({error}): pip install 'transom[torch-xla]'") from None
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"no device {name!r} here ({reason}): use --device cpu") from error
    return device
