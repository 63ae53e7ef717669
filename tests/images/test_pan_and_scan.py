"""Boxes and prompt text of Pan & Scan, beside those of transformers' processors."""

from __future__ import annotations

import types

import numpy as np
import pytest

from transom.images.pan_and_scan import SETTINGS, PanAndScan, boxes, prompt_text
from transom.images.resize import Box

GOLDEN = {
    (1000, 500): [(500, 500)] * 2,
    (1200, 1000): [(600, 1000)] * 2,
    (1190, 1000): [],
    (4000, 500): [(1000, 500)] * 4,
    (500, 1800): [(500, 450)] * 4,
    (1000, 300): [(334, 300), (334, 300), (332, 300)],
    (700, 256): [(350, 256)] * 2,
    (300, 200): [],
}
"""Width and height of images, and of the parts at ratio 1.2."""


def by_transformers(height: int, width: int, setting: PanAndScan) -> list[Box]:
    """The boxes that the processor of Gemma 3 cuts, from where in memory its views begin."""
    module = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    image = np.empty((1, height, width), np.uint8)
    views = module.Gemma3ImageProcessorPil().pan_and_scan(
        image=image,
        pan_and_scan_min_crop_size=setting.min_side,
        pan_and_scan_max_num_crops=setting.max_parts,
        pan_and_scan_min_ratio_to_activate=setting.min_ratio,
    )
    corners = [divmod(view.ctypes.data - image.ctypes.data, width) for view in views]
    return [
        Box(top, left, top + view.shape[1], left + view.shape[2])
        for (top, left), view in zip(corners, views, strict=True)
    ]


@pytest.mark.parametrize("name", ["hf", "google"])
def test_500_sizes_are_cut_as_transformers_cuts_them(name: str) -> None:
    setting = SETTINGS[name]
    assert setting is not None
    rng, cut = np.random.default_rng(0), set()
    for _ in range(500):
        height, width = (int(side) for side in np.exp(rng.uniform(np.log(100), np.log(8000), 2)))
        expected = by_transformers(height, width, setting)
        assert boxes(height, width, setting) == [Box(0, 0, height, width), *expected], (height, width)
        cut.add(len(expected))
    assert cut == {0, 2, 3, 4}


@pytest.mark.parametrize(("ratio", "name"), [(1.2, "hf"), (1.5, "google")])
def test_the_ratio_itself_is_cut(ratio: float, name: str) -> None:
    for height in range(440, 900, 10):
        assert len(boxes(height, round(height * ratio), SETTINGS[name])) == 3
        assert len(boxes(height, round(height * ratio) - 1, SETTINGS[name])) == 1


@pytest.mark.parametrize(("size", "parts"), GOLDEN.items())
def test_golden_parts(size: tuple[int, int], parts: list[tuple[int, int]]) -> None:
    width, height = size
    whole, *cut = boxes(height, width, SETTINGS["hf"])
    assert whole == Box(0, 0, height, width)
    assert [(box.right - box.left, box.bottom - box.top) for box in cut] == parts
    assert boxes(height, width, SETTINGS["off"]) == [whole]


def test_settings_differ_between_their_ratios() -> None:
    assert len(boxes(1000, 1200, SETTINGS["hf"])) == 3
    assert len(boxes(1000, 1200, SETTINGS["google"])) == 1


@pytest.mark.parametrize("parts", [0, 2, 3, 4])
def test_the_prompt_says_what_transformers_says(parts: int) -> None:
    module = pytest.importorskip("transformers.models.gemma3.processing_gemma3")
    image = "\n\n<start><soft><soft><end>\n\n"
    processor = types.SimpleNamespace(full_image_sequence=image)
    expected = module.Gemma3Processor.replace_image_token(processor, {"num_crops": [parts]}, 0)
    assert prompt_text(image, parts) == expected
