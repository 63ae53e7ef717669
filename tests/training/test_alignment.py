"""Alignment: methods are given what the model says, rewards rise, the anchor follows, a run goes on to the bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.tolerances import FP32_LOGITS
from transom.errors import ContextLengthError, TokenizerError, TrainingError
from transom.training.loop import Loop, LoopSettings, Loss, Metrics
from transom.training.objectives.alignment import Alignment, Method, Samples
from transom.training.objectives.best_of_n import BestOfN
from transom.training.objectives.bond import Bond
from transom.training.objectives.dpo import Dpo
from transom.training.objectives.jbond import JBond
from transom.training.objectives.rloo import Rloo
from transom.training.objectives.rrhf import Rrhf
from transom.training.objectives.sft import Sft, answer_ids
from transom.training.policy import Policy
from transom.training.prompts import Prompt, read_prompts
from transom.training.state import TrainingState
from transom.zoo.model import Model

SETTINGS = LoopSettings(steps=6, learning_rate=3e-3, save_every=2, clip=1.0)


class Watch(Method):
    """Keeps what it is given."""

    own, anchored, compares = 2, 3, True

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        self.given = own, anchored
        assert own is not None
        return Loss(value=own.log_probs.mean())


class Everything(Method):
    """A method that is given log p of all samples under both models, and reads what it reads anyway."""

    compares = True

    def __init__(self, method: Method) -> None:
        self._method = method

    @property
    def own(self) -> int:
        return self._method.own

    @property
    def anchored(self) -> int:
        return self._method.anchored

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        if anchored is not None:
            assert anchored.anchor_log_probs is not None and anchored.log_probs.shape == anchored.rewards.shape
            places = self._method.chosen(anchored.rewards)
            log_probs, anchor = (part.gather(1, places) for part in (anchored.log_probs, anchored.anchor_log_probs))
            anchored = dataclasses.replace(anchored, log_probs=log_probs, anchor_log_probs=anchor)
        return self._method.loss(own, anchored)


def capitals(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """Share of characters from the middle of ASCII on."""
    return [sum("@" <= character < "\x7f" for character in text) / max(1, len(text)) for text in texts]


@pytest.fixture(scope="module")
def prompts(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt": "ab" * count, "answer": "xyz"[: 1 + count % 3]} for count in (1, 2, 9, 9)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return read_prompts(tiny, path, max_new=12)


def alignment(
    model: Model, prompts: list[Prompt], method: Method, **options: float
) -> tuple[Policy, Policy, Alignment]:
    policy, anchor = Policy(model), Policy(model, trained=lambda name: False)
    assert model.tokenizer is not None
    stops = frozenset({*model.tokenizer.stop_ids, *range(ord("x"), ord("z"))})
    chosen = {"batch": 4, "parts": 2, "max_new": 10, "seed": 3, **options}
    decode = model.tokenizer.decode
    return policy, anchor, Alignment(policy, anchor, method, prompts, capitals, decode=decode, stops=stops, **chosen)  # type: ignore[arg-type]


def test_what_a_method_is_given(tiny: Model, prompts: list[Prompt]) -> None:
    """Of every sample its log p under both models, past the window, prompt and padding left out, and its reward."""
    method = Watch()
    policy, anchor, objective = alignment(tiny, prompts, method)
    with torch.no_grad():
        for weight in anchor.weights.values():
            weight.mul_(1.1)
    continuations: list[tuple[Policy, list[Sequence[int]], list[list[int]]]] = []
    original = Policy.sample

    def watch(source: Policy, prompts: list[Sequence[int]], **options: object) -> list[list[int]]:
        new = original(source, prompts, **options)  # type: ignore[arg-type]
        continuations.append((source, prompts, new))
        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "sample", watch)
        loss = next(objective.losses(0))
    assert [source for source, *_ in continuations] == [policy, anchor]
    modules = policy.model().eager(), anchor.model().eager()
    assert tiny.tokenizer is not None
    for samples, (_, requests, new), copies in zip(method.given, continuations, (2, 3), strict=True):
        assert samples is not None and samples.anchor_log_probs is not None
        assert samples.log_probs.shape == samples.anchor_log_probs.shape == (2, copies)
        for place, (prompt, ids) in enumerate(zip(requests, new, strict=True)):
            row, column = divmod(place, copies)
            tokens = torch.tensor([[*prompt, *ids]])
            for module, values in zip(modules, (samples.log_probs, samples.anchor_log_probs), strict=True):
                logits = module(tokens, torch.tensor(0), None)[0][0, len(prompt) - 1 : -1]
                expected = float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())
                assert float(values[row, column].detach()) == pytest.approx(expected, abs=FP32_LOGITS * len(ids))
            assert int(samples.lengths[row, column]) == len(ids)
    own = method.given[0]
    assert own is not None and loss.metrics["reward"] == pytest.approx(float(own.rewards.mean()))
    anchor_log_probs = own.anchor_log_probs
    assert anchor_log_probs is not None and not anchor_log_probs.requires_grad and own.log_probs.requires_grad
    assert loss.metrics["kl_to_anchor"] == pytest.approx(float((own.log_probs.detach() - anchor_log_probs).mean()))


# Two prompts in a part, and so many samples of each that log p is computed of.
@pytest.mark.parametrize(
    ("method", "of_policy", "of_anchor"),
    [
        (BestOfN(samples=3), 1, 0),
        (Rloo(samples=3), 3, 3),
        (Bond(n=2, samples=3), 1 + 2, 2),
        (JBond(), 1 + 1, 1),
        (Dpo(samples=3), 2, 2),
        (Rrhf(samples=3), 3, 0),
    ],
)
def test_only_what_a_method_reads_is_computed(
    method: Method, of_policy: int, of_anchor: int, tiny: Model, prompts: list[Prompt]
) -> None:
    """With the loss and the gradient of all of it."""
    rows: dict[Policy, int] = {}
    original = Policy.log_probs

    def watch(model: Policy, tokens_BT: torch.Tensor, *counts: torch.Tensor) -> torch.Tensor:
        rows[model] = rows.get(model, 0) + len(tokens_BT)
        return original(model, tokens_BT, *counts)

    results = []
    for one in (method, Everything(method)):
        policy, anchor, objective = alignment(tiny, prompts, one)
        rows.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Policy, "log_probs", watch)
            loss = next(objective.losses(0))
        gradients = torch.autograd.grad(loss.value, list(policy.parameters.values()), allow_unused=True)
        results.append((loss.value.detach(), loss.metrics, gradients))
        if one is method:
            assert (rows[policy], rows.get(anchor, 0)) == (2 * of_policy, 2 * of_anchor)
    (value, metrics, gradients), (all_value, all_metrics, all_gradients) = results
    torch.testing.assert_close(value, all_value)
    assert metrics == pytest.approx(all_metrics, abs=FP32_LOGITS)
    torch.testing.assert_close(gradients, all_gradients)


def test_rewards_rise(tiny: Model, prompts: list[Prompt]) -> None:
    _, _, objective = alignment(tiny, prompts, BestOfN(), parts=1, max_new=4, anchor_rate=0.2)
    metrics = Loop(objective, LoopSettings(steps=25, learning_rate=3e-3, clip=1.0, last_rate=1.0)).run()
    first, last = (sum(line["anchor_reward"] for line in part) / 5 for part in (metrics[:5], metrics[-5:]))
    assert last > first + 0.2


def test_the_anchor(tiny: Model, prompts: list[Prompt]) -> None:
    """It moves by its rate after every step, or stays; the policy alone is trained."""
    for rate in (0.25, 0.0):
        policy, anchor, objective = alignment(tiny, prompts, JBond(), anchor_rate=rate)
        before = {name: weight.clone() for name, weight in anchor.weights.items()}
        Loop(objective, LoopSettings(steps=1, learning_rate=1e-2)).run()
        for name, weight in anchor.weights.items():
            torch.testing.assert_close(weight, before[name].lerp(policy.weights[name].detach(), rate))
        assert any(not torch.equal(policy.weights[name], weight) for name, weight in before.items())


def test_it_goes_on_to_the_bit(tiny: Model, prompts: list[Prompt], tmp_path: Path) -> None:
    whole, _, objective = alignment(tiny, prompts, JBond(), anchor_rate=0.1)
    expected = Loop(objective, SETTINGS).run()

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, metrics: Metrics) -> None:
        if done == 5:
            raise StoppedError

    def state() -> TrainingState:
        return TrainingState(tmp_path / "run", SETTINGS, "revision", "data")

    with pytest.raises(StoppedError):
        Loop(alignment(tiny, prompts, JBond(), anchor_rate=0.1)[2], SETTINGS, state=state(), on_step=stop).run()
    policy, _, again = alignment(tiny, prompts, JBond(), anchor_rate=0.1)
    assert Loop(again, SETTINGS, state=state(), saved=state().load()).run() == expected
    assert all(torch.equal(policy.weights[name], weight) for name, weight in whole.weights.items())


def test_answers_are_learned(tiny: Model, prompts: list[Prompt]) -> None:
    """The loss is of answers and their end, a token each; prompts are not learned."""
    assert tiny.tokenizer is not None
    policy, answers = Policy(tiny), answer_ids(tiny.tokenizer, prompts, 12)
    assert [ids[-1] for ids in answers] == [tiny.tokenizer.eos_id] * 4
    objective = Sft(policy, prompts, answers, batch=4)
    loss = next(objective.losses(0)).value
    module, total = tiny.eager(), 0.0
    for prompt, ids in zip(prompts, answers, strict=True):
        logits = module(torch.tensor([[*prompt.ids, *ids]]), torch.tensor(0), None)[0][0, len(prompt.ids) - 1 : -1]
        total -= float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())
    assert float(loss.detach()) == pytest.approx(total / sum(map(len, answers)), abs=FP32_LOGITS)
    Loop(objective, LoopSettings(steps=150, learning_rate=1e-2)).run()
    stops = frozenset(tiny.tokenizer.stop_ids)
    assert policy.sample([p.ids for p in prompts], max_new=12, stops=stops, temperature=0) == answers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompts"),
        ("{", "line 1 is not JSON"),
        ('{"prompt": "a"}\n\n["b"]', "line 3 has no text under `prompt`"),
        ('{"prompt": ""}', "line 1 has no text under `prompt`"),
        ("\xff", "give JSON lines in UTF-8"),
    ],
)
def test_prompts_that_are_refused(text: str, message: str, tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TrainingError, match=message):
        read_prompts(tiny, path, max_new=4)


def test_prompts_that_do_not_fit(tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 50}))
    with pytest.raises(ContextLengthError, match=r"line 1: .* longer than the context"):
        read_prompts(tiny, path, max_new=tiny.config.context - 50)
    with pytest.raises(TokenizerError, match="no tokenizer"):
        read_prompts(dataclasses.replace(tiny, tokenizer=None), path, max_new=4)
    with pytest.raises(TrainingError, match="no text under `answer`"):
        answer_ids(tiny.tokenizer, read_prompts(tiny, path, max_new=4), 4)  # type: ignore[arg-type]
    path.write_text(json.dumps({"prompt": "a", "answer": "b" * 9}))
    with pytest.raises(TrainingError, match=r"line 1: .* is 10 tokens, 1 to 4 are allowed"):
        answer_ids(tiny.tokenizer, read_prompts(tiny, path, max_new=4), 4)  # type: ignore[arg-type]
