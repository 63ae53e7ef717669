"""What the XLA session does beside the numbers: memory, taps, and errors that say what to do."""

from __future__ import annotations

import json
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
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.backends.xla.parameters import WEIGHTS_FILE
from transom.errors import ArtifactError, ContextLengthError, SessionError, TargetError
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph, Tap
from transom.passes.base import Pass, Rewrite
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model

jax = pytest.importorskip("jax", reason="the xla extra is not installed")

PER_SLOT = 2 * 2 * 32 * 4
"""Bytes of keys and values of one slot of a layer of gemma3-tiny."""


@pytest.fixture(scope="module")
def artifact(exported: Export) -> Exported:
    return exported("xla", "none")


@pytest.fixture(scope="module")
def opened(artifact: Exported) -> Session:
    return artifact.session()


@pytest.fixture
def session(opened: Session) -> Session:
    """One session for all tests, so that each program is compiled once."""
    opened.reset()
    return opened


@pytest.fixture
def copy(artifact: Exported, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(artifact.folder, tmp_path / "copy"))


def test_feeding_in_pieces(session: Session, text: list[int], text_logits: NDArray[np.float32]) -> None:
    """Pieces that fill a program, that leave most of it empty, and that need the larger one."""
    position = 0
    for size in (3, 10, 11, CHUNK, CHUNK - 1, 1, 2):
        logits = session.prefill(text[position : position + size])
        position += size
        assert logits.shape == (512,) and logits.dtype == np.float32
        assert np.abs(logits - text_logits[position - 1]).max() < FP32_LOGITS, size


def test_padding_at_the_end_of_the_context_is_written_nowhere(session: Session, text: list[int]) -> None:
    """The last program has 10 slots for 3 tokens, more than the context has left."""
    tokens = (text * 4)[:512]
    whole = session.prefill(tokens)
    session.reset()
    session.prefill(tokens[:509])
    assert np.abs(session.prefill(tokens[509:]) - whole).max() < FP32_LOGITS
    with pytest.raises(ContextLengthError):
        session.decode(1)


def test_caches_are_static(artifact: Exported, text: list[int]) -> None:
    session = artifact.session()
    assert session.cache_bytes() == {"local": 0, "global": 0}
    expected = {"local": 4 * PER_SLOT * WINDOW, "global": 2 * PER_SLOT * 512}
    session.reserve(1)
    assert session.cache_bytes() == expected
    session.prefill(text)
    assert session.cache_bytes() == expected
    assert {state.slots for state in session.states} == {WINDOW, 512}


def test_caches_are_updated_in_place(session: Session, text: list[int]) -> None:
    """What a call is given is gone after it, and the same memory comes back."""
    session.prefill(text[:CHUNK])
    for tokens in (text[:1], text[:CHUNK], text[:5]):
        before = [array for _, array in session.runtime.state_arrays()]
        addresses = {array.unsafe_buffer_pointer() for array in before}
        session.prefill(tokens)
        assert all(array.is_deleted() for array in before)
        assert {array.unsafe_buffer_pointer() for _, array in session.runtime.state_arrays()} == addresses


class TapSome(Pass):
    """Taps of each kind of shape: positions in the middle, queries, and what has only wanted positions left."""

    def rewrite(self, graph: Graph) -> Rewrite:
        logits = graph.outputs["logits"]
        nodes = [node for node in graph.calls_all() if "linear" in str(node.target)]
        graph.add_tap(Tap(name="tap.q", layer=0, op="projection"), nodes[0])
        graph.add_tap(Tap(name="tap.down", layer=2, op="projection"), nodes[20])
        graph.add_tap(Tap(name="tap.logits", layer=None, op="head"), logits)
        return Rewrite(changes=3)


def test_taps_have_no_padding(tiny: Model, traced: Graph, tmp_path: Path, text: list[int]) -> None:
    transom.compile(tiny, target="xla", context=64, chunk=CHUNK, before=[TapSome()], out=tmp_path / "model")
    passes = [TapSome(), *pipeline("xla", chunk=CHUNK, scheme=scheme("none")).passes]
    graph, _ = type(pipeline("xla", chunk=CHUNK, scheme=scheme("none")))(passes).run(traced)
    session, reference = transom.open(tmp_path / "model", threads=1), ReferenceSession(graph, context=64, chunk=CHUNK)
    position = 0
    for size, positions in ((20, "all"), (7, "last"), (1, "last")):
        for run in (session, reference):
            list(run.feed(text[position : position + size], wanted=positions))  # type: ignore[arg-type]
        position += size
        assert list(session.tapped) == ["tap.q", "tap.down", "tap.logits"]
        for name, expected in reference.tapped.items():
            actual = session.tapped[name]
            assert actual.shape == expected.shape and actual.dtype == np.float32, (name, size)
            assert np.abs(actual - expected).max() < FP32_LOGITS, (name, size)


