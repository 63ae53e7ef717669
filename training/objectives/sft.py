"""Supervised fine-tuning: cross-entropy of right answers, and of nothing before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transom.errors import TrainingError
from transom.training.loop import Loss, Objective
from transom.training.policy import Policy
from transom.training.prompts import Prompt, continued, response_ids
from transom.training.text import index_at
from transom.zoo.tokenizer import Tokenizer

ANSWER = "answer"
"""Key of a prompt's right answer."""


def answer_ids(tokenizer: Tokenizer, prompts: Sequence[Prompt], longest: int) -> list[list[int]]:
    """Token ids of every prompt's right answer, with the token that ends a text.

    Raises:
        TrainingError: If a prompt has no answer, or a longer one than `longest` tokens.
    """
    answers = []
    for prompt in prompts:
        text = prompt.reference.get(ANSWER)
        if not isinstance(text, str):
            raise TrainingError(f"{prompt.where} has no text under `{ANSWER}`: give every line one")
        answers.append(response_ids(tokenizer, prompt, text, longest))
    return answers


class Sft(Objective):
    """Learn answers.

    Args:
        policy: What is trained.
        prompts: Each with its answer.
        answers: Token ids of their answers.
        batch: Prompts in a step.
        parts: In how many parts they go through the model; it divides `batch`.
        seed: Of their order.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
        *,
        batch: int,
        parts: int = 1,
        seed: int = 0,
    ) -> None:
        self.parameters, self.parts, self.shards = policy.parameters, parts, policy.shards
        self._policy, self._prompts, self._answers, self._batch, self._seed = policy, prompts, answers, batch, seed

    def losses(self, step: int) -> Iterator[Loss]:
        """Mean -log p of the answers' tokens in each part, in nats."""
        size = self._batch // self.parts
        for part in self.shards.share(range(step * self.parts, (step + 1) * self.parts)):
            places = range(part * size, (part + 1) * size)
            chosen = [index_at(place, len(self._prompts), self._seed) for place in places]
            tokens_BT, counts_BT = continued([self._prompts[i] for i in chosen], [self._answers[i] for i in chosen])
            log_probs_BT = self._policy.log_probs(tokens_BT, counts_BT).cpu()
            yield Loss(value=-log_probs_BT.sum() / counts_BT.sum())
