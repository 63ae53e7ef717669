"""What a user named: a model, exported artifacts, or both; and the one model that they all are of."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transom.backends.artifact import Manifest
from transom.backends.folder import MANIFEST
from transom.backends.threads import check_threads
from transom.errors import ConfigError
from transom.validation.candidates import Candidate, artifact_candidate
from transom.zoo.model import Model, load

_SEED = re.compile(r"seed (\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What to validate.

    Attributes:
        model: The model.
        artifacts: Those that exist already.
        compiles: Whether a model was named, to be compiled for the targets.
    """

    model: Model
    artifacts: tuple[Candidate, ...]
    compiles: bool


def read_inputs(
    named: str | Path | Model | Sequence[str | Path | Model],
    *,
    model: str | Path | Model | None,
    weights: Literal["checkpoint", "random"],
    seed: int,
    threads: int | None,
    same_weights: bool = True,
) -> Inputs:
    """Tell models and artifacts apart, and load the model.

    Args:
        named: A model, artifacts, or both.
        model: The model, if it is none of those and not where the artifacts' manifests say.
        weights: "random" draws the model's weights from `seed`.
        seed: Of random weights.
        threads: Threads of the runtimes.
        same_weights: Whether artifacts of other weights are refused, such as those of a checkpoint that was trained on
            from the model's. Those that nobody named a model for always are.

    Raises:
        ConfigError: If nothing, or more than one model, is given, or artifacts are not of the model.
        ArtifactError: If an artifact is damaged.
        TargetError: If threads are far more than cores.
    """
    check_threads(threads)
    parts = [named] if isinstance(named, (str, Path, Model)) else list(named)
    models = [part for part in parts if isinstance(part, Model) or not (Path(part) / MANIFEST).is_file()]
    folders = list(
        dict.fromkeys(Path(part) for part in parts if not isinstance(part, Model) and (Path(part) / MANIFEST).is_file())
    )
    if not parts or len(models) + (model is not None) > 1:
        raise ConfigError("give one model, or artifacts, or one model and artifacts of it")
    opened = [artifact_candidate(folder, threads) for folder in folders]
    chosen = models[0] if models else model
    if chosen is not None:
        loaded = chosen if isinstance(chosen, Model) else load(str(chosen), weights=weights, seed=seed)
    else:
        loaded = model_of(opened[0][1], folders[0])
    for folder, (_, manifest) in zip(folders, opened, strict=True):
        check_same(loaded, manifest, folder, weights=same_weights or chosen is None)
    return Inputs(model=loaded, artifacts=tuple(candidate for candidate, _ in opened), compiles=bool(models))


def model_of(manifest: Manifest, folder: Path) -> Model:
    """Load the model that an artifact was made from, by the name in its manifest."""
    source, revision = manifest.source["name"], manifest.source["revision"]
    try:
        if source == "random" and (match := _SEED.fullmatch(revision)):
            return load(manifest.model["name"], weights="random", seed=int(match[1]))
        return load(source)
    except ConfigError as error:
        raise ConfigError(
            f"{folder} was made from {source!r}, which is not found ({error}): name it with --model"
        ) from None


def check_same(model: Model, manifest: Manifest, folder: Path, *, weights: bool = True) -> None:
    """Raise `ConfigError` if an artifact is not of the model, or, with `weights`, not of its very numbers."""
    config: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(model.config)))
    theirs = dict(manifest.model)
    if differing := sorted(key for key in config if key != "name" and config[key] != theirs.get(key)):
        raise ConfigError(
            f"{folder} is not of {model.config.name}: {', '.join(differing)} differ; name its model with --model"
        )
    if weights and model.revision != manifest.source["revision"]:
        raise ConfigError(
            f"{folder} was made from revision {manifest.source['revision']} of {manifest.source['name']}, the model "
            f"at hand is {model.revision}: export it again, or name its model with --model"
        )
