"""Tolerances let rounding through and stop what is wrong; schedules and chunks meet the edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.conftest import WINDOW
from tests.faults.configuration import wrong_window
from tests.gemma import gemma_config
from transom.errors import ContextLengthError, QuantizationError, TargetError
from transom.formats.schemes import SCHEMES
from transom.graphs.state import State, ring
from transom.validation.compare import Differences, compare
from transom.validation.judge import judge
from transom.validation.lengths import default_chunk, default_context, schedule, text_length
from transom.validation.oracle import Reading
from transom.validation.tolerances import (
    BFLOAT16,
    FLOAT8_ACTIVATIONS,
    FLOAT32,
    INT8,
    QUANTIZATION_LIMITS,
    Tolerance,
    quantization_limit,
    tolerance,
)
from transom.zoo.architectures import build_empty
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.layers import Decoder
from transom.zoo.model import Model

LENGTH = 4 * WINDOW


def module_of(model: Model, config: Gemma3Config, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model's weights under another configuration or in another dtype."""
    module = build_empty(config)
    state = {name: weight.read().to(dtype) for name, weight in model.weights.items()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def differences(model: Model, module: Decoder, text: Sequence[int]) -> Differences:
    """A module against the oracle."""
    expected = Reading(model.eager(), text)
    logits = Reading(module, text).logits(0, len(text)).float().numpy()
    return compare(logits, expected.logits, 0)


@pytest.mark.parametrize("bound", [FLOAT32, INT8, BFLOAT16], ids=["float32", "int8", "bfloat16"])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_window_that_is_off_by_one_does_not_pass(tiny: Model, text: list[int], bound: Tolerance, by: int) -> None:
    module = module_of(tiny, wrong_window(by)(gemma_config(tiny.config)))
    off_by_one = differences(tiny, module, text[:LENGTH])
    first = min(WINDOW + by, WINDOW)
    assert off_by_one.relative[:first].max() < FLOAT32.relative
    failures = judge("prefill", off_by_one, bound)
    assert failures, f"{off_by_one.relative.max():.2e} of the largest logit, KL {off_by_one.kl.max():.2e}"
    if bound is FLOAT32:
        assert f"from position {first} on" in failures[0]


def test_bfloat16_passes_as_bfloat16_and_not_as_float32(tiny: Model, text: list[int]) -> None:
    rounded = differences(tiny, module_of(tiny, gemma_config(tiny.config), torch.bfloat16), text[:LENGTH])
    assert judge("prefill", rounded, BFLOAT16) == []
    assert judge("prefill", rounded, FLOAT32) != []


def test_which_tolerance_is_whose() -> None:
    assert tolerance("onnxruntime", dtype="float32", quant="none") is FLOAT32
    assert tolerance("onnxruntime", dtype="float32", quant="int4") is INT8
    # Dequantised weights times float32 activations: the oracle's own products.
    assert tolerance("reference", dtype="float32", quant="int4") is FLOAT32
    assert tolerance("onnxruntime", dtype="float32", quant="sfp8") is FLOAT32
    assert tolerance("xla", dtype="float32", quant="fp8_activations") is FLOAT8_ACTIVATIONS
    assert tolerance("reference", dtype="float32", quant="fp8_activations") is FLOAT32
    assert tolerance("xla", dtype="bfloat16", quant="none") is BFLOAT16
    assert tolerance("tensorrt", dtype="bfloat16", quant="fp8_channel_activations") is FLOAT8_ACTIVATIONS
    with pytest.raises(TargetError, match="float64"):
        tolerance("xla", dtype="float64", quant="none")
    for bound in (FLOAT32, BFLOAT16, INT8):
        assert bound.reason


def passing_but(**arrays: Sequence[float]) -> Differences:
    """Differences of 40 positions that pass, but for the first values given."""
    defaults = {"max_abs": 0.0, "magnitude": 10.0, "kl": 0.0, "gap": 0.0}
    full = {name: np.full(40, value) for name, value in defaults.items()}
    for name, values in arrays.items():
        full[name][: len(values)] = values
    return Differences(first=100, log_likelihood=np.zeros(40), kl_unquantized=np.empty(0), **full)


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        (passing_but(max_abs=[0, 0, 1e-3]), "logits differ from position 102 on, by 1.0e-04 of the largest"),
        (passing_but(max_abs=[float("nan")]), "logits differ from position 100 on"),
        (passing_but(kl=[0, 1e-4]), "KL is 1.0e-04 nats at position 101"),
        (passing_but(kl=[5e-6] * 40), "mean KL is 5.0e-06"),
        (passing_but(gap=[0, 0, 0, 0.1]), "from position 103 on, at 1 of 40 positions; these are no ties"),
        (passing_but(gap=[float("nan")]), "from position 100 on"),
        (passing_but(gap=[1e-5] * 4), "top-1 agreement is 90.0%"),
    ],
)
def test_every_bound_can_fail_alone(failing: Differences, words: str) -> None:
    failures = judge("prefill", failing, FLOAT32)
    assert failures and all(line.startswith("a prompt of 140: ") for line in failures)
    assert any(words in line for line in failures), failures


