"""The result of a validation, as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from transom.validation.compare import Measurement
from transom.validation.tolerances import SoftTolerance, Tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthResult:
    """One run from empty caches, against the oracle.

    Attributes:
        kind: "prefill": positions of a prompt; "decode": positions that were decoded one by one.
        first: First position that was compared: 0 for the longest prompt, that of the last call for the others, whose
            earlier calls are the longest's.
        length: Tokens in the caches at the end; for "prefill" the length of the prompt.
        max_abs: Largest difference of any logit.
        max_rel: The same as a share of the largest logit of its position, which is `worst`.
        kl_mean: Mean over positions of KL(oracle || target), in nats; `kl_max` is the largest.
        top1_agreement: Share of positions with the same likeliest token.
        seconds: Time of the target alone.
    """

    kind: str
    first: int
    length: int
    max_abs: float
    max_rel: float
    worst: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    seconds: float


def length_values(kind: str, run: Measurement) -> dict[str, Any]:
    """The fields of a `LengthResult`."""
    differences = run.differences
    return {
        "kind": kind,
        "first": differences.first,
        "length": differences.first + len(differences.kl),
        "max_abs": float(differences.max_abs.max()),
        "max_rel": float(differences.relative.max()),
        "worst": differences.first + int(np.argmax(differences.relative)),
        "kl_mean": float(differences.kl.mean()),
        "kl_max": float(differences.kl.max()),
        "top1_agreement": differences.top1_agreement,
        # What is decoded is timed alone: its prompt is no part of it.
        "seconds": run.seconds + (run.seconds_before if kind == "prefill" else 0.0),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRun(LengthResult):
    """One run of a prompt with images, from empty caches.

    Attributes:
        case: What the prompt is, in words.
        step: Most tokens that were fed at once; an image is never cut.
    """

    case: str
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderResult:
    """Soft tokens of one image, against the oracle's.

    Attributes:
        image: What it is, in words.
        pixels_different: Values of the target's pixels that are not those of the rule.
        max_abs: Largest difference of any value.
        max_rel: The same as a share of the largest value of its soft token, which is `worst`.
        seconds: Time of the target alone.
    """

    image: str
    pixels_different: int
    max_abs: float
    max_rel: float
    worst: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesResult:
    """A target's images: its encoder, and its decoder on prompts with the oracle's soft tokens."""

    tolerance: SoftTolerance
    encoded: tuple[EncoderResult, ...]
    runs: tuple[ImageRun, ...]

    def worst(self, name: str) -> float:
        """Largest value of a field over the runs."""
        return _largest(float(getattr(run, name)) for run in self.runs)

    def worst_soft(self, name: str) -> float:
        """Largest value of a field over the images."""
        return _largest(float(getattr(image, name)) for image in self.encoded)

    @property
    def top1_agreement(self) -> float:
        """Over the positions of all runs."""
        return _agreement(self.runs)

    @property
    def seconds(self) -> float:
        """Time of the target alone."""
        return sum(image.seconds for image in self.encoded) + sum(run.seconds for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the worst in front."""
        return {
            "soft_max_abs": self.worst_soft("max_abs"),
            "soft_max_rel": self.worst_soft("max_rel"),
            **{name: self.worst(name) for name in ("max_abs", "max_rel", "kl_max")},
            "top1_agreement": self.top1_agreement,
            **dataclasses.asdict(self),
        }


def _largest(values: Iterable[float]) -> float:
    """NaN if any is, or if there are none."""
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else max(listed, default=math.nan)


