"""Models that several tests of the zoo share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.zoo.tiny_gguf import TINY, write_gguf
from transom.errors import CheckpointError
from transom.zoo.architectures import packaged
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """Gemma 3 270M, Q4_K_M."""
    try:
        return packaged("gemma3-270m")
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_tokenizer(real_gguf: Path) -> Tokenizer:
    """Gemma 3's tokenizer of 262,144 pieces."""
    return Tokenizer.from_gguf(real_gguf)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", TINY, random_weights(TINY, 0))
