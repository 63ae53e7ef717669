"""One run of quantisation-aware training: the student, its teacher and the optimiser, step by step."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from transom.errors import TrainingError
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
from transom.training.distill import Full, Head, Sampled, Targets, distillation_loss
from transom.training.latent import dithered, into_cells
from transom.training.quantize import score_graph
from transom.training.stages import Stages
from transom.zoo.architectures import build_empty
from transom.zoo.model import Model

if TYPE_CHECKING:
    from transom.training.qat import QatSettings

CALIBRATION_TOKENS = 8192
"""Of the text, that calibration reads before training begins."""


class QatRun:
    """The student and its teacher, from one step to the next."""

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
        # A saved state replaces the grids, so they need no calibration then.
        student |= self._grids(raw, on_progress, calibrated=settings.start == "gptq" and not begun)
        for name, spec in self.specs.items():
            if settings.start != "gptq":
                student[name] = dithered(student[name], student[f"{name}.divisors"], spec, self._generator)
        self._student = {name: tensor.to(self.device) for name, tensor in (student | frozen).items()}
        self._student_head = Head(table=self._student[self._head].to(narrow), softcap=decoder.softcap)
        self._trained = {
            name: tensor.requires_grad_(True)
            for name, tensor in self._student.items()
            if name not in frozen and tensor.is_floating_point() and not name.endswith(".zero_points")
        }
        self._optimizer = torch.optim.Adam(
            [{"params": [tensor], "name": name} for name, tensor in self._trained.items()], betas=(0.9, 0.95), eps=1e-12
        )

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
        order = self._order(0)[-count:]
        rounded, _ = calibrate(
            self._traced,
            {name: spec for name, spec in self.specs.items() if spec.block != "tensor"},
            self._sequences[order],
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

    def resume(self, saved: dict[str, Any]) -> list[float]:
        """Take up a saved state; returns the losses so far."""
        with torch.no_grad():
            for name, tensor in {**saved["weights"], **saved["zero_points"]}.items():
                self._student[name].copy_(tensor)
        self._optimizer.load_state_dict(saved["optimizer"])
        self._generator.set_state(saved["generator"])
        losses: list[float] = saved["losses"]
        return losses

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
