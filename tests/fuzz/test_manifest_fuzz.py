"""Whatever a manifest or a prompt holds, it works or one line says what is wrong."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import transom
from tests.artifacts import Export
from transom.backends.artifact import read_manifest
from transom.backends.folder import MANIFEST
from transom.backends.session import Session
from transom.cli import run
from transom.cli.export import inspect
from transom.errors import TransomError

BOUNDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

Path_ = tuple[str | int, ...]

OTHERS: list[Any] = [
    None, True, 0, -1, 1, 1.5, 10**30, float("nan"), "", "x", "[/red]", "../x", "manifest.json", [], [None], [[1]], {},
    {"name": "x"}, {"": []},
]  # fmt: skip


def paths_of(data: Any, here: Path_ = ()) -> Iterator[Path_]:
    """Where every value of plain data stands; of long lists, only the first two items."""
    yield here
    items: Any = data.items() if isinstance(data, dict) else enumerate(data[:2]) if isinstance(data, list) else ()
    for key, value in items:
        yield from paths_of(value, (*here, key))


def at(data: Any, path: Path_) -> Any:
    for key in path:
        data = data[key]
    return data


@st.composite
def changed(draw: st.DrawFn, data: Any, below: Path_ = ()) -> Any:
    """The data with one to three values dropped, exchanged, or put in place of another."""
    places = sorted(paths_of(at(data, below), below), key=str)
    changing = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places))
        other = draw(st.one_of(st.sampled_from(OTHERS), st.sampled_from(places).map(lambda place: at(data, place))))
        if not path:
            return other
        with contextlib.suppress(KeyError, IndexError, TypeError):
            parent = at(changing, path[:-1])
            if draw(st.booleans()):
                parent[path[-1]] = copy.deepcopy(other)
            else:
                del parent[path[-1]]
    return changing


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Nothing but a `TransomError` of one line may come out of the block; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        except TransomError as error:
            assert str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def folder(exported: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a tiny artifact."""
    return Path(shutil.copytree(exported("onnxruntime", "int8").folder, tmp_path_factory.mktemp("fuzz") / "model"))


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text())


@settings(BOUNDED, max_examples=400)
@given(data=st.data())
def test_a_manifest_is_read_or_refused(data: st.DataObject, folder: Path, manifest: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(data.draw(changed(manifest))))
    with one_line():
        read_manifest(folder, verify=False)
        inspect(folder, verify=False)
        inspect(folder, verify=False, json=True)
        session = transom.open(folder, threads=1, verify=False)
        list(session.generate([5, 6, 7], max_new_tokens=3))


@pytest.fixture(scope="module")
def session(exported: Export) -> Session:
    return transom.open(exported("onnxruntime", "int8").folder, threads=1)


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252")


@settings(BOUNDED, max_examples=600)
@given(
    prompt=st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda text, encoding: text.encode(encoding, "replace"),
            st.text(max_size=20),
            st.sampled_from(ENCODINGS),
        ),
    )
)
def test_a_prompt_is_run_or_refused(prompt: bytes, session: Session, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(prompt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_open", lambda folder, threads: (session, 0.0))
        with one_line():
            run.run(tmp_path, prompt_file=tmp_path / "prompt", max_new_tokens=2, json=True)
            prompt.decode()
