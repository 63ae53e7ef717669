"""The `tensorrt` dialect on the tiny model: its numbers on the CPU, its file, and what it refuses.

The very file that engines are built from is run by ONNX Runtime, each result rounded to half precision.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

import transom
from tests.artifacts import CHUNK, Export
from tests.conftest import WINDOW, Cli
from tests.tolerances import BFLOAT16_LOGITS_TENSORRT, FLOAT16_LOGITS, FP8_ACTIVATIONS
from transom.backends.artifact import MODEL_FILE
from transom.backends.reference.session import ReferenceSession
from transom.backends.tensorrt.sidecar import SIDECAR, read_sidecar
from transom.errors import ArtifactError, QuantizationError, TargetError
from transom.export.tensorrt.verify.verify import verify
from transom.formats.schemes import scheme
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model, load

CONTEXT = 512
RING = WINDOW + CHUNK - 1
"""Slots of a local layer."""

LENGTH = 3 * RING + 19
"""Past three wraps."""

QUANTS = ("none", "int4_block32_bf16", "fp8_channel", "int4_channel:none")

Compiled = Callable[..., Path]


@pytest.fixture(scope="module")
def compiled(exported: Export) -> Compiled:
    """The folder of an artifact."""
    return lambda quant="none", dtype="bfloat16": exported("tensorrt", quant, dtype=dtype).folder


@pytest.fixture(scope="module")
def long_text() -> list[int]:
    return [7 + index * 37 % 500 for index in range(LENGTH)]


def reference(tiny: Model, quant: str, dtype: str) -> ReferenceSession:
    """The same graph, interpreted."""
    graph = tiny.trace(dtype=getattr(torch, dtype))
    graph, _ = pipeline("tensorrt", chunk=CHUNK, scheme=scheme(quant)).run(graph)
    return ReferenceSession(graph, context=CONTEXT, chunk=CHUNK)


def rms(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.sqrt(np.square(actual - expected).mean()))


@pytest.mark.parametrize("quant", QUANTS)
def test_logits_in_bfloat16(quant: str, compiled: Compiled, tiny: Model, long_text: list[int]) -> None:
    """Against the same graph, which rounds in the same places, and against float32 on the same weights."""
    logits = transom.open(compiled(quant), threads=1).logits(long_text)
    for dtype in ("bfloat16", "float32"):
        assert rms(logits, reference(tiny, quant, dtype).logits(long_text)) < BFLOAT16_LOGITS_TENSORRT, dtype


@pytest.mark.parametrize("quant", ["none", "int4_block32_bf16"])
def test_decode_across_three_wraps(quant: str, compiled: Compiled, tiny: Model, long_text: list[int]) -> None:
    session, expected = transom.open(compiled(quant), threads=1), reference(tiny, quant, "bfloat16").logits(long_text)
    rows = [session.prefill(long_text[:5]), *(session.decode(token) for token in long_text[5:])]
    assert rms(np.array(rows), expected[4:]) < BFLOAT16_LOGITS_TENSORRT
    assert rms(np.array(rows)[-RING:], expected[-RING:]) < BFLOAT16_LOGITS_TENSORRT


def test_float16(compiled: Compiled, tiny: Model, long_text: list[int]) -> None:
    session = transom.open(compiled(dtype="float16"), threads=1)
    expected = reference(tiny, "none", "float32").logits(long_text)
    assert np.abs(session.logits(long_text) - expected).max() < FLOAT16_LOGITS
    assert {array.dtype for _, array in session.runtime.state_arrays()} == {np.dtype(np.float16)}


def test_activations_of_8_bit_floats(compiled: Compiled, tiny: Model, long_text: list[int]) -> None:
    session = transom.open(compiled("fp8_channel_activations"), threads=1)
    expected = reference(tiny, "fp8_channel", "float32").logits(long_text)
    logits = session.logits(long_text)
    assert BFLOAT16_LOGITS_TENSORRT < rms(logits, expected) < FP8_ACTIVATIONS, (
        "activations are rounded, and not to nothing"
    )


@pytest.mark.parametrize("first", [1, WINDOW + 3, RING - 1, RING + 5])
def test_no_call_crosses_the_end_of_a_ring(first: int, compiled: Compiled, long_text: list[int]) -> None:
    """A prompt that goes on from anywhere is cut where rings end, and its numbers are those of one prompt."""
    session = transom.open(compiled(), threads=1)
    whole = session.logits(long_text)
    session.reset()
    session.prefill(long_text[:first])
    calls: list[tuple[int, int]] = []
    parts = []
    for part in session.feed(long_text[first:], wanted="all"):
        parts.append(part)
        calls.append((session.position - len(part), len(part)))
    assert all(start % RING + size <= RING and size <= CHUNK for start, size in calls)
    assert sum(size for _, size in calls) == LENGTH - first
    assert rms(np.concatenate(parts), whole[first:]) < BFLOAT16_LOGITS_TENSORRT


def test_a_chunk_is_cut_once_a_ring(compiled: Compiled, long_text: list[int]) -> None:
    session = transom.open(compiled(), threads=1)
    calls = [len(part) for part in session.feed(long_text, wanted="all")]
    assert calls == [CHUNK, WINDOW - 1] * 3 + [LENGTH - 3 * RING]


def test_bytes_of_caches(compiled: Compiled, tiny: Model, long_text: list[int]) -> None:
    """Local layers hold a ring, global ones the context, in two bytes a number; nothing grows."""
    session, slot = transom.open(compiled(), threads=1), 2 * 2 * 32 * 2
    sizes = {"local": 4 * RING * slot, "global": 2 * CONTEXT * slot}
    for count in (3, LENGTH):
        session.logits(long_text[:count])
        assert session.cache_bytes() == sizes
    assert {state.layer: state.slots for state in session.states} == dict.fromkeys((0, 1, 3, 4), RING) | dict.fromkeys(
        (2, 5), CONTEXT
    )


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1])
def test_a_window_that_is_off_by_one_is_noticed(
    window: int, compiled: Compiled, tiny: Model, long_text: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "planted"
    out.mkdir()
    for path in compiled().iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    model = onnx.load(out / MODEL_FILE, load_external_data=False)
    (greater,) = [node for node in model.graph.node if node.op_type == "Greater"]
    (edge,) = [node for node in model.graph.node if node.output[0] == greater.input[1]]
    (bound,) = [entry for entry in model.graph.initializer if entry.name == edge.input[1]]
    assert numpy_helper.to_array(bound) == WINDOW
    bound.CopyFrom(numpy_helper.from_array(np.array(window), bound.name))
    (out / MODEL_FILE).write_bytes(model.SerializeToString())
    expected = reference(tiny, "none", "bfloat16").logits(long_text)
    with pytest.raises(ArtifactError, match="sha256"):
        transom.open(out)
    logits = transom.open(out, threads=1, verify=False).logits(long_text)
    assert rms(logits, expected) > 3 * BFLOAT16_LOGITS_TENSORRT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quant", [*QUANTS, "fp8_channel_activations"])
def test_the_file_keeps_to_the_dialect(quant: str, dtype: str, compiled: Compiled) -> None:
    path = compiled(quant, dtype) / MODEL_FILE
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert verify(model) == []
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Attention"] == 6 and kinds["TensorScatter"] == 12
    masks = {node.input[3] for node in model.graph.node if node.op_type == "Attention"}
    assert len(masks) == 2, "one for local layers, one for global ones"
    dtypes = {TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT4, TensorProto.FLOAT8E4M3FN}
    wide = [entry for entry in model.graph.initializer if entry.data_type == TensorProto.FLOAT and len(entry.dims) == 2]
    assert all(entry.dims[0] == 1 for entry in wide), "matrices are narrow"
    assert {entry.data_type for entry in model.graph.initializer} <= dtypes | {TensorProto.FLOAT16}


def test_weights_are_as_small_as_their_scheme(compiled: Compiled) -> None:
    sizes = {quant: sum(path.stat().st_size for path in compiled(quant).glob("*.data")) for quant in QUANTS}
    numbers = 64 * 512 + 6 * (64 * 256 + 128 * 64 + 3 * 64 * 96)
    # Weights that are smaller than a page are padded to one.
    assert numbers * 2 < sizes["none"] < numbers * 2 + 60 * 4096
    assert numbers < sizes["fp8_channel"] < numbers + 80 * 4096
    assert numbers / 2 < sizes["int4_block32_bf16"] < numbers / 2 + 80 * 4096


def test_the_sidecar(compiled: Compiled) -> None:
    folder = compiled()
    sidecar = read_sidecar(folder)
    assert sidecar.aliases == {
        f"cache.{layer}.{kind}.out": f"cache.{layer}.{kind}" for layer in range(6) for kind in ("key", "value")
    }
    assert {state.sizes[0] for state in sidecar.states} == {1}
    assert [(state.window, state.slots) for state in sidecar.states if state.name.endswith("key")] == [
        (WINDOW, RING), (WINDOW, RING), (None, CONTEXT), (WINDOW, RING), (WINDOW, RING), (None, CONTEXT)
    ]  # fmt: skip
    prefill, decode = sidecar.profiles
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.inputs == {"tokens": ((1, 1), (1, CHUNK), (1, CHUNK)), "logit_positions": ((1,), (1,), (CHUNK,))}
    assert decode.inputs == {"tokens": ((1, 1), (1, 1), (1, 2)), "logit_positions": ((1,), (1,), (2,))}
    assert {"tensorrt", "tensorrt_rtx"} == set(sidecar.portability) and "slots" in sidecar.calls
    data = json.loads((folder / SIDECAR).read_text())
    assert data["version"] == 2 and data["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("quant", "dtype", "least"),
    [("none", "float16", 75), ("none", "bfloat16", 80), ("int4_block32_bf16", "bfloat16", 80)]
    + [("fp8_channel", dtype, 89) for dtype in ("bfloat16", "float16")],
)
def test_the_least_gpu(quant: str, dtype: str, least: int, compiled: Compiled) -> None:
    assert read_sidecar(compiled(quant, dtype)).least_sm == least


@pytest.mark.parametrize("damage", ["missing", "truncated", "newer", "without profiles"])
def test_a_damaged_sidecar(damage: str, compiled: Compiled, tmp_path: Path) -> None:
    text = (compiled() / SIDECAR).read_text()
    data = json.loads(text)
    if damage == "truncated":
        (tmp_path / SIDECAR).write_text(text[:100])
    elif damage == "newer":
        (tmp_path / SIDECAR).write_text(json.dumps(data | {"version": 3}))
    elif damage == "without profiles":
        (tmp_path / SIDECAR).write_text(json.dumps({key: data[key] for key in data if key != "profiles"}))
    with pytest.raises(ArtifactError, match=r"export the model again|matching transom"):
        read_sidecar(tmp_path)


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ("int8", "int8"),
        ("int4", "int8"),
        ("int4_block32:none", "positive scales"),
        ("fp8_e4m3:none", "one scale a row"),
        ("sfp8", "sfp8"),
        ("as_shipped", "int8"),
    ],
)
def test_schemes_that_tensorrt_cannot_hold(quant: str, reason: str, tiny: Model, tmp_path: Path) -> None:
    """They name those that it can."""
    with pytest.raises(TargetError, match=rf"{reason}.*choose none.*int4_block32_bf16 or fp8_channel"):
        transom.compile(tiny, target="tensorrt", quant=quant, out=tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_wide_scales_are_reported(compiled: Compiled) -> None:
    def not_done(quant: str) -> list[str]:
        return list(json.loads((compiled(quant) / "manifest.json").read_text())["not_done"])

    (line,) = not_done("int4_channel:none")
    assert "rounded to bfloat16" in line and "0.4%" in line
    assert not_done("int4_block32_bf16") == []
    assert not_done("fp8_channel_activations")[0].startswith("scales of activations were rounded")


def test_scales_that_vanish_are_refused(tmp_path: Path) -> None:
    """Float16 has no number for the scale of very small weights, and a scale of zero would silence them."""
    model = load("gemma3-tiny")
    weights = model.weights
    (name,) = [key for key in weights if key.endswith("layers.0.mlp.down_proj.weight")]
    small = weights[name].map_rows(lambda rows: rows * 1e-9)
    model = dataclasses.replace(model, weights={**weights, name: small})
    with pytest.raises(QuantizationError, match=r"not positive, too large or too small for torch.float16.*bfloat16"):
        transom.compile(
            model, target="tensorrt", quant="int4_block32_bf16:none", dtype="float16", context=64, out=tmp_path / "m"
        )
    assert not list(tmp_path.iterdir())


def test_float32_is_refused(tiny: Model, tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli(
        "export",
        "gemma3-tiny",
        "--weights",
        "random",
        "--target",
        "tensorrt",
        "--dtype",
        "float32",
        "-o",
        tmp_path / "m",
    )
    assert (code, out) == (2, "") and "bfloat16 or float16" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("chunk", [1, 5, WINDOW, CONTEXT])
def test_any_chunk(chunk: int, tiny: Model, long_text: list[int], tmp_path: Path) -> None:
    """A chunk of one decodes only; a chunk of the whole context is cut where the ring ends."""
    out = tmp_path / "model"
    transom.compile(tiny, target="tensorrt", chunk=chunk, context=CONTEXT, out=out)
    session = transom.open(out, threads=1)
    expected = reference(tiny, "none", "bfloat16").logits(long_text)
    ring = WINDOW + chunk - 1
    assert {state.slots for state in session.states if state.window} == {ring}
    assert rms(session.logits(long_text), expected) < BFLOAT16_LOGITS_TENSORRT
