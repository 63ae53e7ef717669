"""What exporters do of models that see images, beside the numbers, which the conformance suite has: quantised encoders,
faults of lowerings, manifests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

import transom
from benchmarks import images as benchmark
from tests.case import run_graph
from tests.export.targets import TABLES
from tests.images.sequences import Sequence, sequence
from tests.tolerances import FP32_LOGITS
from transom.backends.artifact import read_manifest
from transom.errors import ContextLengthError
from transom.export.onnx import images, onnxruntime, rings
from transom.export.onnx.emitter import Emitter
from transom.export.onnx.nodes import values_read
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.node import Node, is_node
from transom.passes.pipelines import pipeline
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.model import Model, load

CHUNK = 20
"""Holds an image of 16 tokens, and not two."""
BEFORE_WRITES = ("xla", "tvm")
"""Targets whose every attention comes before the writes, so that a window of slots is enough for any chunk."""


@pytest.fixture(scope="module", params=["gemma3-vision-tiny", "gemma3-vision-tiny-wide"])
def model(request: pytest.FixtureRequest) -> Model:
    return load(request.param, images=True)


@pytest.fixture(scope="module")
def text(model: Model) -> Sequence:
    """Images behind texts and behind each other, and text far past the wide window."""
    return sequence(model, "tit" + "t" * 9 + "iit" + "t" * 12)


@pytest.fixture(scope="module")
def logits(model: Model, text: Sequence) -> NDArray[np.float32]:
    return text.logits(model)


@pytest.mark.parametrize("target", ["onnxruntime", "onnx", *BEFORE_WRITES])
def test_caches_are_those_of_a_text_model(target: str) -> None:
    model = load("gemma3-vision-tiny", images=True)
    passes = pipeline(target, chunk=CHUNK, scheme=scheme("none"))
    seeing, text = (passes.run(one.trace())[0].states for one in (model, model.text()))
    assert seeing == text
    window = model.config.longest_window
    assert window is not None
    slots = window if target in BEFORE_WRITES else window + CHUNK - 1
    assert {state.slots for state in seeing.values() if state.window is not None} == {slots}


@pytest.mark.parametrize(("target", "quant"), [("xla", "int8"), ("tvm", "int4")])
def test_an_encoder_is_quantised(target: str, quant: str, tmp_path: Path) -> None:
    """Each format's lowering to each target is shown by operation."""
    if target not in TABLES:
        pytest.skip(f"the compiler of {target} is not installed")
    model = load("gemma3-vision-tiny", images=True)
    text = sequence(model, "i")
    manifest = transom.compile(model, target=target, quant=quant, out=tmp_path / "a", chunk=CHUNK, context=64).manifest
    assert sum("vision_tower" in one["weight"] for one in manifest.conversions) == 6 * 2
    encoder, _ = pipeline(target, chunk=CHUNK, scheme=scheme(quant)).run(model.trace(task="encode_image"))
    (soft,) = run_graph(encoder, text.pixels[:1])
    actual = transom.open(tmp_path / "a").runtime.encode_image(text.pixels[:1].numpy())
    assert np.abs(actual - soft[0].numpy()).max() < FP32_LOGITS


def first_error(folder: Path, text: Sequence, logits: NDArray[np.float32]) -> int | None:
    """The first position whose logits are wrong."""
    rows = np.concatenate(list(transom.open(folder).feed(text.prompt(), wanted="all")))
    wrong = np.abs(rows - logits).max(1) > FP32_LOGITS
    return int(wrong.argmax()) if wrong.any() else None


