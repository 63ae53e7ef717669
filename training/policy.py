"""A language model that is trained: one set of weights, with gradients through its traced graph, and a sampler on them.

Axes: B sequences, T tokens, N positions, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from transom.errors import ContextLengthError, TrainingError
from transom.graphs.weight import Weight
from transom.training.device import device_of
from transom.training.divergence import Head
from transom.training.parallel import ONE, Shards
from transom.training.quantize import score_graph
from transom.training.rollouts import ONNXRUNTIME, TORCH, OnnxRollout, Rollout, TorchRollout
from transom.training.stages import Stages
from transom.zoo.architectures import build_empty
from transom.zoo.model import Model


class Policy:
    """A model's live weights.

    Args:
        model: Of any architecture of the zoo; images are left out.
        device: Where to compute: "cpu", "cuda" and so on.
        trained: Whether a weight of that name takes gradients.
        recompute: Compute every layer again on the way back: memory for time. Several processes always do, as each
            layer would keep its gathered weights.
        shards: Where the weights are.
        rollouts: What samples, of `rollouts.ROLLOUTS`.

    Attributes:
        device: Where it computes.
        shards: Where the weights are.
        weights: By name, float32; of several processes, each has its rows. Optimisers change them in place, and every
            method sees that.

    Raises:
        TrainingError: If there is no such device, or what is to sample cannot do so from its memory.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str = "cpu",
        trained: Callable[[str], bool] = lambda name: True,
        recompute: bool = False,
        shards: Shards = ONE,
        rollouts: str = TORCH,
    ) -> None:
        self._model, self.device, self.shards = model.text(), device_of(device), shards
        if rollouts == ONNXRUNTIME and self.device.type != "cpu":
            raise TrainingError(
                f"ONNX Runtime reads weights where the CPU has them, not on {device}: choose {TORCH!r} for rollouts"
            )
        self._recompute, self._rollouts = recompute or shards.count > 1, rollouts
        graph = score_graph(self._model)
        self._stages = Stages(graph, device=self.device)
        # Reading gives a tensor of its own, or one that others may see: only copies are changed in place.
        self.weights = {
            name: shards.shard(weight.read().float().clone().to(self.device)).requires_grad_(trained(name))
            for name, weight in graph.weights.items()
        }
        self._whole = shards.gathered(self.weights)
        self._module = build_empty(self._model.config)
        if shards.count == 1:
            # The module's parameters are these very tensors.
            state = {name: tensor.detach() for name, tensor in self.weights.items()}
            self._module.load_state_dict(state, assign=True, strict=False)
        self._module.requires_grad_(False)

    @property
    def head(self) -> Head:
        """How its hidden states become logits."""
        return Head(table=self._whole[self._module.head_weight], softcap=self._module.softcap)

    def head_of(self, other: Policy) -> Head:
        """The head for as many tokens as another policy knows."""
        head = self.head
        return dataclasses.replace(head, table=head.table[: other.weights[other._module.head_weight].shape[0]])

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        """The weights that take gradients."""
        return {name: weight for name, weight in self.weights.items() if weight.requires_grad}

    def model(self) -> Model:
        """The model with the weights as they are now, copied; of several processes, each gets all."""
        whole = {name: self.shards.whole(tensor.detach()) for name, tensor in self.weights.items()}
        return self._with({name: Weight.of(tensor.cpu().clone()) for name, tensor in whole.items()})

    def write(self, write: Callable[[Model], None]) -> None:
        """Call a function with the model as it is now, on the first process only; it must read all that it needs."""
        self.shards.write(self.weights, lambda weights: write(self._with(weights)))

    def _with(self, weights: Mapping[str, Weight]) -> Model:
        return dataclasses.replace(self._model, weights={**self._model.weights, **weights}, quant="none")

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """What the head reads, [B, T, D].

        Args:
            tokens_BT: int64. Shorter sequences are padded at their end with any token.

        Raises:
            ContextLengthError: If they are longer than the model's context.
        """
        if tokens_BT.shape[1] > self._model.config.context:
            raise ContextLengthError(
                f"sequences of {tokens_BT.shape[1]:,} tokens are longer than the context of "
                f"{self._model.config.context:,}: give shorter ones"
            )
        return self._stages.hidden(tokens_BT.to(self.device), self._whole, recompute=self._recompute)

    def log_probs(self, tokens_BT: torch.Tensor, counts_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Log p of every token but the first, given those before it: float32 [B, T - 1], in nats.

        Args:
            tokens_BT: As `hidden` takes them.
            counts_BT: bool [B, T - 1]: the tokens that are wanted. The others are 0, and cost no logits.
        """
        tokens_BT = tokens_BT.to(self.device)
        hidden_BTD, next_BT = self.hidden(tokens_BT)[:, :-1], tokens_BT[:, 1:]
        wanted_BT = torch.ones_like(next_BT, dtype=torch.bool) if counts_BT is None else counts_BT.to(self.device)
        log_probs_N = token_log_probs(hidden_BTD[wanted_BT], self.head, next_BT[wanted_BT])
        return log_probs_N.new_zeros(next_BT.shape).masked_scatter(wanted_BT, log_probs_N)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new: int,
        stops: frozenset[int],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> list[list[int]]:
        """Continue prompts by the weights as they are now.

        Args:
            prompts: Token ids; those of one length are run together.
            max_new: Most new tokens.
            stops: Tokens that end a continuation, itself the last of it.
            temperature: Divides the logits; 0 takes the likeliest token.
            generator: Of the draws, on the CPU.
            on_tokens: Told of new tokens as they are drawn.

        Returns:
            New ids of every prompt.

        Raises:
            ContextLengthError: If a prompt and its continuation could be longer than the model's context.
            TrainingError: If the weights are spread over processes, or ONNX Runtime is to sample and cannot.
        """
        if self.shards.count > 1:
            raise TrainingError("a model that is spread over processes draws no samples: train in one process")
        longest = max(map(len, prompts), default=0) + max_new
        if longest > self._model.config.context:
            raise ContextLengthError(
                f"a prompt and {max_new:,} new tokens are {longest:,}, the context is {self._model.config.context:,}: "
                "give shorter prompts or fewer new tokens"
            )
        new: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for _, group in itertools.groupby(order, key=lambda index: len(prompts[index])):
            rows = list(group)
            begun, ends = [prompts[row] for row in rows], [new[row] for row in rows]
            self._continue(begun, ends, max_new, stops, temperature, generator, on_tokens)
        return new

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        new: list[list[int]],
        max_new: int,
        stops: frozenset[int],
        temperature: float,
        generator: torch.Generator | None,
        on_tokens: Callable[[int], None],
    ) -> None:
        """Decode prompts of one length together; rows that have ended are dropped."""
        rollout = self._rollout
        logits_BV = rollout.begin(prompts, len(prompts[0]) + max_new)
        for step in range(1, max_new + 1):
            chosen_B = _choose(logits_BV, temperature, generator)
            on_tokens(len(chosen_B))
            for row, token in zip(new, chosen_B.tolist(), strict=True):
                row.append(token)
            going = [index for index, row in enumerate(new) if row[-1] not in stops]
            if not going or step == max_new:
                return
            if len(going) < len(new):
                new, chosen_B = [new[index] for index in going], chosen_B[going]
                rollout.take(going)
            logits_BV = rollout.decode(chosen_B)

    @functools.cached_property
    def _rollout(self) -> Rollout:
        """What samples; it is made when it is first needed."""
        if self._rollouts == TORCH:
            return TorchRollout(self._module, self._model.config.states, self.device)
        return OnnxRollout(self._model, self.weights)


def _choose(logits_BV: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)[:, 0]


def token_log_probs(hidden_ND: torch.Tensor, head: Head, ids_N: torch.Tensor) -> torch.Tensor:
    """Log p of one token a position, float32 [N], with gradients for hidden states and table.

    Logits are held for a few positions at a time, and computed again on the way back.
    """

    def block(hidden_ND: torch.Tensor, table_VD: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        logits_NV = dataclasses.replace(head, table=table_VD).logits(hidden_ND)
        return logits_NV.log_softmax(-1).gather(1, ids_N[:, None])[:, 0]

    step = head.step
    parts = [
        checkpoint(block, hidden_ND[low : low + step], head.table, ids_N[low : low + step], use_reentrant=False)
        for low in range(0, len(hidden_ND), step)
    ]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0)


def padded(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Sequences as one int64 [B, T], padded with zeros at their ends."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
