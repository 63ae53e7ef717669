"""The arithmetic of the report, with planted numbers."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import text
from benchmarks.contender import Setup
from benchmarks.contenders import BASELINE, CONTENDERS, DEFAULT
from benchmarks.report import Results, Row, Timing, median_seconds, perplexity_change, render, speed_ratio
from benchmarks.run import Entry, in_turns
from transom.zoo.tokenizer import Tokenizer


def row(name: str, prefill: list[float], decode: list[float], log_likelihoods: list[float]) -> Row:
    return Row(
        name=name,
        load_seconds=[1.0, 3.0, 2.0],
        timings={512: [Timing(*pair, 0.02) for pair in zip(prefill, decode, strict=True)]},
        weight_bytes=250_000_000,
        log_likelihoods=log_likelihoods,
    )


@pytest.fixture
def results() -> Results:
    ours = row("transom-int8", [1.0, 2.0, 4.0], [0.01, 0.02, 0.04], [-1.0, -2.0, -3.0])
    theirs = row(BASELINE, [2.0, 2.0, 2.0], [0.02, 0.02, 0.02], [-1.0, -2.0, -3.3])
    theirs.skipped[8192] = "skipped: over 120 s"
    missing = Row(name="transformers", note="not installed (transformers): pip install 'transom[bench]'")
    return Results(facts={"machine": "planted"}, lengths=[512, 8192], rows=[ours, theirs, missing])


def times(seconds: list[float], other_cpu: float | None = None) -> list[Timing]:
    return [Timing(value, value, other_cpu) for value in seconds]


def test_ratio_is_taken_round_by_round() -> None:
    # The medians alone would say 2 / 3 = 0.67.
    ratio = speed_ratio(times([1.0, 3.0, 10.0]), times([2.0, 1.0, 30.0]), "decode")
    assert ratio is not None
    assert [ratio.median, ratio.least, ratio.most] == pytest.approx([2.0, 1 / 3, 3.0])
    assert speed_ratio(times([1.0]), [], "prefill") is None


def test_a_disturbed_round_counts_for_nobody() -> None:
    # Seen on a busy machine: the baseline collapsed, which looked like a victory of 54 times.
    ours, theirs = times([0.017, 0.017, 0.05]), [*times([0.013, 0.013]), Timing(2.5, 2.5, 1.3)]
    ratio = speed_ratio(ours, theirs, "decode")
    assert ratio is not None and ratio.most == pytest.approx(0.013 / 0.017)
    assert median_seconds(theirs, "decode") == 0.013
    assert speed_ratio(times([0.05], 1.3), times([2.5], 1.3), "decode") is None


def test_disturbed_runs_say_so(results: Results) -> None:
    assert "No timing was disturbed" in render(results)
    results.rows[1].timings[512] = times([1.0, 1.0, 1.0], 1.3)
    page = render(results)
    assert "**Warning: 3 of 6 timings were disturbed" in page
    assert f"| {BASELINE} | 8.166 | disturbed | skipped: over 120 s |" in page
    assert "x, " not in page


def test_perplexity() -> None:
    assert row("a", [], [], [-1.0, -3.0]).perplexity == pytest.approx(math.exp(2))
    assert Row(name="a").perplexity is None


def test_perplexity_change_is_paired() -> None:
    theirs = [-1.0, -7.0, -2.0, -4.0]
    worse = [value - math.log(1.02) for value in theirs]
    change = perplexity_change(worse, theirs)
    assert change is not None
    # The same loss on every token leaves no doubt, however much the tokens differ.
    assert list(change) == pytest.approx([0.02, 0], abs=1e-12)
    assert perplexity_change(theirs, [-1.0]) is None
    change = perplexity_change([-1.0, -1.0], [-1.2, -0.8])
    assert change is not None
    assert list(change) == pytest.approx([0, 0.2])


def test_every_speed_stands_beside_its_perplexity(results: Results) -> None:
    page = render(results)
    assert "| transom-int8 | 7.389 | 256 (1.00x, 0.50 to 2.00) |  |" in page
    assert f"| {BASELINE} | 8.166 | 256 | skipped: over 120 s |" in page
    assert "| transom-int8 | 7.389 | 50.0 (1.00x, 0.50 to 2.00) |  |" in page
    assert "| transom-int8 | 7.389 | -9.52% ± 9.05% | 250.0 MB | 2.00 s |" in page
    assert "- transformers: not installed (transformers): pip install 'transom[bench]'" in page


def test_json_holds_the_rounds(results: Results) -> None:
    first = json.loads(json.dumps(results.to_json()))["contenders"][0]
    assert first["timings"]["512"][0] == {"prefill": 1.0, "decode": 0.01, "other_cpu": 0.02}
    assert first["perplexity"] == pytest.approx(math.exp(2))
    assert "log_likelihoods" not in first


def test_no_contender_always_follows_the_same() -> None:
    setup = Setup(artifacts="", context=1, threads=1)
    entries = [Entry(name, setup) for name in "abc"]
    assert ["".join(entry.row.name for entry in in_turns(entries, n)) for n in range(4)] == ["abc", "bca", "cab", "abc"]


def test_names() -> None:
    assert BASELINE in DEFAULT and set(DEFAULT) < set(CONTENDERS)


def test_text_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "read_text", lambda: "abc")
    tokenizer = Tokenizer.of_bytes(263)
    assert text.read_tokens(tokenizer, 3) == tokenizer.encode("ab")
    with pytest.raises(ValueError, match="4 tokens, 5 are wanted"):
        text.read_tokens(tokenizer, 5)
