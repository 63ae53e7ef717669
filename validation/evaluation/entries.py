"""What is evaluated: schemes to compile for targets, and artifacts that somebody exported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from transom.backends.folder import check_absent
from transom.errors import ConfigError, TargetError
from transom.export.options import Options
from transom.formats.schemes import scheme
from transom.passes.targets import TARGETS
from transom.validation.candidates import Candidate, check_targets
from transom.validation.certificate import check_writable


def check_names(schemes: Sequence[str] | None, targets: Sequence[str] | None) -> None:
    """Raise what is wrong with the names of schemes and targets, None for the defaults.

    Raises:
        QuantizationError: If a scheme is unknown.
        TargetError: If a target is unknown.
        ConfigError: If a name is given twice, or none is.
    """
    for name in schemes or ():
        scheme(name)
    for name in targets or ():
        if name not in TARGETS:
            raise TargetError(f"no target named {name!r}: choose one of {', '.join(TARGETS)}")
    for kind, names in (("scheme", schemes), ("target", targets)):
        if names is not None and not names:
            raise ConfigError(f"no {kind} is named: name one, or leave the option out")
        if twice := next((name for name in names or () if list(names or ()).count(name) > 1), None):
            raise ConfigError(f"the {kind} {twice!r} is given twice: name it once")


def to_compile(
    options: Sequence[Options], out: str | Path | None, *, overwrite: bool, threads: int | None
) -> list[Candidate]:
    """Every scheme for every target, which `refused` has yet to check.

    Raises:
        ArtifactError: If a folder in `out` exists already or cannot be written.
    """
    candidates = []
    for each in options:
        # What schemes are called may hold characters that folders should not.
        name = f"{each.target}-{re.sub(r'[^A-Za-z0-9_.-]+', '+', each.quant)}"
        folder = None if out is None else Path(out) / name
        if folder is not None:
            check_absent(folder, overwrite=overwrite)
            check_writable(next(parent for parent in folder.resolve().parents if parent.exists()))
        candidate = Candidate(name=name, options=each, folder=folder, overwrite=overwrite, threads=threads)
        candidates.append(named(candidate))
    return candidates


def named(candidate: Candidate) -> Candidate:
    """Called by its target and scheme."""
    return dataclasses.replace(candidate, name=f"{candidate.target} {candidate.options.quant}")


def refused(candidates: Sequence[Candidate]) -> dict[str, Exception]:
    """Why candidates cannot run, by name: a library is missing, or the target cannot hold the scheme."""
    refusals: dict[str, Exception] = {}
    for candidate in candidates:
        try:
            if not candidate.exported:
                check_targets([candidate.target], quant=candidate.options.quant, dtype=candidate.options.dtype)
        except TargetError as error:
            refusals[candidate.name] = error
    return refusals