def _agreement(runs: Sequence[LengthResult]) -> float:
    """Share of the positions of all runs with the same likeliest token; NaN if there are none."""
    if not runs:
        return math.nan
    counts = [run.length - run.first for run in runs]
    return sum(n * run.top1_agreement for n, run in zip(counts, runs, strict=True)) / sum(counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheResult:
    """Bytes of the caches with the longest prompt in them.

    Attributes:
        local_manifest: What the slots of the manifest come to.
        local_window: The plan's bare window: what local layers would take without the slack of a chunk.
        unbounded: What local layers would take if they held as many slots as global ones.
    """

    local: int
    global_: int
    local_manifest: int
    local_window: int
    unbounded: int

    def to_json(self) -> dict[str, Any]:
        """Plain data; `window_share` is the part of the local bytes that the plan's bare window needs."""
        data = dataclasses.asdict(self)
        share = self.local_window / self.local if self.local else None
        return {"local": data.pop("local"), "global": data.pop("global_"), **data, "window_share": share}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResult:
    """Largest difference of one tapped value from the reference's, as a share of the reference's largest number."""

    name: str
    layer: int | None
    op: str
    max_abs: float
    max_rel: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetResult:
    """One target against the oracle.

    Attributes:
        window: Keys that a local layer sees; None where all layers are global.
        slots: Slots of the local layers' rings.
        first_different: Index in the continuation of the first token that is not the oracle's likeliest; None if there
            is none. Not judged: of two logits that are equal but for rounding, either may win.
        first_divergence: Like `first_different`, but ties apart.
        kl_unquantized: Mean KL(unquantised oracle || target) over the longest prompt.
        kl_unquantized_limit: What it may be; None without quantisation.
        caches: Their bytes; None if it could not be run.
        images: None if it takes none, or they were left out.
        not_reached: What the context leaves untested, in plain words.
        by_position: `max_rel` of every position of the longest prompt.
        note: What to know of how it was run; see `backends.session.Session.note`.
    """

    target: str
    folder: str | None
    quant: str
    dtype: str
    context: int
    chunk: int
    window: int | None
    slots: tuple[int, ...] = ()
    tolerance: Tolerance
    lengths: tuple[LengthResult, ...] = ()
    new_tokens: int = 0
    first_different: int | None = None
    first_divergence: int | None = None
    kl_unquantized: float | None = None
    kl_unquantized_limit: float | None
    caches: CacheResult | None = None
    images: ImagesResult | None = None
    not_reached: tuple[str, ...]
    failures: tuple[str, ...]
    by_position: tuple[float, ...] = ()
    layers: tuple[LayerResult, ...] = ()
    note: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether there are no failures."""
        return not self.failures

    @property
    def prefills(self) -> tuple[LengthResult, ...]:
        """The prompts; `decodes` are the others."""
        return tuple(run for run in self.lengths if run.kind == "prefill")

    def worst(self, name: str) -> float:
        """Largest value of a field over all runs; NaN if any is, or if there are none."""
        return _largest(float(getattr(run, name)) for run in self.lengths)

    @property
    def top1_agreement(self) -> float:
        """Over the positions of all runs; NaN if there are none."""
        return _agreement(self.lengths)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the verdict in front."""
        data = dataclasses.asdict(self)
        data["cache_bytes"] = self.caches and self.caches.to_json()
        del data["caches"]
        data["images"] = self.images and self.images.to_json()
        return {
            "passed": self.passed,
            "max_abs": self.worst("max_abs"),
            "max_rel": self.worst("max_rel"),
            "kl": self.worst("kl_mean"),
            "kl_max": self.worst("kl_max"),
            "top1_agreement": self.top1_agreement,
            **data,
            "by_position": [float(f"{value:.3g}") for value in self.by_position],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """A model on several targets.

    Attributes:
        oracle: What the targets are compared with, in words.
        images: What was shown, by name and hash; empty if nothing was.
        targets: Results by name; artifacts of one target are told apart by their folders.
    """

    model: str
    source: Mapping[str, str]
    oracle: str
    prompt: Mapping[str, Any]
    images: tuple[Mapping[str, Any], ...] = ()
    date: str
    versions: Mapping[str, str]
    not_run: Mapping[str, str]
    targets: Mapping[str, TargetResult]

    @property
    def passed(self) -> bool:
        """Whether every target that ran passes."""
        return all(result.passed for result in self.targets.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data, JSON's own: a number that is not finite is null."""
        targets = {name: result.to_json() for name, result in self.targets.items()}
        first = {"model": self.model, "passed": self.passed}
        return finite({**first, **vars(self), "targets": targets})  # type: ignore[no-any-return]


def finite(value: Any) -> Any:
    """Plain data in which a number that is not finite is None, for JSON has none."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
