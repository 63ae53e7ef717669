"""Models that see images on the target `tensorrt`: the file's numbers on the CPU, its rings, and engines of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import transom
from tests.backends.tensorrt_double import ENCODER, ENGINE, VERSION, double
from tests.conftest import Cli
from tests.images.sequences import Sequence, sequence
from tests.tolerances import BFLOAT16_LOGITS_TENSORRT, BFLOAT16_SOFT_TOKENS
from transom.backends.artifact import MODEL_FILE, read_manifest
from transom.backends.prompt import Prompt
from transom.backends.session import Session
from transom.backends.tensorrt.builder import build_engine
from transom.backends.tensorrt.engines import EngineRecord
from transom.backends.tensorrt.library import find_library
from transom.backends.tensorrt.rings import Rings
from transom.backends.tensorrt.runtime import EngineRuntime
from transom.backends.tensorrt.sidecar import read_sidecar
from transom.errors import ArtifactError, SessionError, TargetError
from transom.export.onnx.emitter import Emitter
from transom.export.tensorrt import dialect
from transom.graphs import ops
from transom.graphs.node import Node
from transom.graphs.state import Port
from transom.zoo.model import Model, load

CHUNK, CONTEXT = 20, 256
"""A call holds an image of 16 tokens, and not two."""


@pytest.fixture(scope="module", params=["gemma3-vision-tiny", "gemma3-vision-tiny-wide"])
def model(request: pytest.FixtureRequest) -> Model:
    return load(request.param, images=True)


@pytest.fixture(scope="module")
def text(model: Model) -> Sequence:
    """Images behind texts and behind each other; in rings of either model's size, one would lie across the end."""
    return sequence(model, "tit" + "t" * 6 + "iit" + "t" * 12)


@pytest.fixture(scope="module")
def logits(model: Model, text: Sequence) -> NDArray[np.float32]:
    return text.logits(model)


