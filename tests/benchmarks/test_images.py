"""The table of `benchmarks.images`."""

from __future__ import annotations

from benchmarks.images import model, table
from transom.zoo.architectures import preset


def test_the_encoder_is_that_of_the_released_sizes() -> None:
    config, released = model().config, preset("gemma3-4b")
    assert config.images is not None and released.images is not None
    assert (config.images.size, config.images.soft_tokens) == (released.images.size, released.images.soft_tokens)
    assert config.encoders["encode_image"] == released.encoders["encode_image"]


def test_the_page_has_a_line_for_every_contender() -> None:
    row = {"contender": "transom, none", "median": 70.0, "of_sdpa": 1.05, "of_eager": 2.0, "largest_difference": 2e-6}
    assert table([row]).splitlines()[-1] == "| transom, none | 70.0 | 1.05 | 2.00 | 2.0e-06 |"
