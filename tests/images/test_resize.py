"""Pixels in numpy and as an ONNX graph, in every bit those of the kernel that torchvision calls for uint8 images.

torchvision itself is not needed: `torchvision.transforms.v2.functional.resize` of a uint8 image is
`torch.nn.functional.interpolate` of it, on every CPU where torchvision does not choose the path of floats.
"""

from __future__ import annotations

import functools
import importlib.util
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from transom.errors import ImageError
from transom.export.onnx.preprocess import preprocessing_model
from transom.images.decode import read_image
from transom.images.resize import Box, PixelSpec, block_size, pixels, resize

SPEC = PixelSpec(size=896)
IMAGENET = PixelSpec(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

Preprocess = Callable[[NDArray[np.uint8], Box, PixelSpec], NDArray[np.float32]]


@functools.cache
def _session(spec: PixelSpec) -> onnxruntime.InferenceSession:
    model = preprocessing_model(spec)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def by_graph(image: NDArray[np.uint8], box: Box, spec: PixelSpec) -> NDArray[np.float32]:
    (result,) = _session(spec).run(None, {"image": image, "box": np.array(box)})
    assert isinstance(result, np.ndarray)
    return result


def by_torch(image: NDArray[np.uint8], box: Box, spec: PixelSpec) -> NDArray[np.float32]:
    """As Hugging Face's processor: a crop, resized as uint8, then mean and std scaled to uint8 values."""
    cropped = torch.from_numpy(image[box.top : box.bottom, box.left : box.right].copy()).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(cropped, (spec.size, spec.size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] * 255.0 for values in (spec.mean, spec.std))
    return ((resized.float() - mean) / std).numpy()


def bits_differ(left: NDArray[np.float32], right: NDArray[np.float32]) -> int:
    """How many of two arrays' values differ in any bit."""
    assert left.dtype == right.dtype == np.float32 and left.shape == right.shape
    return int(np.count_nonzero(left.view(np.uint32) != right.view(np.uint32)))


def whole(image: NDArray[np.uint8]) -> Box:
    return Box(0, 0, *image.shape[:2])


def noise(height: int, width: int) -> NDArray[np.uint8]:
    """Values that take every step between neighbours, extremes more often than others."""
    rng = np.random.default_rng(height * 65_537 + width)
    return np.clip(rng.integers(-128, 384, (height, width, 3), dtype=np.int16), 0, 255).astype(np.uint8)


def photos() -> list[Any]:
    """The photos that scikit-image's package holds, which is not imported."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        return [pytest.param(None, marks=pytest.mark.skip(reason="scikit-image is not installed"))]
    assert package.origin is not None
    files = sorted(path for path in Path(package.origin).parent.glob("data/*") if path.suffix in (".png", ".jpg"))
    return [pytest.param(path, id=path.name) for path in files]


@pytest.mark.parametrize("preprocess", [pixels, by_graph])
@pytest.mark.parametrize("path", photos())
def test_photos(path: Path, preprocess: Preprocess) -> None:
    image = read_image(path)
    assert bits_differ(preprocess(image, whole(image), SPEC), by_torch(image, whole(image), SPEC)) == 0


@pytest.mark.parametrize("preprocess", [pixels, by_graph])
@pytest.mark.parametrize(
    ("width", "height"),
    [
        (1, 1),
        (2, 3),
        (895, 897),
        (896, 896),
        (897, 895),
        (3584, 7),
        (10_000, 20),
        (20, 10_000),
        (65_535, 2),
        (3264, 2448),
    ],
)
def test_extreme_sizes(width: int, height: int, preprocess: Preprocess) -> None:
    image = noise(height, width)
    assert bits_differ(preprocess(image, whole(image), SPEC), by_torch(image, whole(image), SPEC)) == 0


@pytest.mark.parametrize("preprocess", [pixels, by_graph])
@pytest.mark.parametrize("spec", [IMAGENET, PixelSpec(size=378), PixelSpec(size=47), PixelSpec(size=1)])
def test_other_sizes_means_and_stds(spec: PixelSpec, preprocess: Preprocess) -> None:
    image, box = noise(301, 533), Box(17, 2, 300, 411)
    assert bits_differ(preprocess(image, box, spec), by_torch(image, box, spec)) == 0


@given(data=st.data())
def test_any_box_of_any_image(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 400))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = Box(top, left, data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width)))
    image, spec = noise(height, width), PixelSpec(size=96)
    expected = by_torch(image, box, spec)
    assert bits_differ(pixels(image, box, spec), expected) == 0
    assert bits_differ(by_graph(image, box, spec), expected) == 0


def test_blocks_divide_every_size() -> None:
    assert [block_size(size) for size in (896, 224, 384, 378, 47, 1)] == [32, 32, 32, 27, 1, 1]


@pytest.mark.parametrize(("width", "height"), [(3264, 2448), (10_000, 20), (20, 10_000)])
def test_memory_is_that_of_blocks(width: int, height: int) -> None:
    """One matrix of all weights would be 72 MB for 10,000 columns, and an 8 MP image in float64 192 MB."""
    image = noise(height, width)
    tracemalloc.start()
    resize(image, whole(image), 896)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("box", [Box(0, 0, 4, 7), Box(0, 0, 5, 6), Box(-1, 0, 4, 6), Box(2, 0, 2, 6), Box(0, 3, 4, 1)])
def test_a_box_outside_the_image_is_refused(box: Box) -> None:
    with pytest.raises(
        ImageError, match=r"Box\(.*\) is no part of an image of 4 rows and 6 columns: choose one inside"
    ):
        pixels(noise(4, 6), box, SPEC)


@pytest.mark.parametrize("image", [np.zeros((4, 6, 4), np.uint8), np.zeros((4, 6, 3)), np.zeros((4, 6), np.uint8)])
def test_other_arrays_are_refused(image: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match=r"expected uint8 \[height, width, 3\]: convert it"):
        pixels(image, Box(0, 0, 4, 6), SPEC)
