"""The target `xla` in float16: islands where float16 does not do, and they are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import transom
from tests.artifacts import CHUNK
from tests.conftest import WINDOW
from tests.faults.ranges import plant
from tests.tolerances import FLOAT16_LOGITS
from transom import compiler
from transom.backends.reference.session import ReferenceSession
from transom.zoo.model import Model

LENGTH = 4 * WINDOW


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
    found = np.concatenate((session.logits(text[:LENGTH]), [session.decode(t) for t in text[LENGTH : LENGTH + 2]]))
    assert np.abs(found - expected).max() < FLOAT16_LOGITS
    # Layers, keys and values, kv heads, head dim, bytes, slots.
    assert session.cache_bytes()["local"] == 4 * 2 * 2 * 32 * 2 * WINDOW
