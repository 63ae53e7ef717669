"""The data and the table of `benchmarks.adapters`."""

from __future__ import annotations

import numpy as np

from benchmarks.adapters import CONTENDERS, digit_image, table


def test_shifted_digits_are_light_on_dark() -> None:
    normal, shifted = (
        np.asarray(digit_image(3, np.random.default_rng(0), shifted=shifted), np.float32) for shifted in (False, True)
    )
    assert normal.shape == (64, 64, 3) and np.median(normal) > 200 and np.median(shifted) < 55
    assert normal.min() < 80 and shifted.max() > 175


def test_the_page_has_a_line_for_every_contender() -> None:
    run = {"parameters": 4000, "seconds": 12.3, "shifted": {"loss": 0.5, "exact_match": 0.8}}
    runs = [{**run, "normal": {"loss": 0.25, "exact_match": exact}} for exact in (0.5, 0.7)]
    lines = table([{"contender": name, "runs": runs} for name in CONTENDERS]).splitlines()
    assert len(lines) == 9 + len(CONTENDERS)
    assert lines[-1] == "| full, both | 4,000 | 0.500 | 80% (80% to 80%) | 0.250 | 60% (50% to 70%) | 12 |"