def test_a_call_cut_short_must_be_followed_by_a_reset(
    artifact: Exported, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call had been given the caches, and they are gone."""
    session = artifact.session()
    runtime: Any = session.runtime
    expected = session.prefill(text[:9])
    compiled = dict(runtime._compiled)

    def interrupted(*args: Any) -> Any:
        run(*args)
        raise KeyboardInterrupt

    (key, run), *_ = compiled.items()
    runtime._compiled[key] = interrupted
    with pytest.raises(KeyboardInterrupt):
        session.prefill(text[9:18])
    runtime._compiled[key] = run
    with pytest.raises(SessionError, match="reset"):
        session.prefill(text[9:18])
    session.reset()
    np.testing.assert_array_equal(session.prefill(text[:9]), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_generating_needs_no_torch_and_as_many_threads_as_asked_for(artifact: Exported) -> None:
    program = (
        "import os, sys; sys.modules['torch'] = None\n"
        "import transom; session = transom.open(sys.argv[1], threads=3)\n"
        "print(len(list(session.generate('Hello', max_new_tokens=3, stop_ids=()))))\n"
        "names = [open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task')]\n"
        "print(sum('XLAEigen' in name for name in names), os.environ.get('PJRT_NPROC'))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "PJRT_NPROC")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(artifact.folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.stdout.split() == ["3", "3", "None"], done.stderr


def test_opening_imports_no_jax_for_other_targets() -> None:
    program = "import sys, transom.backends.opening, transom.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_without_jax(artifact: Exported, monkeypatch: pytest.MonkeyPatch, tiny: Model, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "jax" or "export.xla" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(TargetError, match=r"pip install 'transom\[xla\]'") as caught:
        artifact.session()
    assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match=r"pip install 'transom\[xla\]'"):
        transom.compile(tiny, target="xla", out=tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_platform_without_a_device(artifact: Exported) -> None:
    program = "import sys, transom; transom.open(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(artifact.folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
    )
    assert done.stderr.splitlines()[-1].startswith("transom.errors.TargetError: jax finds no device")
    assert done.stderr.splitlines()[-1].endswith("set JAX_PLATFORMS=cpu")


def test_programs_for_other_platforms(artifact: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(artifact.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["details"]["platforms"] = ["tpu", "cuda"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TargetError, match=r"are for tpu, cuda, and jax runs on cpu: .*JAX_PLATFORMS=tpu") as caught:
        transom.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["decode.jaxexport", WEIGHTS_FILE])
def test_a_damaged_file_is_noticed(name: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        transom.open(copy)


def test_programs_that_jax_cannot_read(copy: Path) -> None:
    size = (copy / "decode.jaxexport").stat().st_size
    (copy / "decode.jaxexport").write_bytes(b"\x00" * size)
    with pytest.raises(
        ArtifactError, match=r"cannot read decode.jaxexport, made by jax .* on \d{4}-.*export"
    ) as caught:
        transom.open(copy, verify=False)
    assert "\n" not in str(caught.value)


def test_programs_of_another_time(artifact: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jax reads programs for six months."""

    def expired(data: Any) -> Any:
        raise ValueError("the serialization version 3 is too old\nsecond line")

    monkeypatch.setattr(jax.export, "deserialize", expired)
    with pytest.raises(ArtifactError, match=r"version 3 is too old\): export the model again"):
        artifact.session()


def test_programs_that_cannot_be_compiled(artifact: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    session = artifact.session()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such custom call")

    monkeypatch.setattr(jax, "jit", refuse)
    with pytest.raises(ArtifactError, match="no such custom call"):
        session.prefill([1])


def _header(path: Path) -> tuple[dict[str, Any], int]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), length


@pytest.mark.parametrize("damage", ["length", "garbage", "missing", "dtype", "shape", "short"])
def test_weights_that_are_not_as_promised(damage: str, copy: Path) -> None:
    path = copy / WEIGHTS_FILE
    (header, length), data = _header(path), bytearray(path.read_bytes())
    entry = header["norm.weight.plus_1"]
    if damage == "length":
        data[:8] = (2**40).to_bytes(8, "little")
    elif damage == "garbage":
        data[8 : 8 + length] = b"\xff" * length
    else:
        if damage == "missing":
            del header["norm.weight.plus_1"]
        elif damage == "dtype":
            entry["dtype"] = "I32"
        elif damage == "shape":
            entry["shape"] = [8, 4]
        else:
            entry["data_offsets"] = [len(data), len(data) + 256]
        data[8 : 8 + length] = json.dumps(header).encode().ljust(length)
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"weights.safetensors does not hold the weights .*export the model again"):
        transom.open(copy, verify=False)
