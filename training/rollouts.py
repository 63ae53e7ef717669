"""What continues sequences for a policy, by the policy's own weights: PyTorch's module, or ONNX Runtime.

ONNX Runtime reads the very memory that an optimiser changes, so its weights are never old, and nothing is exported
again. What passes compute of weights, such as the 1 + w of a norm, is computed again whenever sequences begin.

Axes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.batch import Batch, once
from transom.errors import InvariantError, TrainingError, TransomError
from transom.export.options import CHUNK
from transom.graphs.graph import Graph
from transom.graphs.state import State
from transom.graphs.weight import Weight
from transom.passes.pipelines import live_pipeline
from transom.zoo.layers import Decoder
from transom.zoo.model import Model

TORCH, ONNXRUNTIME = "torch", "onnxruntime"
ROLLOUTS = (TORCH, ONNXRUNTIME)


class Rollout(abc.ABC):
    """Sequences of one length that go on token by token."""

    @abc.abstractmethod
    def begin(self, prompts: Sequence[Sequence[int]], slots: int) -> torch.Tensor:
        """Forget all sequences, and begin others; equal ones are run once.

        Args:
            prompts: Token ids, all of them as many.
            slots: Tokens that each will have at most.

        Returns:
            Logits of each one's last token, float32 [B, V], on the CPU.
        """

    @abc.abstractmethod
    def decode(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Run a token of each; returns its logits [B, V]."""

    @abc.abstractmethod
    def take(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""


class TorchRollout(Rollout):
    """On the plain module.

    Args:
        module: Its parameters are the policy's weights.
        states: What it keeps from call to call.
        device: Where they are.
    """

    def __init__(self, module: Decoder, states: Sequence[State], device: torch.device) -> None:
        self._module, self._states, self._device = module, states, device

    def begin(self, prompts: Sequence[Sequence[int]], slots: int) -> torch.Tensor:
        distinct, copies = once(prompts)
        states = [torch.zeros(state.shape(slots, batch=len(distinct)), device=self._device) for state in self._states]
        self._caches, self._start = list(zip(states[::2], states[1::2], strict=True)), 0
        logits_BV = self._run(torch.tensor(distinct))
        if len(distinct) == len(copies):
            return logits_BV
        self.take(copies)
        return logits_BV[copies]

    def decode(self, tokens_B: torch.Tensor) -> torch.Tensor:
        return self._run(tokens_B[:, None])

    def take(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._device)
        self._caches = [(key.index_select(0, index), value.index_select(0, index)) for key, value in self._caches]

    @torch.no_grad()
    def _run(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        position = torch.tensor(self._start, device=self._device)
        hidden_BTD, self._caches = self._module.hidden(tokens_BT.to(self._device), position, self._caches)
        self._start += tokens_BT.shape[1]
        logits_BV: torch.Tensor = self._module.head(hidden_BTD[:, -1]).float().cpu()
        return logits_BV


class OnnxRollout(Rollout):
    """On ONNX Runtime, with as many threads as PyTorch has now.

    Args:
        model: What is lowered, of its own weights' names.
        weights: By name, float32 on the CPU, changed in place only.

    Raises:
        TrainingError: If the model cannot be lowered, or a library is missing.
    """

    def __init__(self, model: Model, weights: Mapping[str, torch.Tensor]) -> None:
        try:
            from transom.backends.onnxruntime.live import LiveRuntime
            from transom.export.onnx.live import live_model
            from transom.export.onnx.onnxruntime import DIALECT

            chunk = min(CHUNK, model.config.context)
            self._weights = weights
            self._places = {name: weight.data_ptr() for name, weight in weights.items()}
            live = {name: Weight.of(weight.detach()) for name, weight in weights.items()}
            graph, _ = live_pipeline(chunk).run(_over(model.trace(), live))
            proto, recipes = live_model(graph, DIALECT)
            arrays = dict[str, NDArray[np.float32]]()
            self._computed: list[tuple[Weight, torch.Tensor]] = []
            for name, weight in recipes.items():
                if weight is live.get(name) and weights[name].is_contiguous():
                    arrays[name] = weights[name].detach().numpy()
                else:
                    self._computed.append((weight, torch.empty(weight.shape)))
                    arrays[name] = self._computed[-1][1].numpy()
            runtime = LiveRuntime(
                proto.SerializeToString(),
                arrays,
                states=tuple(graph.states.values()),
                context=model.config.context,
                chunk=chunk,
                vocab_size=model.config.vocab_size,
                threads=torch.get_num_threads(),
            )
            self._batch = Batch(runtime)
        except (TransomError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise TrainingError(
                f"{model.config.name} draws no samples on ONNX Runtime ({reason}): choose {TORCH!r} for its rollouts"
            ) from error

    def begin(self, prompts: Sequence[Sequence[int]], slots: int) -> torch.Tensor:
        if moved := [name for name, place in self._places.items() if self._weights[name].data_ptr() != place]:
            raise InvariantError(
                f"{moved[0]} was replaced, and ONNX Runtime reads what it was: change weights in place"
            )
        for weight, computed in self._computed:
            computed.copy_(weight.read())
        return torch.from_numpy(self._batch.begin(prompts, slots))

    def decode(self, tokens_B: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._batch.decode(tokens_B.numpy()))

    def take(self, rows: Sequence[int]) -> None:
        self._batch.take(rows)


def _over(traced: Graph, weights: Mapping[str, Weight]) -> Graph:
    """A traced graph over other weights. Those that were one and the same stay so."""
    others = {id(traced.weights[name]): weight for name, weight in weights.items() if name in traced.weights}
    graph = traced.clone()
    graph.weights = {name: others.get(id(weight), weight) for name, weight in graph.weights.items()}
    return graph
