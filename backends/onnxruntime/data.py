"""Where the data of an ONNX file lies. Needs no torch.

ONNX Runtime reads data only from the folder in which the model really is, and follows no link out of it, as a cache of
downloads has them. Such a model is handed over without its file, and names the files that the links lead to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from transom.errors import ArtifactError

if TYPE_CHECKING:
    from onnx import ModelProto

_LOCATION = "location"


def lies_elsewhere(model: Path, names: Iterable[str]) -> bool:
    """Whether one of the files beside a model is in truth in another folder than the model is."""
    folder = _real(model).parent
    return any(_real(model.with_name(name)).parent != folder for name in names)


def relocate(model: ModelProto, folder: Path) -> Path:
    """Let a model name the true files of its data.

    Args:
        model: Without its data; changed in place.
        folder: Where its file is.

    Returns:
        The folder that the data truly is in.

    Raises:
        ArtifactError: If that is more than one.
    """
    folders = set()
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == _LOCATION:
                path = _real(folder / entry.value)
                folders.add(path.parent)
                entry.value = path.name
    if len(folders) > 1:
        raise ArtifactError(
            f"{folder} has links to data in {len(folders)} folders, ONNX Runtime reads one: put the files in it"
        )
    return folders.pop() if folders else folder


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
