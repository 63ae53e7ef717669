"""Sessions on TVM's runtime: caches, taps, threads, a process without torch or a compiler, and what they refuse."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import transom
from tests.artifacts import CHUNK, Export, Exported
from tests.conftest import WINDOW
from tests.tolerances import FP32_LOGITS
from transom.backends import session as session_module
from transom.backends.artifact import read_manifest
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.backends.tvm import library, machine
from transom.backends.tvm.artifact import LIBRARY, PARAMETERS
from transom.backends.tvm.runtime import TvmRuntime
from transom.errors import ArtifactError, ContextLengthError, TargetError
from transom.formats.schemes import scheme
from transom.passes.add_taps import AddTaps
from transom.passes.base import Pipeline
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model

pytest.importorskip("tvm")

PER_SLOT = 2 * 2 * 32 * 4
"""Bytes of keys and values of one slot of a layer of gemma3-tiny."""


@pytest.fixture(scope="module")
def artifact(exported: Export) -> Exported:
    return exported("tvm", "none")


def test_caches_are_as_large_as_they_must_be(
    artifact: Exported, text: list[int], text_logits: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "FIRST_SLOTS", 16)
    session = artifact.session()
    assert session.cache_bytes() == {"local": 0, "global": 0}
    sizes = []
    for position, token in enumerate(text):
        assert np.abs(session.decode(token) - text_logits[position]).max() < FP32_LOGITS, position
        sizes.append(session.cache_bytes())
    assert {size["local"] for size in sizes} == {4 * PER_SLOT * WINDOW}
    assert sorted({size["global"] // (2 * PER_SLOT) for size in sizes}) == [16, 32, 64, 128, 256]


def test_the_whole_context_and_no_more(artifact: Exported, text: list[int]) -> None:
    session = artifact.session()
    session.prefill((text * 4)[:512])
    with pytest.raises(ContextLengthError):
        session.decode(1)
    session.reset()
    assert session.prefill(text[:20]).shape == (512,)


def test_logits_are_the_callers_to_keep(artifact: Exported, text: list[int]) -> None:
    session = artifact.session()
    first = session.prefill(text[:CHUNK])
    kept = first.copy()
    for token in text[CHUNK:60]:
        session.decode(token)
    np.testing.assert_array_equal(first, kept)


def test_chunks_of_one_token(tiny: Model, tmp_path: Path, text: list[int], text_logits: NDArray[np.float32]) -> None:
    """Every call but the last one wants no logits at all."""
    transom.compile(tiny, target="tvm", chunk=1, context=64, out=tmp_path / "one")
    logits = transom.open(tmp_path / "one", threads=1).prefill(text[:40])
    assert np.abs(logits - text_logits[39]).max() < FP32_LOGITS


def test_taps(tiny: Model, tmp_path: Path, text: list[int]) -> None:
    transom.compile(tiny, target="tvm", chunk=CHUNK, before=[AddTaps()], out=tmp_path / "tapped")
    session = transom.open(tmp_path / "tapped", threads=1)
    passes = Pipeline([AddTaps(), *pipeline("tvm", chunk=CHUNK, scheme=scheme("none")).passes])
    graph, _ = passes.run(tiny.trace())
    reference = ReferenceSession(graph, context=512, chunk=CHUNK)
    assert len(graph.taps) > 50
    for ids in (text[:CHUNK], text[CHUNK : 2 * CHUNK], text[80:81]):
        session.prefill(ids)
        reference.prefill(ids)
        assert list(session.tapped) == [tap.name for tap in graph.taps]
        for name, expected in reference.tapped.items():
            assert session.tapped[name].shape == expected.shape, name
            assert np.abs(session.tapped[name] - expected).max() < FP32_LOGITS, name


def test_an_artifact_that_was_replaced(exported: Export, tmp_path: Path, text: list[int]) -> None:
    """The code of the first one is still loaded."""
    kept = []
    for quant in ("none", "int4"):
        pair = exported("tvm", quant)
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(pair.folder, tmp_path / "model")
        kept.append(transom.open(tmp_path / "model", threads=1))
        expected = pair.reference().logits(text[:20])
        assert np.abs(kept[-1].logits(text[:20]) - expected).max() < FP32_LOGITS, quant


def test_threads_give_the_same_numbers(artifact: Exported, text: list[int]) -> None:
    one, two = artifact.session(), transom.open(artifact.folder, threads=2)
    for tokens in (text[:80], text[80:81], text[81:90]):
        np.testing.assert_array_equal(one.prefill(tokens), two.prefill(tokens))
    np.testing.assert_array_equal(one.decode(text[90]), two.decode(text[90]))


def test_generating_needs_neither_torch_nor_a_compiler(artifact: Exported) -> None:
    program = (
        "import sys, transom\n"
        "session = transom.open(sys.argv[1], threads=1)\n"
        "print(len(list(session.generate('Hello', max_new_tokens=3, stop_ids=()))))\n"
        "print(sorted({'torch', 'tvm'} & set(sys.modules)))\n"
        "print('libtvm_compiler' in open('/proc/self/maps').read() if sys.platform == 'linux' else False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(artifact.folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:3] == ["3", "[]", "False"], done.stderr


def test_the_runtime_can_stand_elsewhere(artifact: Exported, tmp_path: Path) -> None:
    """With the folder named, two libraries are enough; without them, one line says so."""
    for path in library._libraries(library._installed()):
        shutil.copy(path, tmp_path)
    program = (
        "import sys, importlib.util, transom\nfrom transom.errors import TransomError\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'tvm' else find(name, *rest)\n"
        "try: print(transom.open(sys.argv[1], threads=1).prefill([1, 2]).shape)\n"
        "except TransomError as error: print(error)"
    )

    def opened(folder: Path) -> str:
        return subprocess.run(
            [sys.executable, "-c", program, str(artifact.folder)],
            env={"TRANSOM_TVM_RUNTIME": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert opened(tmp_path) == "(512,)\n"
    (tmp_path / "libtvm_runtime_extra.so").unlink()
    message = opened(tmp_path)
    assert "libtvm_runtime_extra" in message and "pip install 'transom[tvm]'" in message and message.count("\n") == 1


def opened_with(artifact: Exported, **details: Any) -> Session:
    manifest = read_manifest(artifact.folder)
    changed = dataclasses.replace(manifest, details={**manifest.details, **details})
    return Session(TvmRuntime(artifact.folder, changed))


def test_code_for_another_processor_is_refused(artifact: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match=r"machine code for z80 \(z80-none\), this is"):
        opened_with(artifact, machine="z80", triple="z80-none", cpu="z80")
    monkeypatch.setattr(machine, "has_features", lambda: frozenset({"sse4_2"}))
    with pytest.raises(TargetError, match=r"this processor lacks avx512f, fma: export the model on this machine"):
        opened_with(artifact, needs=["sse4_2", "fma", "avx512f"])
    # Where nobody says what the processor can do, it is tried.
    monkeypatch.setattr(machine, "has_features", lambda: None)
    assert opened_with(artifact, needs=["avx9"]).prefill([1]).shape == (512,)


def test_features_are_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPUINFO", path)
    assert machine.has_features() is None
    path.write_text("processor : 0\nflags\t\t: fpu avx2 fma\n\nprocessor : 1\nflags\t\t: fpu\n")
    assert machine.has_features() == frozenset({"fpu", "avx2", "fma"})
    path.write_text("processor : 0\nFeatures\t: fp asimd atomics\n")
    assert machine.has_features() == frozenset({"fp", "asimd", "atomics"})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (LIBRARY, lambda raw: b"nonsense", f"TVM cannot load .*{LIBRARY}"),
        (PARAMETERS, lambda raw: raw[:-100], f"{PARAMETERS} does not hold the weights .*its header describes"),
        (PARAMETERS, lambda raw: raw[:3], f"{PARAMETERS} does not hold the weights"),
        (PARAMETERS, lambda raw: raw.replace(b"norm.weight.plus_1", b"form.weight.plus_1"), r"weights \('norm\."),
    ],
)
def test_damaged_files(name: str, damage: Any, message: str, artifact: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact.folder, folder)
    manifest = read_manifest(folder)
    raw = damage((folder / name).read_bytes())
    # Written anew, as a library that is loaded already must not change under its readers.
    (folder / name).unlink()
    (folder / name).write_bytes(raw)
    with pytest.raises(ArtifactError, match="export the model again"):
        read_manifest(folder)
    with pytest.raises(ArtifactError, match=message):
        TvmRuntime(folder, manifest)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells which cores a thread may use")
def test_the_callers_thread_is_not_pinned(artifact: Exported, text: list[int]) -> None:
    before = os.sched_getaffinity(0)
    for threads in (1, None):
        transom.open(artifact.folder, threads=threads).logits(text[:5])
        assert os.sched_getaffinity(0) == before
