"""The suite, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.generate import write_suite


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case's folder by name."""
    return {folder.name: folder for folder in write_suite(tmp_path_factory.mktemp("suite"))}
