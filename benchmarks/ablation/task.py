"""The ablation's task, its base model, and what is measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from transom.graphs.weight import Weight
from transom.training.loop import Loop, LoopSettings, Metrics
from transom.training.objectives.sft import Sft
from transom.training.policy import Policy
from transom.training.prompts import Prompt, continued
from transom.training.state import TrainingState
from transom.training.text import order
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.config import tile
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.model import Model
from transom.zoo.rope import Rope

CHARACTERS = " 0123456789+-*=\n"
END = CHARACTERS.index("\n")
PROMPT, ANSWER = 6, 4
"""Characters. Prompts are padded in front, so that all are run together; an answer has its end in it."""

LARGEST = 99
"""Of the numbers that are added or subtracted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """All numbers that results depend on.

    Attributes:
        splits: Distinct problems of each.
        wrong: Share of wrong answers that the base model learns from.
        answers: That the base model sees of a problem.
        base_steps: That it learns.
        base_rate: Its learning rate.
        steps: Of a method's run.
        tuning_steps: Of a run that only compares learning rates.
        samples: In a step.
        rates: Learning rates that are tried.
        every: Steps between two measurements.
        draws: Samples of a problem that is measured.
        anchor_rate: Of the anchors that move.
    """

    splits: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"base": 14_500, "prompts": 3_000, "tuning": 1_000, "unseen": 1_500}
    )
    wrong: float = 0.55
    answers: int = 9
    base_steps: int = 2000
    base_rate: float = 4e-3
    steps: int = 160
    tuning_steps: int = 80
    samples: int = 192
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    every: int = 40
    draws: int = 2
    anchor_rate: float = 0.02

    @property
    def digest(self) -> str:
        """Runs of other numbers go to another folder; but for rates, which every run's file names."""
        numbers = {name: value for name, value in dataclasses.asdict(self).items() if name != "rates"}
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:8]


def problems() -> list[Prompt]:
    """All there are."""
    numbers = range(LARGEST + 1)
    questions = [(f"{a}{sign}{b}=", a + b if sign == "+" else a - b) for sign in "+-" for a in numbers for b in numbers]
    return [
        Prompt(text=text, ids=tuple(map(CHARACTERS.index, text.rjust(PROMPT))), reference={"answer": str(answer)})
        for text, answer in questions
    ]


def split(study: Study) -> dict[str, list[Prompt]]:
    """Distinct problems for each use."""
    everything = problems()
    places, result, start = order(len(everything), 0).tolist(), {}, 0
    for name, count in study.splits.items():
        result[name] = [everything[place] for place in places[start : start + count]]
        start += count
    if start > len(everything):
        raise ValueError(f"splits of {start:,} problems: there are only {len(everything):,}")
    return result


def slip(answer: int, draw: random.Random) -> int:
    """A wrong answer: a carry forgotten, one off, the sign lost, or digits swapped."""
    while True:
        swapped = int(str(abs(answer))[::-1])
        kinds = (answer + draw.choice((-10, 10)), answer + draw.choice((-1, 1)), -answer, swapped)
        wrong = draw.choice(kinds)
        if wrong != answer and len(str(wrong)) < ANSWER:
            return wrong


def answer_ids(answer: str) -> list[int]:
    """An answer with its end, as tokens."""
    return [*map(CHARACTERS.index, answer), END]


def decode(ids: Sequence[int]) -> str:
    """Tokens as text."""
    return "".join(CHARACTERS[id] for id in ids)


def exact(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """The reward: 1 for the right answer, 0 for any other."""
    return [float(text == prompt.reference["answer"]) for prompt, text in zip(prompts, texts, strict=True)]


def untrained() -> Model:
    """A local and a global layer; the window is shorter than a problem with its answer."""
    config = Gemma3Config(
        name="sums", vocab_size=len(CHARACTERS), hidden_size=64, intermediate_size=256, num_heads=4, num_kv_heads=2,
        head_dim=16, layer_kinds=tile("LG", 2), window=6, rope_local=Rope(theta=100.0), rope_global=Rope(theta=1e4),
        attention_scale=16**-0.5, context=64,
    )  # fmt: skip
    return Model(config=config, weights=random_weights(config, 0), tokenizer=None, source="random", revision="seed 0")


def trained_base(study: Study, folder: Path) -> Model:
    """The base model, from its file once there is one; its training goes on where it was stopped."""
    path, model = folder / "base.pt", untrained()
    if path.exists():
        tensors: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
        return dataclasses.replace(model, weights={name: Weight.of(t, "base") for name, t in tensors.items()})
    draw, prompts, answers = random.Random(0), [], []
    for prompt in split(study)["base"] * study.answers:
        answer = int(prompt.reference["answer"])
        prompts.append(prompt)
        answers.append(answer_ids(str(slip(answer, draw) if draw.random() < study.wrong else answer)))
    policy = Policy(model)
    objective = Sft(policy, prompts, answers, batch=study.samples)
    settings = LoopSettings(steps=study.base_steps, learning_rate=study.base_rate, clip=1.0, save_every=200)
    state = TrainingState(folder / "base", settings, model.revision, study.digest)

    def on_step(done: int, total: int, metrics: Metrics) -> None:
        if done % 100 == 0:
            print(f"base model, step {done} of {total}: {metrics['loss']:.3f}", flush=True)

    Loop(objective, settings, state=state, saved=state.load(), on_step=on_step).run()
    write(path, lambda draft: torch.save({name: t.detach() for name, t in policy.weights.items()}, draft))
    state.remove()
    return policy.model()


def write(path: Path, save: Callable[[Path], object]) -> None:
    """A file that is there only when it is whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    save(draft)
    draft.replace(path)


def measure(policy: Policy, start: Policy, prompts: Sequence[Prompt], draws: int) -> dict[str, list[float]]:
    """Of every problem: exact match of samples (their share) and of the likeliest answer, KL to the start in nats."""
    ids, stops = [prompt.ids for prompt in prompts], frozenset({END})
    greedy = policy.sample(ids, max_new=ANSWER, stops=stops, temperature=0)
    repeated = [prompt for prompt in prompts for _ in range(draws)]
    generator = torch.Generator().manual_seed(0)
    sampled = policy.sample([prompt.ids for prompt in repeated], max_new=ANSWER, stops=stops, generator=generator)
    tokens_BT, counts_BT = continued(repeated, sampled)
    with torch.no_grad():
        ratios = (policy.log_probs(tokens_BT, counts_BT) - start.log_probs(tokens_BT, counts_BT)).sum(-1)
    rewards = torch.tensor(exact(repeated, [text_of(new) for new in sampled]))
    return {
        "sampled": rewards.view(-1, draws).mean(1).tolist(),
        "greedy": exact(prompts, [text_of(new) for new in greedy]),
        "kl": [round(value, 4) for value in ratios.view(-1, draws).mean(1).tolist()],
    }


def frozen(name: str) -> bool:
    """Which weights a policy trains that is only read: none."""
    return False


def text_of(new: Sequence[int]) -> str:
    """A continuation's text. One that has no end is no answer that could be right, as it is too long."""
    return decode([id for id in new if id != END])
