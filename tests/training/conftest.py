"""The command line, as the tests of validate run it."""

from tests.validation.conftest import cli, traced_once

__all__ = ["cli", "traced_once"]
