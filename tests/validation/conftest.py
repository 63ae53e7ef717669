"""Runs of the command line and one good validation, shared by the tests of validate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transom.validation.result import Validation
from transom.validation.validate import validate_sources
from transom.zoo.model import Model

TARGETS = ("reference", "onnxruntime", "onnx")


@pytest.fixture(scope="session")
def good(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Validation, Path]:
    """gemma3-tiny on all targets of these tests, and the folder that holds its artifacts. Copy what you change."""
    out = tmp_path_factory.mktemp("validated")
    return validate_sources(tiny, targets=TARGETS, out=out, threads=1, layers=True), out


def parsed(path: Path) -> dict[str, object]:
    """A JSON file without NaN, which JSON does not have."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    data: dict[str, object] = json.loads(path.read_text(), parse_constant=refuse)
    return data
