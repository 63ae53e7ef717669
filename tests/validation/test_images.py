"""`transom validate` of a model that sees images: its encoder, and prompts of text and images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import transom
from tests.conftest import Cli
from tests.export.test_images import window_on_both_sides, without_until
from transom.backends.onnxruntime.runtime import OnnxRuntime
from transom.backends.prompt import Prompt
from transom.errors import ConfigError, ImageError
from transom.graphs.images import Images
from transom.validation.images import image_cases, pictures
from transom.validation.tolerances import FLOAT32, SOFT_FLOAT32
from transom.validation.validate import validate_sources
from transom.zoo import gemma3_vision
from transom.zoo.layers import RMSNorm

NAME = "gemma3-vision-tiny"
IMAGES = Images(size=64, soft_tokens=16, begin_id=508, end_id=509, text_before="", text_after="")


def export(folder: Path) -> Path:
    transom.compile(transom.load(NAME, images=True), out=folder, chunk=24, context=128)
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of onnxruntime. It gets certificates, and is otherwise left as it is."""
    return export(tmp_path_factory.mktemp("images") / "a")


def test_every_target_and_its_certificate(cli: Cli, tmp_path: Path) -> None:
    names = ["reference", "onnx", "xla", "tvm", "tensorrt"]
    options = ("--targets", ",".join(names), "--threads", 1, "--out", tmp_path / "out", "--no-layers")
    written = ("--json", tmp_path / "v.json", "--html", tmp_path / "v.html")
    code, out, err = cli("validate", NAME, *options, *written)
    assert code == 0, err + out
    assert "Soft tokens of 3 images" in out
    data = json.loads((tmp_path / "v.json").read_text())
    assert len(data["images"]) == 3 and len({image["sha256"] for image in data["images"]}) == 3
    for name in names:
        images = data["targets"][name]["images"]
        assert len(images["encoded"]) == 3 and not any(one["pixels_different"] for one in images["encoded"])
        cases = {run["case"] for run in images["runs"]}
        assert {"one image", "two images side by side", "images among text"} < cases
        assert any("window's edge" in case for case in cases) and any("wrap of a ring" in case for case in cases)
        assert {run["kind"] for run in images["runs"]} == {"prefill", "decode"}
        assert {1, 16, 17, 24} <= {run["step"] for run in images["runs"]}
        if name != "tensorrt":
            assert images["soft_max_rel"] < SOFT_FLOAT32.relative and images["max_rel"] < FLOAT32.relative
        if name != "reference":
            certificate = json.loads((tmp_path / "out" / name / "validation.json").read_text())
            assert certificate["result"]["images"] == images and certificate["images"] == data["images"]
    page = (tmp_path / "v.html").read_text()
    assert page.count("Prompts with images, each from empty caches") == 5 and "drawn image 3 (81 x 49)" in page


def transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft tokens stand column by column."""
    honest = OnnxRuntime.encode_image

    def spoilt(self: OnnxRuntime, pixels: Any) -> Any:
        soft = honest(self, pixels)
        return soft.reshape(4, 4, -1).swapaxes(0, 1).reshape(soft.shape)

    monkeypatch.setattr(OnnxRuntime, "encode_image", spoilt)


def without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of soft tokens multiplies with w, not with 1 + w."""
    honest = gemma3_vision.Projector.__init__

    def spoilt(self: gemma3_vision.Projector, config: gemma3_vision.Gemma3VisionConfig) -> None:
        honest(self, config)
        self.mm_soft_emb_norm = RMSNorm(config.vision.hidden_size, config.vision.norm_eps, offset=0.0)

    monkeypatch.setattr(gemma3_vision.Projector, "__init__", spoilt)


def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls end within images, whose tokens see no further than their call."""
    part = Prompt.part
    monkeypatch.setattr("transom.backends.session._before_block", lambda blocks, low, high: high)
    monkeypatch.setattr(Prompt, "part", lambda self, *place: part(self.before(place[1]), *place))


def other_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value in the corner is not the rule's."""
    honest = OnnxRuntime.pixels

    def spoilt(self: OnnxRuntime, *args: Any) -> Any:
        values = honest(self, *args).copy()
        values[..., -1, -1] = np.nan
        return values

    monkeypatch.setattr(OnnxRuntime, "pixels", spoilt)


