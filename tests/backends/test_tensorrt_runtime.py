"""The runtime of engines, on a double that computes; and on a GPU, where one is."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import transom
from tests.artifacts import Export
from tests.backends import tensorrt_double
from tests.backends.tensorrt_double import ENGINE, VERSION, double
from tests.tolerances import BFLOAT16_LOGITS_TENSORRT
from transom.backends.artifact import Manifest, read_manifest, update_details
from transom.backends.session import Session
from transom.backends.tensorrt import opening
from transom.backends.tensorrt.builder import build_engine
from transom.backends.tensorrt.cpu import CpuRuntime
from transom.backends.tensorrt.engines import EngineRecord, note_engine
from transom.backends.tensorrt.library import find_library
from transom.backends.tensorrt.runtime import EngineRuntime
from transom.errors import ArtifactError, ContextLengthError, SessionError, TargetError

CHUNK, CONTEXT, RING = 20, 128, 35
TEXT = [7 + index * 37 % 500 for index in range(3 * RING + 5)]


def record(**changes: Any) -> EngineRecord:
    given = {
        "file": "double.engine", "library": "tensorrt", "version": VERSION, "compute": (89,), "gpu": "a GPU",
        "portable": False, "weight_streaming": False, "bytes": len(ENGINE), "seconds": 1.0,
        "sha256": hashlib.sha256(ENGINE).hexdigest(),
    }  # fmt: skip
    return EngineRecord(**{**given, **changes})


@pytest.fixture(scope="module")
def folder(exported: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with an engine that only the double runs."""
    out = tmp_path_factory.mktemp("tensorrt") / "model"
    shutil.copytree(exported("tensorrt", chunk=CHUNK, context=CONTEXT).folder, out)
    (out / "double.engine").write_bytes(ENGINE)
    return out


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


def opened(folder: Path, manifest: Manifest, **changes: Any) -> tuple[Session, tensorrt_double.Calls]:
    library, calls = double(folder)
    return Session(EngineRuntime(folder, manifest, record(**changes), library, device="cpu")), calls


def test_the_numbers_are_those_of_the_file(folder: Path, manifest: Manifest) -> None:
    """Prefill in chunks longer than the window, then decode across three wraps, in caches that only torch holds."""
    session, calls = opened(folder, manifest)
    expected = transom.open(folder, threads=1).logits(TEXT)
    rows = [session.prefill(TEXT[:30]), *(session.decode(token) for token in TEXT[30:])]
    assert np.sqrt(np.square(np.array(rows) - expected[29:]).mean()) < BFLOAT16_LOGITS_TENSORRT
    np.testing.assert_array_equal(session.logits(TEXT), expected)
    assert {called for called, _ in calls.entries} == {
        "deserialize_cuda_engine", "set_optimization_profile_async", "set_input_shape", "set_tensor_address",
        "execute_async_v3",
    }  # fmt: skip


