"""A policy: gradients as the plain module's, samples as its probabilities, and one set of weights for both."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch

from tests.tolerances import FP32_GRADIENTS, FP32_LOGITS
from transom.errors import ContextLengthError, InvariantError, TrainingError
from transom.export.onnx.onnxruntime import DIALECT
from transom.graphs import ops
from transom.training import divergence, rollouts
from transom.training.policy import Policy, padded
from transom.training.rollouts import ONNXRUNTIME, ROLLOUTS, OnnxRollout, TorchRollout
from transom.zoo.model import Model, load

PROMPTS = [[2, 5, 9, 40], [2, 7], [2, 8, 11, 13], [2, 300, 12, 14, 15, 16, 17, 18, 19, 20]]


@pytest.fixture(scope="module", params=["gemma3-tiny", "llama3-tiny"])
def model(request: pytest.FixtureRequest) -> Model:
    return load(request.param)


@pytest.mark.parametrize("rows", [1, 1000])
def test_gradients_are_the_modules(rows: int, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the window, a batch of unequal sequences; logits of wanted positions one at a time, or of all at once."""
    monkeypatch.setattr(divergence, "LOGITS", rows * model.config.vocab_size)
    policy, module = Policy(model, recompute=rows == 1), model.eager().requires_grad_(True)
    window = model.config.longest_window or 16
    sequences = [[(7 * i + j) % 500 for i in range(length)] for j, length in enumerate((3 * window + 5, window, 4))]
    tokens = padded(sequences)
    mask = torch.tensor([[t < len(s) - 1 for t in range(tokens.shape[1] - 1)] for s in sequences])
    log_probs = policy.log_probs(tokens, mask if rows == 1 else None)
    assert rows > 1 or not log_probs[~mask].any()
    (log_probs * mask).sum().backward()  # type: ignore[no-untyped-call]
    total = torch.zeros(())
    for row, sequence in enumerate(sequences):
        ids = torch.tensor([sequence])
        logits = module(ids, torch.tensor(0), None)[0]
        expected = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(log_probs[row, : len(sequence) - 1], expected, atol=FP32_LOGITS, rtol=0)
        total = total + expected.sum()
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert policy.parameters.keys() <= gradients.keys() and len(policy.parameters) == len(model.weights)
    for name, parameter in policy.parameters.items():
        assert parameter.grad is not None and gradients[name] is not None
        largest = float(gradients[name].abs().max())  # type: ignore[union-attr]
        torch.testing.assert_close(parameter.grad, gradients[name], atol=FP32_GRADIENTS * max(1.0, largest), rtol=0)


@pytest.mark.parametrize("rollouts", ROLLOUTS)
def test_greedy_samples_are_the_modules(rollouts: str, model: Model) -> None:
    """Far past the window, with prompts of several lengths in one call."""
    module, new = model.eager(), 3 * (model.config.longest_window or 16) + 5
    samples = Policy(model, rollouts=rollouts).sample(PROMPTS, max_new=new, stops=frozenset(), temperature=0)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        logits = module(torch.tensor([prompt + sample]), torch.tensor(0), None)[0][0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(sample)[:, None])[:, 0]
        assert len(sample) == new and float((logits.max(-1).values - chosen).max()) < FP32_LOGITS