IN_THE_EXPORT: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    without_until: "one image, in calls of 24: logits differ from position 4 on",
    window_on_both_sides: "one image, in calls of 24: logits differ from position 4 on",
    without_one: "soft tokens differ from number 0 on",
}
AT_RUN_TIME: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    transposed: "soft tokens differ from number 1 on",
    cut: "two images side by side, in calls of 24: logits differ",
    other_pixels: "3 of 12,288 pixel values are not those of the rule",
}


@pytest.mark.parametrize("fault", [*IN_THE_EXPORT, *AT_RUN_TIME], ids=lambda fault: fault.__name__)
def test_a_fault_fails(
    artifact: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    if fault in IN_THE_EXPORT:
        with monkeypatch.context() as patched:
            fault(patched)
            artifact = export(tmp_path / "a")
    else:
        fault(monkeypatch)
    code, out, _ = cli("validate", artifact, "--threads", 1)
    assert code == 1 and "FAIL" in out
    assert {**IN_THE_EXPORT, **AT_RUN_TIME}[fault] in " ".join(out.split())
    # Text is as right as it was.
    assert cli("validate", artifact, "--threads", 1, "--no-vision")[0] == 0


def test_a_runtime_that_fails_on_images_keeps_what_the_text_gave(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: OnnxRuntime, pixels: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(OnnxRuntime, "encode_image", broken)
    (result,) = validate_sources(artifact, threads=1).targets.values()
    assert result.failures == ("could not run images: RuntimeError: no memory",)
    assert result.images is None and result.prefills and result.first_divergence is None


def test_a_quantised_encoder_is_held_against_its_own_numbers() -> None:
    (result,) = validate_sources(NAME, targets=["reference"], quant="int4", threads=1).targets.values()
    assert result.passed and result.images is not None
    assert result.images.worst_soft("max_rel") < SOFT_FLOAT32.relative


def test_images_of_ones_own(artifact: Path, cli: Cli, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="the images extra is not installed")
    image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    code, out, err = cli("validate", artifact, "--threads", 1, "--image", tmp_path / "red.png", "--json", "-")
    assert code == 0, err + out
    assert [one["name"] for one in json.loads(out)["images"]] == [f"{tmp_path / 'red.png'} (40 x 30)"]
    with pytest.raises(ImageError, match="cannot be read"):
        validate_sources(artifact, images=[tmp_path / "none.png"])


def test_options_that_do_nothing_are_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gemma3-tiny sees no images: leave out --image"):
        validate_sources("gemma3-tiny", targets=["reference"], images=[tmp_path / "a.png"])
    with pytest.raises(ConfigError, match="drop --no-vision"):
        validate_sources(artifact, vision=False, images=[tmp_path / "a.png"])
    with pytest.raises(ConfigError, match=r"belongs to a \.gguf file"):
        validate_sources(artifact, mmproj=tmp_path / "mmproj.gguf")


def test_drawn_images_tell_places_apart() -> None:
    """No soft token's part of an image looks like another's."""
    for picture in pictures(IMAGES):
        parts = torch.nn.functional.avg_pool2d(torch.from_numpy(picture.pixels), 16).flatten(2)[0].T
        assert torch.cdist(parts, parts).fill_diagonal_(1).min() > 0.01
    assert pictures(IMAGES)[0].to_json() == pictures(IMAGES)[0].to_json() != pictures(IMAGES, seed=1)[0].to_json()


@pytest.mark.parametrize(("window", "slots", "chunk"), [(8, 8, 24), (8, 31, 24), (24, 94, 36), (1024, 2559, 1536)])
def test_cases_reach_where_they_say(window: int, slots: int, chunk: int) -> None:
    cases, missed = image_cases(IMAGES, window=window, rings=[slots], chunk=chunk, context=10_000)
    assert missed == []
    named = {case.name.split(" of a ring")[0]: case for case in cases}
    edge = named["an image across the window's edge"].pieces[0]
    assert edge is not None and (edge + 1 < window < edge + 17 or edge == 1)
    across = named["an image across the wrap"].pieces[0]
    assert across is not None and (across + 1) // slots < (across + 16) // slots
    decoding = named["decoding behind an image over the wrap"]
    assert decoding.pieces[0] is not None and decoding.pieces[0] > 0
    assert (decoding.length(IMAGES) - decoding.decoded) // slots < (decoding.length(IMAGES) - 1) // slots
    # All but the first lie within a context that is too short for the last.
    short, missed = image_cases(IMAGES, window=window, rings=[slots], chunk=chunk, context=20)
    assert short == [] and len(missed) == len(cases) and "the context ends before it" in missed[0]
