"""The window of every layer, learned: a loss of the next token chooses among windows, under a budget of cache slots.

Every layer has the longest window first, so that the model learns what that is good for before any is given up. From
`gates_from` on its attention is a mixture of all windows on offer (`passes.gate_windows`), whose shares the loss moves,
and a price on slots above the budget, which grows: what helps least goes first. At `harden_at` each layer gets one
window: those of the highest likelihood among all choices within the budget. The weights learn on with these.

Axes: L layers, G windows, B sequences, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from transom.errors import TrainingError
from transom.passes.base import Pipeline
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention
from transom.passes.gate_windows import GATES, GateWindows
from transom.passes.share_embedding import ShareEmbedding
from transom.training.device import device_of
from transom.training.divergence import Head
from transom.training.loop import LoopSettings, Loss, Objective
from transom.training.policy import token_log_probs
from transom.training.stages import Stages
from transom.training.text import index_at
from transom.zoo.architectures import build_empty
from transom.zoo.model import Model

_CHOSEN = 1e4
"""Gate of a chosen window, where all others are 0: its share is 1 to the bit."""

_FIRST = 3.0
"""Gate of the longest window where gates begin to learn, and all others are 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """How to learn windows.

    Attributes:
        windows: On offer, in keys, in rising order; 0, for every earlier key, comes last.
        budget: Share of the slots of a model whose layers are all global that caches may have.
        context: Slots that a global layer has, in tokens: what the model is to be used at.
        price: Of expected slots above the budget, in nats for all slots of such a model; it grows from 0 to this.
        gate_rate: Learning rate of gates, which does not fall.
        gates_from: Share of the steps before gates learn.
        harden_at: Share of the steps after which windows are fixed.
        steps: Of the optimiser.
        batch: Sequences in a step.
        parts: In how many parts they go through the model; it divides `batch`.
        learning_rate: Of weights, at its peak.
        seed: Of the order of the text.
        device: Where to compute.
        save_every: Steps between two saved states.

    Raises:
        TrainingError: If a number is out of range, or no choice of windows is within the budget.
    """

    windows: tuple[int, ...]
    budget: float
    context: int
    price: float = 3.0
    gate_rate: float = 0.02
    gates_from: float = 0.3
    harden_at: float = 0.6
    steps: int = 1000
    batch: int = 16
    parts: int = 1
    learning_rate: float = 1e-4
    seed: int = 0
    device: str = "cpu"
    save_every: int = 50

    def __post_init__(self) -> None:
        slots = self.slots
        if len(slots) < 2 or list(slots) != sorted(set(slots)) or slots[0] < 1:
            raise TrainingError(
                f"windows {', '.join(map(str, self.windows))} of a context of {self.context:,}: give at least two, in "
                "rising order, all shorter than the context but 0, which stands for all keys and comes last"
            )
        if not slots[0] / self.context <= self.budget <= 1:
            raise TrainingError(
                f"a budget of {self.budget:g} is not between {slots[0] / self.context:g}, where every layer has the "
                "shortest window, and 1, where all are global"
            )
        if not 0 <= self.gates_from < self.harden_at < 1 or self.batch % self.parts:
            raise TrainingError(
                f"gates_from {self.gates_from:g} and harden_at {self.harden_at:g} must be rising shares of the steps, "
                f"and {self.parts} parts divide a batch of {self.batch}"
            )

    @property
    def slots(self) -> tuple[int, ...]:
        """Of a cache, by window."""
        return tuple(window or self.context for window in self.windows)

    @property
    def gate_steps(self) -> range:
        """In which gates learn."""
        return range(round(self.gates_from * self.steps), round(self.harden_at * self.steps))

    @property
    def loop(self) -> LoopSettings:
        """How the optimiser steps."""
        return LoopSettings(
            steps=self.steps, learning_rate=self.learning_rate, save_every=self.save_every, clip=1.0, epsilon=1e-8
        )