def test_samples_follow_the_probabilities(model: Model) -> None:
    """Shares of 4,000 draws of the second token after one prompt lie within four standard errors."""
    policy = Policy(model)
    with torch.no_grad():
        policy.weights[policy._module.head_weight].mul_(4)
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 2.0):
        drawn = policy.sample(
            [PROMPTS[0]] * 4000, max_new=1, stops=frozenset(), temperature=temperature, generator=generator
        )
        logits = policy.head.logits(policy.hidden(torch.tensor([PROMPTS[0]]))[0, -1:])[0].detach()
        p = (logits / temperature).softmax(-1)
        shares = Counter(sample[0] for sample in drawn)
        for token in p.topk(5).indices.tolist():
            expected = float(p[token])
            assert abs(shares[token] / 4000 - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


@pytest.mark.parametrize("rollouts", ROLLOUTS)
def test_a_row_that_ends_leaves_the_others(rollouts: str, model: Model) -> None:
    policy = Policy(model, rollouts=rollouts)
    rows = [PROMPTS[0], PROMPTS[2], [2, 9, 8, 7]]
    whole = policy.sample(rows, max_new=20, stops=frozenset(), temperature=0)
    stop = whole[1][2]
    cut = policy.sample(rows, max_new=20, stops=frozenset({stop}), temperature=0)
    for sample, ended in zip(whole, cut, strict=True):
        assert ended == (sample[: sample.index(stop) + 1] if stop in sample else sample)
    assert len(cut[1]) <= 3


@pytest.mark.parametrize("rollouts", ROLLOUTS)
def test_what_is_trained_is_what_samples(rollouts: str, model: Model) -> None:
    """A step on the weights in place changes the sampler, its model and nothing of the model it came from."""
    policy = Policy(model, rollouts=rollouts)
    before = policy.sample(PROMPTS[:1], max_new=8, stops=frozenset(), temperature=0)
    with torch.no_grad():
        for weight in policy.weights.values():
            weight.copy_(weight.flip(0))
    after = policy.sample(PROMPTS[:1], max_new=8, stops=frozenset(), temperature=0)
    assert after != before
    assert Policy(policy.model()).sample(PROMPTS[:1], max_new=8, stops=frozenset(), temperature=0) == after
    assert Policy(model).sample(PROMPTS[:1], max_new=8, stops=frozenset(), temperature=0) == before


def test_onnx_runtime_reads_the_weights_themselves(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits as the module's after each weight by itself is changed in place: of prompts in one call, of one that takes
    several, of copies, of rows that are left, and far past the window.
    """
    monkeypatch.setattr(rollouts, "CHUNK", 7)
    policy = Policy(model)
    onnx = OnnxRollout(model, policy.weights)
    module = TorchRollout(policy._module, model.config.states, policy.device)
    new = 3 * (model.config.longest_window or 16) + 5
    longer = [[*PROMPTS[3], *PROMPTS[0]], [*PROMPTS[3], *PROMPTS[2]]]

    def differ(prompts: list[list[int]], steps: int) -> tuple[float, torch.Tensor]:
        logits = [rollout.begin(prompts, len(prompts[0]) + steps) for rollout in (onnx, module)]
        first, largest = logits[1], float((logits[0] - logits[1]).abs().max())
        for step in range(steps):
            tokens = logits[1].argmax(-1)
            if step == 2:
                tokens = tokens[1:]
                for rollout in (onnx, module):
                    rollout.take(range(1, len(prompts)))
            logits = [rollout.decode(tokens) for rollout in (onnx, module)]
            largest = max(largest, float((logits[0] - logits[1]).abs().max()))
        return largest, first

    for prompts in ([PROMPTS[0], PROMPTS[2], PROMPTS[0]], longer):
        largest, before = differ(prompts, new)
        assert largest < FP32_LOGITS
    for name, weight in policy.weights.items():
        start = weight.detach().clone()
        with torch.no_grad():
            weight.add_(torch.linspace(-1, 1, weight.numel()).view(weight.shape) * (weight.std() + 0.1))
        largest, after = differ(longer, 0)
        assert largest < FP32_LOGITS and float((after - before).abs().max()) > 10 * FP32_LOGITS, name
        with torch.no_grad():
            weight.copy_(start)
    assert all(computed.numel() <= model.config.hidden_size for _, computed in onnx._computed), "no matrix is copied"
    weight = next(iter(policy.weights.values()))
    weight.data = weight.data + 1
    with pytest.raises(InvariantError, match="change weights in place"):
        onnx.begin(longer, 20)


def test_onnx_runtime_draws_as_pytorch(model: Model) -> None:
    """The same seed, the same draws; and log-probs that are the policy's."""
    drawn = []
    for rollout in ROLLOUTS:
        policy, generator = Policy(model, rollouts=rollout), torch.Generator().manual_seed(3)
        rows = [prompt for prompt in PROMPTS for _ in range(3)]
        drawn.append(policy.sample(rows, max_new=20, stops=frozenset({7, 8}), temperature=1.5, generator=generator))
    assert drawn[0] == drawn[1] and len(set(map(tuple, drawn[0]))) > 6


def test_what_cannot_sample_on_onnx_runtime(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a library that is missing nor an operation is met by sampling elsewhere in silence."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(TrainingError, match=r"needs ONNX Runtime.*choose 'torch' for its rollouts"):
            Policy(model, rollouts=ONNXRUNTIME).sample(PROMPTS, max_new=1, stops=frozenset())
    monkeypatch.delitem(DIALECT.lowerings, ops.RMS_NORM)
    with pytest.raises(TrainingError, match=r"cannot lower these operations:.*rms_norm.*choose 'torch'"):
        Policy(model, rollouts=ONNXRUNTIME).sample(PROMPTS, max_new=1, stops=frozenset())


def test_some_weights_alone_take_gradients(model: Model) -> None:
    policy = Policy(model, trained=lambda name: name.endswith("norm.weight"))
    policy.log_probs(torch.tensor([PROMPTS[0]])).sum().backward()  # type: ignore[no-untyped-call]
    assert 0 < len(policy.parameters) < len(policy.weights)
    assert all((w.grad is not None) == name.endswith("norm.weight") for name, w in policy.weights.items())


def test_too_long(model: Model) -> None:
    policy, context = Policy(model), model.config.context
    with pytest.raises(ContextLengthError, match="longer than the context"):
        policy.log_probs(torch.zeros(1, context + 1, dtype=torch.int64))
    with pytest.raises(ContextLengthError, match="fewer new tokens"):
        policy.sample([[2, 3]], max_new=context - 1, stops=frozenset())