def test_caches_are_bound_in_place_once_and_kept(folder: Path, manifest: Manifest) -> None:
    session, calls = opened(folder, manifest)
    session.prefill(TEXT[:CHUNK])
    tensors = {state.name: array for state, array in session.runtime.state_arrays()}
    for name, tensor in tensors.items():
        addresses = {memory for given, memory in calls.of("set_tensor_address") if given in (name, f"{name}.out")}
        assert addresses == {tensor.data_ptr()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    session.decode(TEXT[CHUNK])
    again = {state.name: array for state, array in session.runtime.state_arrays()}
    assert all(again[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    assert all(not torch.equal(again[name], before[name]) for name in before), "every layer wrote its token"
    slot = 2 * 2 * 32 * 2
    assert session.cache_bytes() == {"local": 4 * RING * slot, "global": 2 * CONTEXT * slot}


def test_summaries_take_turns(tmp_path: Path) -> None:
    """An engine promises to write in place for rings only: what it makes of a summary stands elsewhere."""
    transom.compile(
        transom.load("mamba2-hybrid-tiny"), target="tensorrt", chunk=CHUNK, context=CONTEXT, out=tmp_path / "model"
    )
    (tmp_path / "model" / "double.engine").write_bytes(ENGINE)
    session, calls = opened(tmp_path / "model", read_manifest(tmp_path / "model"))
    other = transom.open(tmp_path / "model", threads=1)
    for _ in range(2):
        np.testing.assert_array_equal(session.logits(TEXT[:50]), other.logits(TEXT[:50]))
        np.testing.assert_array_equal(session.decode(TEXT[50]), other.decode(TEXT[50]))
    read, written = (
        [memory for name, memory in calls.of("set_tensor_address") if name == binding][-2:]
        for binding in ("cache.0.state", "cache.0.state.out")
    )
    assert read == written[::-1] and read[0] != read[1]
    assert session.cache_bytes()["summary"] == 2 * other.cache_bytes()["summary"]


def test_profiles_and_shapes(folder: Path, manifest: Manifest) -> None:
    """Prefill and decode each have their profile, which is chosen when it changes; no call crosses a ring's end."""
    session, calls = opened(folder, manifest)
    session.prefill(TEXT[:50])
    for token in TEXT[50:53]:
        session.decode(token)
    session.prefill(TEXT[53:90])
    assert [index for index, _ in calls.of("set_optimization_profile_async")] == [0, 1, 0]
    shapes = [shape for name, shape in calls.of("set_input_shape") if name == "tokens"]
    assert shapes == [(1, size) for size in (20, 15, 15, 1, 1, 1, 17, 20)]
    positions = [shape for name, shape in calls.of("set_input_shape") if name == "logit_positions"]
    assert set(positions) == {(1,)}, "never none, which engines do not take"
    assert {shape for name, shape in calls.of("set_input_shape") if name == "start"} == {()}


def test_reset_and_context(folder: Path, manifest: Manifest) -> None:
    session, _ = opened(folder, manifest)
    first = session.logits(TEXT[:30])
    np.testing.assert_array_equal(session.logits(TEXT[:30]), first)
    with pytest.raises(ContextLengthError, match="export with a larger --context"):
        session.prefill([5] * (CONTEXT + 1))
    assert list(session.generate(TEXT[:5], max_new_tokens=4)) == list(
        transom.open(folder, threads=1).generate(TEXT[:5], max_new_tokens=4)
    )


def test_an_engine_that_cannot_be_read(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    library, _ = double(folder)
    (folder / "other.engine").write_bytes(b"of another version")
    with pytest.raises(ArtifactError, match=r"cannot read other.engine, which TensorRT .* built: build it again"):
        EngineRuntime(folder, manifest, record(file="other.engine"), library, device="cpu")


def test_an_engine_that_would_copy_its_caches(folder: Path, manifest: Manifest) -> None:
    library, _ = double(folder, separate="cache.3.key.out")
    with pytest.raises(ArtifactError, match=r"does not write the state 'cache.3.key' in place"):
        EngineRuntime(folder, manifest, record(), library, device="cpu")


def test_a_call_that_the_engine_refuses(folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = opened(folder, manifest)
    session.prefill(TEXT[:3])
    monkeypatch.setattr(tensorrt_double.IExecutionContext, "execute_async_v3", lambda self, handle: False)
    with pytest.raises(SessionError, match="could not run, at position 3"):
        session.decode(5)
    with pytest.raises(SessionError, match="reset"):
        session.decode(5)


def test_streamed_weights(folder: Path, manifest: Manifest) -> None:
    for streams, budget in ((True, 12345), (False, 0)):
        runtime: Any = opened(folder, manifest, weight_streaming=streams)[0].runtime
        assert runtime._engine.engine.weight_streaming_budget_v2 == budget


# Which runtime opens.


def listed(folder: Path, *records: EngineRecord) -> Manifest:
    """The manifest with these engines, whose files exist."""
    update_details(folder, lambda details: details.update(engines=[]))
    for one in records:
        (folder / one.file).write_bytes(ENGINE)
        note_engine(folder, one)
    return read_manifest(folder)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.9, for as long as nobody computes on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def test_without_a_gpu_the_file_runs_on_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    session = transom.open(folder, threads=1)
    assert isinstance(session.runtime, CpuRuntime) and "torch finds no GPU" in session.note


RTX = {"file": "rtx.engine", "library": "tensorrt_rtx", "gpu": ""}


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "no engine was built: transom build"),
        ([record(**RTX, compute=(120,))], "no engine is for this GPU"),
        ([record(version="10.16.0")], "no engine is for this GPU"),
        ([record(gpu="another GPU")], "no engine is for this GPU"),
        ([record(sha256="0" * 64)], "no engine is for this GPU"),
        ([record(bytes=5)], "no engine is for this GPU"),
    ],
)
def test_without_a_fitting_engine(
    records: list[EngineRecord], reason: str, folder: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact still opens: on the CPU, and says why."""
    monkeypatch.setattr(opening, "find_library", lambda *, rtx: double(folder)[0])
    listed(folder, *records)
    session = transom.open(folder, threads=1)
    assert isinstance(session.runtime, CpuRuntime) and reason in session.note


def test_the_engines_that_fit(folder: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for this very GPU comes before one that is portable, and that before RTX's."""
    library = double(folder)[0]
    ours = {False: library, True: dataclasses.replace(library, name="tensorrt_rtx")}
    monkeypatch.setattr(opening, "find_library", lambda *, rtx: ours[rtx])
    own, portable = record(file="own.engine"), record(file="portable.engine", portable=True, gpu="another GPU")
    rtx = record(**RTX, compute=(80, 89))
    manifest = listed(folder, rtx, portable, record(file="other.engine", gpu="another GPU"), own)
    assert list(opening.candidates(folder, manifest)) == [(own, library), (portable, library), (rtx, ours[True])]


def test_an_engine_that_cannot_be_read_gives_way_to_the_next(
    folder: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_library", lambda *, rtx: double(folder)[0])
    spoilt = b"of another driver"
    bad = record(file="own.engine", bytes=len(spoilt), sha256=hashlib.sha256(spoilt).hexdigest())
    listed(folder, bad)
    (folder / "own.engine").write_bytes(spoilt)
    session = transom.open(folder, threads=1)
    assert isinstance(session.runtime, CpuRuntime) and "cannot read own.engine" in session.note


def test_which_gpus_an_engine_is_for() -> None:
    assert record(**RTX, compute=(89, 120)).fits(121, "any") and not record(**RTX, compute=(89,)).fits(90, "any")
    assert record(portable=True).fits(90, "any") and not record(portable=True).fits(75, "any")
    assert record().fits(89, "a GPU") and not record().fits(89, "another GPU") and record(gpu="").fits(89, "any")


# What the double stands for.


@pytest.mark.parametrize("name", ["Runtime", "ICudaEngine", "IExecutionContext"])
def test_the_double_has_the_real_signatures(name: str) -> None:
    """Names of the arguments, in order, of every method that sessions call; those that they leave out follow."""
    try:
        real = getattr(find_library(rtx=True).module, name)
    except TargetError as error:
        pytest.skip(str(error))
    ours = getattr(tensorrt_double, name)
    methods = [method for method, value in vars(ours).items() if inspect.isfunction(value) and method[0] != "_"]
    assert methods
    for method in methods:
        parameters = [
            parameter for parameter in inspect.signature(getattr(ours, method)).parameters if parameter != "self"
        ]
        documented = re.findall(rf"\b{method}\((self: [^)]*)\)", getattr(real, method).__doc__)
        signatures = [re.findall(r"(\w+): ", line)[1:] for line in documented]
        assert any(names[: len(parameters)] == parameters for names in signatures), (method, signatures)
    if name == "ICudaEngine":
        assert hasattr(real, "weight_streaming_budget_v2")


CALLED = {
    "Builder": {
        "create_network": ["flags"],
        "create_builder_config": [],
        "create_optimization_profile": [],
        "build_serialized_network": ["network", "config"],
        "build_serialized_network_to_stream": ["network", "config", "writer"],
    },
    "OnnxParser": {"parse_from_file": ["model"], "get_error": ["index"]},
    "IBuilderConfig": {
        "set_flag": ["flag"],
        "add_optimization_profile": ["profile"],
        "set_compute_capability": ["compute_capability", "index"],
    },
    "IOptimizationProfile": {"set_shape": ["input", "min", "opt", "max"]},
}
"""What the builder calls, with as many arguments."""


@pytest.mark.parametrize("name", CALLED)
def test_what_the_builder_calls_exists(name: str) -> None:
    try:
        module = find_library(rtx=True).module
    except TargetError as error:
        pytest.skip(str(error))
    for method, arguments in CALLED[name].items():
        documented = re.findall(rf"\b{method}\((self: [^)]*)\)", getattr(getattr(module, name), method).__doc__)
        signatures = [re.findall(r"(\w+): ", line)[1:] for line in documented]
        assert any(len(names) >= len(arguments) for names in signatures), (method, signatures)
    for attribute in ("num_compute_capabilities", "progress_monitor", "hardware_compatibility_level"):
        assert hasattr(module.IBuilderConfig, attribute)


def test_on_a_gpu(exported: Export, tmp_path: Path) -> None:
    """The one test of kernels: numbers, decode across wraps, caches in place."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    try:
        library = find_library()
    except TargetError as error:
        pytest.skip(str(error))
    out = Path(shutil.copytree(exported("tensorrt", chunk=CHUNK, context=CONTEXT).folder, tmp_path / "model"))
    build_engine(out, library)
    expected = Session(CpuRuntime(out, read_manifest(out), threads=1)).logits(TEXT)
    session: Session = transom.open(out)
    assert isinstance(session.runtime, EngineRuntime)
    rows = [session.prefill(TEXT[:30]), *(session.decode(token) for token in TEXT[30:])]
    assert np.sqrt(np.square(np.array(rows) - expected[29:]).mean()) < BFLOAT16_LOGITS_TENSORRT