def without_until(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are seen as text."""
    lower = onnxruntime.TABLE[ops.ATTEND]

    def spoilt(emitter: Emitter, node: Node) -> Any:
        node.args = node.args[:6]
        return lower(emitter, node)

    monkeypatch.setitem(onnxruntime.TABLE, ops.ATTEND, spoilt)


def window_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local layer's window bounds how far ahead a token sees, too."""
    seen = rings.seen

    def spoilt(emitter: Emitter, keys: str, positions: str, mask: ops.Mask, until: str | None) -> str:
        right = seen(emitter, keys, positions, mask, until)
        if not mask.window:
            return right
        queries = emitter.op("Unsqueeze", positions, emitter.constant(np.array([1])))
        edge = emitter.op("Add", queries, emitter.constant(np.array(mask.window)))
        return str(emitter.op("And", right, emitter.op("Less", keys, edge)))

    monkeypatch.setattr(images, "seen", spoilt)


FAULTS = (without_until, window_on_both_sides)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_noticed_where_it_is(
    model: Model,
    text: Sequence,
    logits: NDArray[np.float32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    transom.compile(model, out=tmp_path / "a", chunk=CHUNK, context=256)
    window, image = model.config.longest_window, int((text.tokens < 0).nonzero()[0])
    assert window is not None
    if fault is window_on_both_sides and window > 16:  # no image reaches so far
        assert first_error(tmp_path / "a", text, logits) is None
    else:
        assert first_error(tmp_path / "a", text, logits) == image


@pytest.mark.parametrize(
    ("model", "target"), [("gemma3-vision-tiny", "xla"), ("gemma3-vision-tiny-wide", "tvm")], indirect=["model"]
)
def test_images_seen_as_text_are_noticed(
    model: Model,
    text: Sequence,
    logits: NDArray[np.float32],
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if target not in TABLES:
        pytest.skip(f"the compiler of {target} is not installed")
    lower = TABLES[target][ops.ATTEND]

    def spoilt(*args: Any, **options: Any) -> Any:
        if not is_node(args[-1]):
            return lower(*args[:6], **options)
        args[-1].args = args[-1].args[:6]
        return lower(*args, **options)

    monkeypatch.setitem(TABLES[target], ops.ATTEND, spoilt)
    transom.compile(model, target=target, out=tmp_path / "a", chunk=CHUNK, context=256)
    assert first_error(tmp_path / "a", text, logits) == int((text.tokens < 0).nonzero()[0])


def test_a_chunk_that_cuts_an_image_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ContextLengthError, match=r"cannot hold the 16 of an image.*--chunk 16 or more"):
        transom.compile(model, out=tmp_path / "a", chunk=15)
    assert not (tmp_path / "a").exists()
    manifest = transom.compile(model.text(), out=tmp_path / "a", chunk=15).manifest
    assert manifest.images is None and set(manifest.entries) == {"decode"} and "soft" not in manifest.decode.inputs


def test_what_the_manifest_says(model: Model, tmp_path: Path) -> None:
    transom.compile(model, out=tmp_path / "a", chunk=CHUNK)
    manifest = read_manifest(tmp_path / "a")
    assert manifest.images == model.config.images and set(manifest.entries) == {"decode", "encode_image"}
    port = manifest.entries["encode_image"].inputs["pixels"]
    assert port.sizes == (1, 3, 64, 64) and port.dtype == "float32"
    assert manifest.decode.inputs["soft"].sizes == (None, None, 64) and manifest.soft_width == 64


def test_its_text_is_validated_and_bisected(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """An artifact is held against the model that its manifest names, with text; a text artifact against either."""
    assert cli("export", "gemma3-vision-tiny", "-o", tmp_path / "a", "--chunk", CHUNK, "--taps")[0] == 0
    assert cli("export", "gemma3-vision-tiny", "-o", tmp_path / "b", "--chunk", CHUNK, "--no-vision")[0] == 0
    for folder in ("a", "b"):
        code, out, err = cli("validate", tmp_path / folder)
        assert code == 0, err + out
    code, out, err = cli("validate", "gemma3-vision-tiny", tmp_path / "a", "--targets", "reference")
    assert code == 0, err + out
    code, out, err = cli("bisect", tmp_path / "a", "reference")
    assert code == 0, err + out


@pytest.mark.parametrize("target", ["onnxruntime", "onnx"])
def test_no_value_is_made_in_vain(tmp_path: Path, target: str) -> None:
    """A runtime keeps what nothing reads until the run has ended: a full-size encoder took 1.5 GB more."""
    transom.compile(load("gemma3-vision-tiny", images=True), target=target, out=tmp_path / "a", chunk=CHUNK)
    for file in ("model.onnx", "encode_image.onnx"):
        graph = onnx.load(tmp_path / "a" / file, load_external_data=False).graph
        read = {value.name for value in graph.output}.union(*map(values_read, graph.node))
        assert [node.name for node in graph.node if not read.intersection(node.output)] == []


@pytest.mark.large
@pytest.mark.parametrize("target", ["onnxruntime", "xla"])
def test_the_encoder_of_the_released_sizes(target: str, tmp_path: Path) -> None:
    """417 million random weights, against transformers."""
    model = benchmark.model()
    write_checkpoint(tmp_path / "model", model.config, model.weights, dtype=torch.float32)
    pixels = np.random.default_rng(0).random((1, 3, 896, 896), np.float32) * 2 - 1
    expected = benchmark.theirs(tmp_path / "model", "sdpa")(pixels)
    transom.compile(model, target=target, out=tmp_path / "a", chunk=256)
    soft = transom.open(tmp_path / "a").runtime.encode_image(pixels)
    assert soft.shape == expected.shape == (256, model.config.hidden_size)
    assert np.abs(soft - expected).max() < FP32_LOGITS
