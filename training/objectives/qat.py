"""Quantisation-aware training as an objective: a student whose weights are rounded learns from what it was before.

The recipe of the Gemma 3 report (section 2.3): the targets are the probabilities of the checkpoint that is not
quantised. Weights are kept in float32 and rounded on the way (`passes.fake_quantize`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

from transom.formats.rounding import Grid, encode
from transom.formats.schemes import QuantSpec, Scheme, is_table
from transom.graphs.graph import Graph
from transom.graphs.weight import Weight
from transom.passes.base import Pipeline, rewrites
from transom.passes.convert_quantized import dequantized
from transom.passes.fake_quantize import FakeQuantize, FakeQuantized
from transom.training.calibrate import calibrate
from transom.training.checkpoint import with_codes
from transom.training.device import device_of
from transom.training.divergence import Full, Head, Sparse, Targets, distillation_loss
from transom.training.latent import dithered, into_cells
from transom.training.loop import LoopSettings, Loss, Objective
from transom.training.quantize import score_graph
from transom.training.stages import Stages
from transom.training.text import index_at, order
from transom.zoo.architectures import build_empty
from transom.zoo.model import Model

CALIBRATION_TOKENS = 8192
"""Of the text, that calibration reads before training begins."""

PART_TOKENS = 512
"""That go through the model together, where sequences are short enough: weights are rounded once for all of them."""


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

    @property
    def loop(self) -> LoopSettings:
        """How the optimiser steps."""
        return LoopSettings(steps=self.steps, learning_rate=self.learning_rate, save_every=self.save_every)

    @property
    def rows(self) -> int:
        """Sequences that go through the model together; all parts of a step have as many."""
        most = max(1, PART_TOKENS // self.length)
        return max(rows for rows in range(1, min(most, self.batch) + 1) if self.batch % rows == 0)


class Qat(Objective):
    """The student and its teacher.

    Args:
        model: The teacher, and where the student begins.
        scheme: The settings' scheme.
        settings: How to train.
        sequences_NT: The text, int64.
        on_progress: Told of calibration: (stage, done, total).
        begun: Whether a saved state will be taken up, so that grids need no calibration.
    """

    def __init__(
        self,
        model: Model,
        scheme: Scheme,
        settings: QatSettings,
        sequences_NT: torch.Tensor,
        on_progress: Callable[[str, int, int], None],
        *,
        begun: bool,
    ) -> None:
        self.settings, self.device = settings, device_of(settings.device)
        self.parts = settings.batch // settings.rows
        self._sequences = sequences_NT
        self._generator = torch.Generator().manual_seed(settings.seed)
        traced = score_graph(model)
        self._traced = traced
        # The table is a third or more of a small model and is only rounded to 8 bits: it is not worth its gradients.
        fake = FakeQuantize(dataclasses.replace(scheme, table=None), "mse")
        self._graph, records = Pipeline([fake]).run(traced)
        (fake_quantized,) = rewrites(records, FakeQuantized)
        self.specs: Mapping[str, QuantSpec] = fake_quantized.specs
        decoder = build_empty(model.config)
        self._head, self._tables = decoder.head_weight, [name for name in traced.weights if is_table(name)]
        raw = {name: weight.read().float() for name, weight in traced.weights.items()}
        frozen = {name: dequantized(name, traced.weights[name], scheme) for name in self._tables}
        self._teacher = {name: tensor.to(self.device) for name, tensor in raw.items()}
        self._teacher_stages = Stages(traced, device=self.device)
        self._student_stages = Stages(self._graph, device=self.device)
        narrow = getattr(torch, settings.head_dtype)
        self._teacher_head = Head(table=self._teacher[self._head].to(narrow), softcap=decoder.softcap)
        student = {name: raw[name].clone() for name in raw if name not in frozen}
        student |= self._grids(raw, on_progress, calibrated=settings.start == "gptq" and not begun)
        for name, spec in self.specs.items():
            if settings.start != "gptq":
                student[name] = dithered(student[name], student[f"{name}.divisors"], spec, self._generator)
        self._student = {name: tensor.to(self.device) for name, tensor in (student | frozen).items()}
        self._student_head = Head(table=self._student[self._head].to(narrow), softcap=decoder.softcap)
        self.parameters = {
            name: tensor.requires_grad_(True)
            for name, tensor in self._student.items()
            if name not in frozen and tensor.is_floating_point() and not name.endswith(".zero_points")
        }

    def _grids(
        self, raw: dict[str, torch.Tensor], on_progress: Callable[[str, int, int], None], *, calibrated: bool
    ) -> dict[str, Any]:
        """Initial scales and, if calibrated, weights that are moved into the cells of their codes."""
        parameters = {}
        for name in self.specs:
            for part in (f"{name}.divisors", f"{name}.zero_points"):
                if part in self._graph.weights:
                    parameters[part] = self._graph.weights[part].read()
        if not calibrated:
            return parameters
        count = min(len(self._sequences), max(1, CALIBRATION_TOKENS // self.settings.length))
        # Not those that training begins with: what they lose would tell nothing.
        chosen = order(len(self._sequences), self.settings.seed)[-count:]
        rounded, _ = calibrate(
            self._traced,
            {name: spec for name, spec in self.specs.items() if spec.block != "tensor"},
            self._sequences[chosen],
            on_progress=lambda done, total: on_progress("calibrate", done, total),
        )
        for name, weight in rounded.items():
            assert weight.encoded is not None
            _, scales, zeros = weight.encoded.read_rows(0, weight.shape[0])
            repeats = scales.shape[1] // parameters[f"{name}.divisors"].shape[1]
            parameters[f"{name}.divisors"] = scales[:, ::repeats].contiguous()
            if zeros is not None:
                parameters[f"{name}.zero_points"] = zeros[:, ::repeats].float().contiguous()
            parameters[name] = into_cells(raw[name], weight.read(), parameters[f"{name}.divisors"])
        return parameters

    def losses(self, step: int) -> Iterator[Loss]:
        """Mean KL(teacher || student) of each part of a step, in nats."""
        settings, count = self.settings, len(self._sequences)
        for first in range(step * settings.batch, (step + 1) * settings.batch, settings.rows):
            places = range(first, first + settings.rows)
            tokens_BT = self._sequences[[index_at(place, count, settings.seed) for place in places]].to(self.device)
            with torch.no_grad():
                taught = self._teacher_stages.hidden(tokens_BT, self._teacher).flatten(0, 1)
                targets = self._targets(taught)
            hidden = self._student_stages.hidden(tokens_BT, self._student, recompute=settings.recompute)
            yield Loss(value=distillation_loss(hidden.flatten(0, 1), self._student_head, targets))

    def _targets(self, taught: torch.Tensor) -> Targets:
        if self.settings.samples is None:
            return Full(hidden=taught, head=self._teacher_head)
        # A generator belongs to a device, and ours draws the dither too.
        generator = self._generator if self.device.type == "cpu" else None
        return Sparse.draw(taught, self._teacher_head, self.settings.samples, generator)

    def rate(self, name: str, peak: float) -> float:
        """Scales have a rate of their own, a share of their size."""
        if not name.endswith(".divisors"):
            return peak
        return self.settings.scale_rate * float(self._student[name].detach().abs().mean())

    def state(self) -> dict[str, Any]:
        """Zero points, which are not trained, and the generator of draws."""
        return {
            "zero_points": {n: t for n, t in self._student.items() if n.endswith(".zero_points")},
            "generator": self._generator.get_state(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        for name, tensor in state["zero_points"].items():
            self._student[name].copy_(tensor)
        self._generator.set_state(state["generator"])

    def result(self) -> Graph:
        """The traced graph with the trained weights; those that were rounded carry their codes."""
        graph = self._traced.clone()
        for name, weight in graph.weights.items():
            if name in self._tables:
                continue
            tensor = self._student[name].detach().cpu()
            spec = self.specs.get(name)
            if spec is None:
                graph.weights[name] = Weight.of(tensor, weight.origin)
                continue
            zeros = self._student.get(f"{name}.zero_points")
            divisors = self._student[f"{name}.divisors"].detach().cpu()
            grid = Grid(divisors=divisors, zero_points=None if zeros is None else zeros.cpu())
            rounded = encode(tensor.view(*divisors.shape, -1), grid, spec)
            graph.weights[name] = with_codes(Weight.of(tensor, weight.origin), spec, rounded)
        return graph