def test_a_few_positions_may_be_sensitive_in_bfloat16() -> None:
    """Two of a thousand, and not without bound; of a few decoded positions, none."""
    far = dataclasses.replace(BFLOAT16, outliers=0.05)
    assert judge("prefill", passing_but(max_abs=[1.5, 1.5]), far) == []
    assert "3 of 40" in judge("prefill", passing_but(max_abs=[1.5, 1.5, 1.5]), far)[0]
    assert "by 3.5e-01" in judge("prefill", passing_but(max_abs=[3.5]), far)[0]
    assert judge("prefill", passing_but(max_abs=[1.5]), BFLOAT16) != []


def test_ties_are_no_disagreement() -> None:
    assert judge("prefill", passing_but(gap=[2e-4]), FLOAT32) == []
    assert judge("prefill", passing_but(), FLOAT32) == []
    assert judge("decode", passing_but(gap=[1e-5] * 4), FLOAT32) == []


def test_compare_by_hand() -> None:
    expected = torch.tensor([[0.0, 1.0, -4.0], [2.0, 1.0, 0.0]])
    logits = np.array([[0.0, 1.5, -4.0], [1.0, 2.0, 0.0]], np.float32)
    differences = compare(
        logits,
        lambda first, stop: expected[first - 5 : stop - 5],
        5,
        following=[2],
        unquantized=lambda first, stop: torch.zeros(stop - first, 3),
    )
    assert differences.first == 5
    assert differences.max_abs.tolist() == [0.5, 1.0]
    assert differences.relative.tolist() == [0.125, 0.5]
    assert differences.gap.tolist() == [0.0, 1.0]
    p, q = expected[1].softmax(-1), torch.from_numpy(logits[1]).softmax(-1)
    assert differences.kl[1] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert differences.kl_unquantized[1] == pytest.approx(float((1 / 3 / q).log().mean()), rel=1e-5)
    # The second token is the text's last: nothing follows it.
    log_q = torch.from_numpy(logits[0]).log_softmax(-1)
    assert differences.log_likelihood.tolist() == [pytest.approx(float(log_q[2]), rel=1e-6)]


def cache(slots: int | None) -> State:
    state = ring("cache.0.key", layer=0, heads=1, width=4, dtype="float32")
    return state if slots is None else dataclasses.replace(state.fixed(slots=slots), window=512)


def test_schedules() -> None:
    plans = schedule(window=512, context=4096, chunk=256, states=[cache(512 + 255), cache(None)])
    assert plans.prompts == (511, 512, 513, 1024, 1541, 2051)
    # The window, one turn of the ring and a second one.
    assert plans.decodes == ((508, 516), (763, 771), (1530, 1538))
    assert (plans.continued, plans.new_tokens, plans.longest) == (1541, 32, 2051)
    # A ring of bare windows wraps at the window itself.
    assert schedule(window=512, context=4096, chunk=256, states=[cache(512)]).decodes == ((508, 516), (1020, 1028))


@pytest.mark.parametrize("context", [2, 15, 16, 17, 40, 53, 66, 67])
def test_schedules_fit_the_context(context: int) -> None:
    plans = schedule(window=16, context=context, chunk=24, states=[cache(39)])
    assert plans.longest == min(context, 67)
    assert all(0 < first < stop <= plans.longest for first, stop in plans.decodes)
    # The last new token is never run.
    assert plans.new_tokens >= 1 and plans.continued + plans.new_tokens - 1 <= context


def test_a_wrap_beyond_the_longest_prompt_is_decoded() -> None:
    plans = schedule(window=512, context=4096, chunk=2048, states=[cache(2559)])
    assert plans.longest == 2051 and plans.decodes == ((508, 516), (2555, 2563)) and plans.not_reached == ()
    assert text_length(window=512, context=4096, chunk=2048) == 2563


def test_what_the_context_does_not_reach_is_said() -> None:
    plans = schedule(window=512, context=2560, chunk=2048, states=[cache(2559)])
    assert plans.not_reached == ("decoding over the wrap of a ring of 2,559 slots: the context ends before it",)
    missed = schedule(window=512, context=256, chunk=256, states=[cache(767)]).not_reached
    assert "decoding over the edge of the window of 512: the context ends before it" in missed
    assert "a prompt of 513: the context ends before it" in missed


def test_a_tie_is_far_smaller_than_a_difference_of_the_largest_logits() -> None:
    for bound in (INT8, BFLOAT16):
        assert judge("decode", passing_but(gap=[0.03 * 10]), bound) == []
        assert any("no ties" in line for line in judge("decode", passing_but(gap=[0.05 * 10]), bound))


def test_every_scheme_has_a_limit() -> None:
    for name in SCHEMES:
        limit = quantization_limit(name)
        assert (limit is None) == (name == "none") and (limit is None or limit in QUANTIZATION_LIMITS.values())
    assert quantization_limit("int8_block32:int4_block32") == QUANTIZATION_LIMITS["int4", 32]
    with pytest.raises(QuantizationError, match="int3"):
        quantization_limit("int3")


def test_a_context_without_room() -> None:
    with pytest.raises(ContextLengthError, match="--context"):
        schedule(window=16, context=1, chunk=1, states=[])


def test_defaults_cross_the_window_in_one_call() -> None:
    assert default_chunk(512, 4096) == 768
    assert default_chunk(512, 600) == 600
    assert default_context(512, 32_768) == 4096
    assert default_context(16, 512) == 128
    assert default_context(512, 1024) == 1024