class LearnWindows(Objective):
    """A model, its gates, and a text.

    Args:
        model: Where to begin.
        settings: How.
        sequences_NT: The text, int64, longer than the windows, or nothing can be learned of them.
        windows: Of every layer, to learn weights alone; None to learn windows too.
    """

    def __init__(
        self,
        model: Model,
        settings: WindowSettings,
        sequences_NT: torch.Tensor,
        windows: Sequence[int] | None = None,
    ) -> None:
        self.settings, self.parts = settings, settings.parts
        self._model, self._sequences, device = model.text(), sequences_NT, device_of(settings.device)
        passes = [Canonicalize(), ShareEmbedding(), FuseAttention(), GateWindows(settings.windows)]
        graph, _ = Pipeline(passes).run(self._model.trace(task="score"))
        self._stages = Stages(graph, device=device)
        self._weights = {name: weight.read().float().clone().to(device) for name, weight in graph.weights.items()}
        self._gates = [name for name in self._weights if name.endswith(GATES)]
        self._decoder = build_empty(self._model.config)
        self.parameters = {name: tensor.requires_grad_(True) for name, tensor in self._weights.items()}
        self.windows: tuple[int, ...] | None = None if windows is None else tuple(windows)

    @property
    def learned(self) -> Mapping[str, torch.Tensor]:
        """The model's own weights as they are now."""
        return {name: tensor.detach() for name, tensor in self._weights.items() if name not in self._gates}

    def losses(self, step: int) -> Iterator[Loss]:
        """Mean -log p of the next token, in nats, and the price of slots above the budget."""
        settings = self.settings
        if self.windows is None and step >= settings.gate_steps.stop:
            gates_LG = torch.stack(list(self._gates_at(step).values())).detach().cpu()
            self.windows = harden(gates_LG.log_softmax(-1), settings.windows, settings.slots, settings.budget)
        size = settings.batch // settings.parts
        for first in range(step * settings.batch, (step + 1) * settings.batch, size):
            places = range(first, first + size)
            tokens_BT = self._sequences[[index_at(p, len(self._sequences), settings.seed) for p in places]]
            hidden_ND, next_N = self.hidden(tokens_BT, step)[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()
            loss = -token_log_probs(hidden_ND, self.head, next_N.to(hidden_ND.device)).mean()
            above, expected = self._above_budget(step)
            yield Loss(
                value=loss + self._price(step) * above, metrics={"nats": float(loss.detach()), "slots": expected}
            )

    @property
    def head(self) -> Head:
        """How hidden states become logits."""
        return Head(table=self._weights[self._decoder.head_weight], softcap=self._decoder.softcap)

    def hidden(self, tokens_BT: torch.Tensor, step: int = 0) -> torch.Tensor:
        """What the head reads, [B, T, D], with the gates of a step, or with the windows once they are fixed."""
        return self._stages.hidden(tokens_BT.to(self._stages.device), {**self._weights, **self._gates_at(step)})

    def _gates_at(self, step: int) -> dict[str, torch.Tensor]:
        """What stands for the gates: one window of a layer is certain, but while gates learn."""
        windows = self.settings.windows
        if self.windows is None and step >= self.settings.gate_steps.start:
            first_G = torch.tensor([0.0] * (len(windows) - 1) + [_FIRST], device=self._stages.device)
            return {name: self._weights[name] + first_G for name in self._gates}
        certain = (windows[-1],) * len(self._gates) if self.windows is None else self.windows
        gates_LG = _CHOSEN * torch.nn.functional.one_hot(
            torch.tensor([windows.index(w) for w in certain]), len(windows)
        )
        # The optimiser wants a gradient of every parameter.
        return {
            name: 0 * self._weights[name] + gates_G.to(self._stages.device)
            for name, gates_G in zip(self._gates, gates_LG, strict=True)
        }

    def _price(self, step: int) -> float:
        steps = self.settings.gate_steps
        return self.settings.price * (step - steps.start + 1) / len(steps) if step in steps else 0.0

    def _above_budget(self, step: int) -> tuple[torch.Tensor, float]:
        """Expected slots above the budget, with a gradient, and all expected slots: shares of an all-global model's."""
        shares_LG = torch.stack(list(self._gates_at(step).values())).softmax(-1)
        expected = (shares_LG @ torch.tensor(self.settings.slots, dtype=torch.float32)).mean() / self.settings.context
        return (expected - self.settings.budget).clamp_min(0), float(expected.detach())

    def rate(self, name: str, peak: float) -> float:
        """Gates have a rate of their own."""
        return self.settings.gate_rate if name in self._gates else peak

    def state(self) -> dict[str, Any]:
        """The windows, once they are fixed."""
        return {"windows": None if self.windows is None else list(self.windows)}

    def resume(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        self.windows = None if state["windows"] is None else tuple(state["windows"])


def harden(log_shares_LG: torch.Tensor, windows: Sequence[int], slots: Sequence[int], budget: float) -> tuple[int, ...]:
    """The likeliest window of every layer, of all choices whose slots are within the budget.

    Args:
        log_shares_LG: Log of the shares of windows.
        windows: Of each share; 0 for every earlier key.
        slots: Of a cache, by window; the last are the most.
        budget: Share of the slots of a model whose layers all have the most.
    """
    # A knapsack, solved exactly: slots taken -> the best log share that takes so many, and its choices.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    allowed = budget * slots[-1] * len(log_shares_LG) * (1 + 1e-9)
    for row in log_shares_LG.tolist():
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for taken, (total, choices) in best.items():
            for window, size, log_share in zip(windows, slots, row, strict=True):
                candidate = (total + log_share, (*choices, window))
                if taken + size <= allowed and candidate > following.get(taken + size, (float("-inf"), ())):
                    following[taken + size] = candidate
        best = following
    return max(best.values())[1]
