"""The wheel holds what the folders hold."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]

PAGES = ("page.html", "parts.html", "validation.html", "contest.html", "evaluation.html", "report.css")
DATA = ("transom/py.typed", "transom/zoo/prompt.txt", *(f"transom/validation/templates/{name}" for name in PAGES))
"""What the wheel holds beside modules: the text that validation reads, and the templates and style of its reports."""


def folder_of(package: str) -> Path:
    """Where a package's modules stand, by the longest entry of package-dir that fits."""
    parts = package.split(".")
    for count in range(len(parts), 0, -1):
        if (base := SETUPTOOLS["package-dir"].get(".".join(parts[:count]))) is not None:
            return ROOT.joinpath(base, *parts[count:])
    raise AssertionError(f"no package-dir for {package}")


def test_every_package_folder_is_listed() -> None:
    tops = [ROOT / base for base in SETUPTOOLS["package-dir"].values()]
    folders = {path.parent for top in tops for path in top.rglob("*.py") if "__pycache__" not in path.parts}
    assert folders == {folder_of(package) for package in SETUPTOOLS["packages"]}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_typings_lead_to_the_folders() -> None:
    for package in SETUPTOOLS["packages"]:
        link = ROOT.joinpath("typings", *package.split("."))
        assert (
            link.resolve() == folder_of(package).resolve()
            or (link / "__init__.py").resolve() == (folder_of(package) / "__init__.py").resolve()
        ), link
    for path in (ROOT / "typings").rglob("*"):
        if path.is_symlink():
            assert path.exists(), f"{path} leads nowhere"
            assert not path.readlink().is_absolute(), f"{path} leads out of the repository"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: building leaves a build folder behind, and files of old builds would get in.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", *SETUPTOOLS["package-dir"].values()):
        if (ROOT / name).exists() and not (source / name).exists():
            subprocess.run(["cp", "-rL", str(ROOT / name), str(source / name)], check=True)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("transom-*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module(wheel: set[str]) -> None:
    expected = set(DATA)
    for package in SETUPTOOLS["packages"]:
        expected |= {f"{package.replace('.', '/')}/{path.name}" for path in folder_of(package).glob("*.py")}
    assert expected <= wheel


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    version = PYPROJECT["project"]["version"]
    assert tops == {"transom", f"transom-{version}.dist-info"}
    assert not [name for name in wheel if name.startswith("transom/") and not name.endswith(".py") and name not in DATA]


def test_versions_agree() -> None:
    import transom

    assert transom.__version__ == PYPROJECT["project"]["version"]
