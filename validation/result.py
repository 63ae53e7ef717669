"""The result of a validation, as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from transom.validation.tolerances import Tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthResult:
    """One run from empty caches.

    Attributes:
        kind: "prefill": positions of a prompt; "decode": positions that were decoded one by one.
        first: First position that was compared: 0 for the longest prompt, that of the last call for the others, whose
            earlier calls are the longest's.
        length: Tokens in the caches at the end; for "prefill" the length of the prompt.
        max_abs: Largest difference of any logit.
        max_rel: Largest difference as a share of the largest logit of its position.
        worst: Position where `max_rel` is.
        kl_mean: Mean over positions of KL(oracle || target), in nats.
        kl_max: The largest of any position.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheResult:
    """Bytes of the caches with the longest prompt in them.

    Attributes:
        local: Allocated for local layers.
        global_: Allocated for global layers.
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
        target: "reference" or a key of `passes.targets.TARGETS`.
        folder: The artifact, if it was kept.
        quant: Name of the scheme.
        dtype: What it computes in.
        context: Longest sequence.
        chunk: Most new tokens in one call.
        window: Keys that a local layer sees; None where all layers are global.
        slots: Slots of the local layers' rings.
        tolerance: What its differences may be.
        lengths: A record a run.
        new_tokens: Length of the greedy continuation.
        first_different: Index in the continuation of the first token that is not the oracle's likeliest; None if there
            is none. Not judged: of two logits that are equal but for rounding, either may win.
        first_divergence: Like `first_different`, but ties apart.
        kl_unquantized: Mean KL(unquantised oracle || target) over the longest prompt.
        kl_unquantized_limit: What it may be; None without quantisation.
        caches: Their bytes; None if it could not be run.
        not_reached: What the context leaves untested, in plain words.
        failures: Why it fails, in plain words; empty if it passes.
        by_position: `max_rel` of every position of the longest prompt.
        layers: Differences of intermediate values, if they were asked for.
        note: What to know of how it was run; see `backends.session.Session.note`.
        seconds: Time of the target alone.
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
        values = [float(getattr(run, name)) for run in self.lengths]
        return math.nan if any(map(math.isnan, values)) else max(values, default=math.nan)

    @property
    def top1_agreement(self) -> float:
        """Over the positions of all runs; NaN if there are none."""
        if not self.lengths:
            return math.nan
        counts = [run.length - run.first for run in self.lengths]
        shares = [run.top1_agreement for run in self.lengths]
        return sum(n * share for n, share in zip(counts, shares, strict=True)) / sum(counts)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the verdict in front."""
        data = dataclasses.asdict(self)
        data["cache_bytes"] = self.caches and self.caches.to_json()
        del data["caches"]
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
        model: Its name.
        source: Where the weights came from, and their revision.
        oracle: What the targets are compared with, in words.
        prompt: Source, number and sha256 of the tokens.
        targets: Results by name; artifacts of one target are told apart by their folders.
        not_run: Targets that were left out, with the reason.
        versions: Of the libraries.
        date: In UTC.
    """

    model: str
    source: Mapping[str, str]
    oracle: str
    prompt: Mapping[str, Any]
    targets: Mapping[str, TargetResult]
    not_run: Mapping[str, str]
    versions: Mapping[str, str]
    date: str

    @property
    def passed(self) -> bool:
        """Whether every target that ran passes."""
        return all(result.passed for result in self.targets.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data, JSON's own: a number that is not finite is null."""
        data: dict[str, Any] = finite(
            {
                "model": self.model,
                "passed": self.passed,
                "source": dict(self.source),
                "oracle": self.oracle,
                "prompt": dict(self.prompt),
                "date": self.date,
                "versions": dict(self.versions),
                "not_run": dict(self.not_run),
                "targets": {name: result.to_json() for name, result in self.targets.items()},
            }
        )
        return data


def finite(value: Any) -> Any:
    """Plain data in which a number that is not finite is None, for JSON has none."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
