"""float16, of the target `xla` and of encoders of images: islands where it does not do, and they are told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import transom
from tests.artifacts import CHUNK
from tests.conftest import WINDOW
from tests.export.targets import TABLES
from tests.faults.ranges import PLANTED_ENCODER, plant
from tests.images.sequences import sequence
from tests.tolerances import BFLOAT16_SOFT_TOKENS, FLOAT16_LOGITS
from transom import compiler
from transom.backends.reference.session import ReferenceSession
from transom.errors import RangeError
from transom.export.ranges import SMOOTH, trace_encoder_ranges
from transom.graphs.weight import Weight
from transom.passes.insert_observers import narrow_values
from transom.passes.targets import TARGETS
from transom.zoo.model import Model, load

LENGTH = 4 * WINDOW
TOWER = "vision_tower.encoder.layers"


def test_a_model_out_of_range_runs_in_float16(
    tiny: Model,
    text: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = plant(tiny)
    monkeypatch.setattr(compiler, "TOKENS", 2 * WINDOW)
    artifact = transom.compile(model, target="xla", dtype="float16", context=128, chunk=CHUNK, out=tmp_path / "model")
    assert {state.dtype for state in artifact.manifest.decode.states} == {"float16"}
    assert artifact.manifest.dtype == "float16"
    record = next(record for record in artifact.manifest.passes if record["name"] == "GuardRanges")
    assert any(note.startswith("layers.1.add.2 reaches") for note in record["notes"])
    expected = ReferenceSession(model.trace(), context=128, chunk=CHUNK).logits(text[: LENGTH + 2])
    session = transom.open(artifact.folder, threads=1)
    logits = np.concatenate((session.logits(text[:LENGTH]), [session.decode(t) for t in text[LENGTH : LENGTH + 2]]))
    assert np.abs(logits - expected).max() < FLOAT16_LOGITS
    # Layers, keys and values, kv heads, head dim, bytes, slots.
    assert session.cache_bytes()["local"] == 4 * 2 * 2 * 32 * 2 * WINDOW


@pytest.fixture(scope="module")
def seeing() -> Model:
    return load("gemma3-vision-tiny", images=True)


@pytest.mark.parametrize("is_planted", [False, True])
@pytest.mark.parametrize("target", [name for name in TABLES if "float16" in TARGETS[name].dtypes])
def test_an_encoder_out_of_range_runs_in_float16(
    seeing: Model, target: str, is_planted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plant(seeing, PLANTED_ENCODER) if is_planted else seeing
    monkeypatch.setattr(compiler, "TOKENS", 2 * WINDOW)
    artifact = transom.compile(model, target=target, dtype="float16", context=64, chunk=20, out=tmp_path / "model")
    (record,) = (one for one in artifact.manifest.passes if one["name"] == "encode_image: GuardRanges")
    wide = [note.partition(" reaches")[0] for note in record["notes"]]
    if is_planted:
        values = ("0.self_attn.matmul", "0.mlp.fc1.linear", "0.mlp.gelu", "1.add.2")
        assert {f"{TOWER}.{value}" for value in values} <= set(wide)
        assert not any("layer_norm" in name or "out_proj" in name for name in wide)
    else:
        assert wide == []
    image = sequence(model, "i")
    soft = transom.open(artifact.folder, threads=1).runtime.encode_image(image.pixels.numpy())
    difference = soft - image.soft[image.tokens < 0].numpy()
    assert np.sqrt(np.square(difference).mean()) < BFLOAT16_SOFT_TOKENS
    # The decoder has not seen what the encoder makes.
    assert any(line.startswith("decode: its ranges are measured on text") for line in artifact.manifest.not_done)


def test_an_encoder_whose_weight_is_out_of_range_is_refused(seeing: Model, tmp_path: Path) -> None:
    name = f"{TOWER}.1.mlp.fc2.weight"
    weights = {**seeing.weights, name: Weight.of(seeing.weights[name].read() * 1e8)}
    model = dataclasses.replace(seeing, weights=weights)
    with pytest.raises(RangeError, match=rf"the weight {name} reaches .*compute in bfloat16 or float32"):
        transom.compile(model, target="xla", dtype="float16", context=64, chunk=20, out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_ranges_of_an_encoder(seeing: Model) -> None:
    """Every narrow value of its graph, over all images; weights of the encoder, and no others."""
    half = seeing.trace(task="encode_image", dtype=torch.float16)
    steps: list[tuple[str, int, int]] = []
    ranges = trace_encoder_ranges(seeing, "encode_image", half=half, on_progress=lambda *step: steps.append(step))
    values = {value.name: value for value in ranges.values if value.op != "weight"}
    assert set(values) == set(narrow_values(half, torch.float16))
    count = len(SMOOTH) + 1
    add, fc1 = values[f"{TOWER}.1.add.2"], seeing.weights[f"{TOWER}.1.mlp.fc1.weight"]
    assert add.layer == 1 and add.observation.count == count * 16 * 16 * fc1.shape[1]
    assert {value.name for value in ranges.values if value.op == "weight"} == set(half.weights)
    assert [step for step in steps if step[0] == "ranges"] == [("ranges", done + 1, count) for done in range(count)]
    again = trace_encoder_ranges(seeing, "encode_image", half=half)
    assert again.largest() == ranges.largest()
    assert trace_encoder_ranges(seeing, "encode_image", half=half, seed=1).largest() != ranges.largest()