@pytest.fixture(scope="module")
def compiled(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an artifact, each made once."""
    root = tmp_path_factory.mktemp("images")

    def make(dtype: str) -> Path:
        if not (root / dtype).exists():
            out = root / dtype
            transom.compile(model, target="tensorrt", dtype=dtype, chunk=CHUNK, context=CONTEXT, out=out)
        return root / dtype

    return make


def slots(model: Model) -> int:
    """Slots of a local layer."""
    window = model.config.longest_window
    assert window is not None
    return window + 2 * CHUNK - 2


def rms(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.sqrt(np.square(actual - expected).mean()))


def assert_close(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    # Every position by itself, so that none hides among the others.
    assert max(rms(*rows) for rows in zip(actual, expected, strict=True)) < BFLOAT16_LOGITS_TENSORRT


def test_every_position_whatever_the_calls(
    model: Model, text: Sequence, logits: NDArray[np.float32], compiled: Callable[[str], Path]
) -> None:
    """In bfloat16; the conformance suite does it in float16."""
    session, whole = transom.open(compiled("bfloat16"), threads=1), text.prompt()
    blocks = whole.blocks()
    assert any(first // slots(model) < (end - 1) // slots(model) for first, end in blocks)
    rows = list(session.feed(whole, wanted="all"))
    assert_close(np.concatenate(rows), logits)
    ends = np.cumsum([len(row) for row in rows])
    assert not any(first < end_of_call < end for first, end in blocks for end_of_call in ends)
    # One token a call, but for images.
    session.reset()
    low, single = 0, list[NDArray[np.float32]]()
    while low < len(whole):
        high = next((end for first, end in blocks if first == low), low + 1)
        soft = text.soft[low:high].numpy() if high > low + 1 else None
        single += session.feed(Prompt(tokens=whole.tokens[low:high], soft=soft), wanted="all")
        low = high
    assert_close(np.concatenate(single), logits)


def test_soft_tokens(text: Sequence, compiled: Callable[[str], Path]) -> None:
    session = transom.open(compiled("bfloat16"), threads=1)
    expected = text.soft[text.tokens < 0].reshape(len(text.pixels), -1, text.soft.shape[1])
    for image, soft in zip(text.pixels, expected, strict=True):
        actual = session.runtime.encode_image(image[None].numpy())
        assert actual.dtype == np.float32 and rms(actual, soft.numpy()) < BFLOAT16_SOFT_TOKENS


def test_bytes_of_caches(model: Model, text: Sequence, compiled: Callable[[str], Path]) -> None:
    session = transom.open(compiled("bfloat16"), threads=1)
    token = 2 * 2 * model.config.num_kv_heads * model.config.head_dim
    for tokens in (Prompt.of([5, 6, 7]), text.prompt()):
        session.reset()
        session.prefill(tokens)
        assert session.cache_bytes() == {"local": 4 * token * slots(model), "global": 2 * token * CONTEXT}


def test_images_seen_as_text_are_noticed(
    model: Model, text: Sequence, logits: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = dialect.TABLE[ops.ATTENTION]

    def without_until(emitter: Emitter, node: Node) -> Any:
        node.args = node.args[:4]
        return lower(emitter, node)

    monkeypatch.setitem(dialect.TABLE, ops.ATTENTION, without_until)
    transom.compile(model, target="tensorrt", chunk=CHUNK, context=CONTEXT, out=tmp_path / "a")
    rows = np.concatenate(list(transom.open(tmp_path / "a", threads=1).feed(text.prompt(), wanted="all")))
    first = int((text.tokens < 0).nonzero()[0])
    assert_close(rows[:first], logits[:first])
    assert rms(rows[first], logits[first]) > 3 * BFLOAT16_LOGITS_TENSORRT


def rings_keep_windows(window: int, chunk: int, slots: int, seed: int) -> bool:
    """Whether all that a token sees still stands where the rings say, in calls of random lengths."""
    draw = np.random.default_rng(seed)
    rings = Rings({f"slot_positions.{slots}": Port(axes=("slots",), dtype="int64", sizes=(slots,))})
    ring, start = np.full(slots, -1), 0
    for _ in range(300):
        count = int(draw.integers(1, chunk + 1))
        slot, positions = rings.place(start, count).values()
        assert 0 <= slot[0] <= slots - count
        ring[slot[0] : slot[0] + count] = np.arange(start, start + count)
        np.testing.assert_array_equal(positions, ring)
        if not np.isin(np.arange(max(0, start - window + 1), start + count), ring).all():
            return False
        start += count
    return True


@pytest.mark.parametrize(("window", "chunk"), [(16, 8), (16, 24), (5, 16), (64, 20), (8, 1)])
def test_rings_are_as_large_as_they_must_be(window: int, chunk: int) -> None:
    enough = window + 2 * chunk - 2
    assert all(rings_keep_windows(window, chunk, enough, seed) for seed in range(20))
    if chunk > 1:
        assert not all(rings_keep_windows(window, chunk, enough - 1, seed) for seed in range(20))


def test_rings_forget_what_is_fed_again() -> None:
    rings = Rings({"slot_positions.10": Port(axes=("slots",), dtype="int64", sizes=(10,))})
    for start, count, slot, positions in (
        (0, 6, 0, [0, 1, 2, 3, 4, 5, -1, -1, -1, -1]),
        (6, 5, 0, [6, 7, 8, 9, 10, 5, -1, -1, -1, -1]),
        (8, 2, 2, [6, 7, 8, 9, -1, 5, -1, -1, -1, -1]),
        (0, 1, 0, [0, *[-1] * 9]),
    ):
        given = rings.place(start, count)
        assert given["write_slot.10"].tolist() == [slot] and given["slot_positions.10"].tolist() == positions


def test_what_the_file_and_the_sidecar_say(model: Model, compiled: Callable[[str], Path]) -> None:
    folder, size = compiled("bfloat16"), slots(model)
    manifest, sidecar = read_manifest(folder), read_sidecar(folder)
    rings = {f"write_slot.{size}", f"slot_positions.{size}"}
    assert manifest.decode.inputs.keys() == {"tokens", "start", "logit_positions", "until", "soft"} | rings
    assert manifest.images == model.config.images and "slot_positions.S" in sidecar.calls
    width = model.config.hidden_size
    assert sidecar.profiles[0].inputs["soft"] == ((1, 1, width), (1, CHUNK, width), (1, CHUNK, width))
    assert sidecar.profiles[1].inputs["until"] == ((1,), (1,), (2,))
    for entry in manifest.entries.values():
        onnx.checker.check_model(folder / entry.payload, full_check=True)


@pytest.mark.parametrize("model", ["gemma3-vision-tiny"], indirect=True)
def test_text_alone_needs_none_of_it(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "a"
    manifest = transom.compile(model.text(), target="tensorrt", chunk=CHUNK, context=CONTEXT, out=out).manifest
    assert manifest.images is None and manifest.entries.keys() == {"decode"}
    given = {value.name for value in onnx.load(out / MODEL_FILE, load_external_data=False).graph.input}
    assert {name for name in given if not name.startswith("cache.")} == {"tokens", "start", "logit_positions"}
    ring = slots(model) - (CHUNK - 1)
    assert {state.slots for state in manifest.decode.states if state.window} == {ring}
    assert "no call may cross such a ring's end" in read_sidecar(out).calls
    session = transom.open(out, threads=1)
    ends = np.cumsum([len(rows) for rows in session.feed(list(range(5, 105)), wanted="all")])
    assert {*range(ring, 100, ring)} < {*ends.tolist()}, "cut where the ring ends"


def record(content: bytes, entry: str) -> EngineRecord:
    return EngineRecord(
        file=f"{entry}.engine", library="tensorrt", version=VERSION, compute=(89,), gpu="a GPU", portable=False,
        weight_streaming=False, bytes=len(content), seconds=1.0, sha256=hashlib.sha256(content).hexdigest(),
        entry=entry,
    )  # fmt: skip


def test_engines_are_given_what_the_file_is(text: Sequence, compiled: Callable[[str], Path]) -> None:
    """On a double that runs the artifact's files, on the very addresses that it is given."""
    folder = compiled("bfloat16")
    records = [record(ENGINE, "decode"), record(ENCODER, "encode_image")]
    for one, content in zip(records, (ENGINE, ENCODER), strict=True):
        (folder / one.file).write_bytes(content)
    manifest, library = read_manifest(folder), double(folder)[0]
    runtime = EngineRuntime(folder, manifest, records[0], library, device="cpu", encoder=records[1])
    session, file = Session(runtime, images=manifest.images), transom.open(folder, threads=1)
    actual, expected = (np.concatenate(list(one.feed(text.prompt(), wanted="all"))) for one in (session, file))
    np.testing.assert_array_equal(actual, expected)
    pixels = text.pixels[:1].numpy()
    np.testing.assert_array_equal(runtime.encode_image(pixels), file.runtime.encode_image(pixels))
    alone = EngineRuntime(folder, manifest, records[0], library, device="cpu")
    with pytest.raises(SessionError, match="no engine of encode_image is for this GPU: build it with transom build"):
        alone.encode_image(pixels)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("gemma3-vision-tiny", "bfloat16"), ("gemma3-vision-tiny", "float16"), ("gemma3-vision-tiny-wide", "bfloat16")],
    indirect=["model"],
)
def test_engines_build(dtype: str, model: Model, compiled: Callable[[str], Path], cli: Cli) -> None:
    """By TensorRT for RTX, without a GPU: one for each entry."""
    try:
        find_library(rtx=True)
    except TargetError as error:
        pytest.skip(str(error))
    folder = compiled(dtype)
    code, out, _ = cli("build", folder, "--rtx", "--cc", "89,120", "--json")
    told = json.loads(out)
    assert code == 0 and told["entry"] == "decode"
    assert [(one["entry"], one["file"]) for one in told["encoders"]] == [
        ("encode_image", "encode_image-tensorrt_rtx-sm89-sm120.engine")
    ]
    assert all((folder / one["file"]).stat().st_size == one["bytes"] for one in (told, *told["encoders"]))
    assert [one["entry"] for one in read_manifest(folder).details["engines"]] == ["decode", "encode_image"]
    with pytest.raises(ArtifactError, match="has no entry 'score', only decode, encode_image"):
        build_engine(folder, find_library(rtx=True), entry="score")
