"""Run a suite on any runtime, and say what is wrong with it. Needs numpy only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

FORMAT = 2

SOFT = -1
"""Stands among token ids where a soft token of an image does."""


class Session(Protocol):
    """A model with its caches, empty when opened."""

    def reset(self) -> None:
        """Forget all tokens. Memory may stay allocated; what stands in it must not be seen again."""

    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[Any]:
        """Soft tokens [Q, D] of an image's pixels [3, S, S] between -1 and 1. Never called without "images"."""

    def feed(self, tokens: Sequence[int], soft: NDArray[Any] | None) -> NDArray[Any]:
        """Run tokens after those that are held; returns the logits [T, V] of each.

        Args:
            tokens: Ids; -1 where a soft token stands. Those in a row are one image's. May be more than the chunk that
                the session was opened with: cut them, but not within an image.
            soft: Soft tokens in their order [n, D], as `encode_image` returned them; None if there are none.
        """

    def decode(self, token: int) -> NDArray[Any]:
        """Run one token of text; returns its logits [V]."""

    def cache_slots(self) -> Mapping[int, int] | None:
        """Slots (tokens' worth of memory) of every layer's cache as allocated now; None if nobody can tell."""

    def cache_bytes(self) -> int | None:
        """Bytes of all caches as allocated now, keys and values; None if nobody can tell."""


class Runtime(Protocol):
    """Something that runs models."""

    @property
    def name(self) -> str:
        """What to call it."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do beyond text: "images"; and "wraps_early", if none of its calls crosses a ring's end, so that
        local layers of models that see images may keep `chunk - 1` slots more.
        """

    def open(self, folder: Path, *, chunk: int, context: int) -> Session:
        """Open a case's folder.

        Args:
            folder: Holds `config.json` and `model.safetensors`, as a Hugging Face checkpoint does.
            chunk: Most tokens that may be run in one call.
            context: Most tokens that will be held.
        """


class Where(TypedDict):
    """Names of a case and a schedule."""

    case: str
    schedule: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        case: Name of the case.
        schedule: Name of the schedule.
        kind: "logits", "soft" (tokens of an image), "cut" (an image was), "cache" or "error".
        text: What was expected and what came.
        position: First position whose logits are wrong.
        difference: Largest difference of logits over all positions.
    """

    case: str
    schedule: str
    kind: Literal["logits", "soft", "cut", "cache", "error"]
    text: str
    position: int | None = None
    difference: float | None = None

    def __str__(self) -> str:
        return f"{self.case}/{self.schedule}: {self.kind}: {self.text}"


@dataclasses.dataclass(kw_only=True)
class Report:
    """What came of a run.

    Attributes:
        runtime: Its name.
        findings: What is wrong.
        not_run: "CASE: not run: needs CAPABILITY" of every case left out.
        unchecked: What the runtime does not tell, so that nothing is known of it.
        differences: Largest difference of logits, by (case, schedule); of soft tokens by (case, "encode_image").
    """

    runtime: str
    findings: list[Finding] = dataclasses.field(default_factory=list)
    not_run: list[str] = dataclasses.field(default_factory=list)
    unchecked: set[str] = dataclasses.field(default_factory=set)
    differences: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something ran and nothing was wrong."""
        return not self.findings and bool(self.differences)

    def red(self) -> list[str]:
        """Names of the cases with findings, each once."""
        return list(dict.fromkeys(finding.case for finding in self.findings))

    def __str__(self) -> str:
        worst = f", largest difference {max(self.differences.values()):.1e}" if self.differences else ""
        head = f"{self.runtime}: {len(self.differences)} schedules run, {len(self.findings)} findings{worst}"
        return "\n".join([head, *map(str, self.findings), *self.not_run, *sorted(self.unchecked)])


def run_suite(
    runtime: Runtime, folders: Iterable[Path], *, tolerance: float, schedules: Sequence[str] | None = None
) -> Report:
    """Run cases.

    Args:
        runtime: What to run them on.
        folders: The cases' folders.
        tolerance: Largest absolute difference that logits may have from the expected ones.
        schedules: Names of the schedules to run; by default all.
    """
    report = Report(runtime=runtime.name)
    for folder in folders:
        _run_case(runtime, folder, tolerance, schedules, report)
    return report


def _run_case(runtime: Runtime, folder: Path, tolerance: float, names: Sequence[str] | None, report: Report) -> None:
    case = json.loads((folder / "case.json").read_text())
    if case["format"] != FORMAT:
        raise ValueError(f"{folder} is of format {case['format']}, this runner reads {FORMAT}: generate it again")
    if lacking := sorted(set(case["needs"]) - runtime.capabilities):
        report.not_run.append(f"{case['name']}: not run: needs {', '.join(lacking)}")
        return
    inputs, outputs = np.load(folder / "inputs.npz"), np.load(folder / "expected.npz")
    tokens, expected = inputs["tokens"], outputs["logits"]
    soft: NDArray[Any] | None = None
    if case["image_tokens"] and names is None:
        _check_refusal(runtime, folder, case, report)
    sessions: dict[int, Session] = {}
    for schedule in case["schedules"]:
        if names is not None and schedule["name"] not in names:
            continue
        where = Where(case=case["name"], schedule=schedule["name"])
        try:
            if (chunk := schedule["chunk"]) not in sessions:
                sessions[chunk] = runtime.open(folder, chunk=chunk, context=case["context"])
            session = sessions[chunk]
            if case["image_tokens"] and soft is None:
                soft = np.concatenate([np.asarray(session.encode_image(image)) for image in inputs["pixels"]])
                _check_soft(soft, outputs["soft"], case["name"], tolerance, report)
            logits = _play(session, tokens, soft, schedule)
            slots, size = session.cache_slots(), session.cache_bytes()
        except Exception as error:  # a runtime may raise anything, and the other schedules still count
            report.findings.append(Finding(**where, kind="error", text=f"{type(error).__name__}: {error}"))
            sessions.pop(schedule["chunk"], None)
            continue
        rows = expected[: len(logits)]
        difference = _difference(logits, rows)
        report.differences[case["name"], schedule["name"]] = float(difference.max())
        if logits.shape != rows.shape:
            text = f"shape {list(logits.shape)}, expected {list(rows.shape)}"
            report.findings.append(Finding(**where, kind="logits", text=text))
        elif (finding := _judge(where, difference, tolerance)) is not None:
            report.findings.append(finding)
        bounds = schedule["caches"]
        if case["image_tokens"] and "wraps_early" in runtime.capabilities:
            bounds = _widened(bounds, case["layers"], chunk - 1)
        texts = _check_caches(slots, size, case["layers"], bounds)
        report.findings += [Finding(**where, kind="cache", text=text) for text in texts]
        if slots is None or size is None:
            report.unchecked.add(f"{case['name']}: the runtime does not tell the size of its caches: not checked")


def _check_soft(soft: NDArray[Any], expected: NDArray[np.float64], case: str, tolerance: float, report: Report) -> None:
    """Hold what the runtime makes of the images against what is expected."""
    where = Where(case=case, schedule="encode_image")
    difference = _difference(soft, expected.reshape(-1, expected.shape[-1]))
    report.differences[case, "encode_image"] = float(difference.max())
    if (finding := _judge(where, difference, tolerance, "soft")) is not None:
        report.findings.append(finding)


def _check_refusal(runtime: Runtime, folder: Path, case: Mapping[str, Any], report: Report) -> None:
    """Calls that are too short for an image must be refused, when they are asked for or when an image comes."""
    chunk = case["image_tokens"] - 1
    pixels, tokens = np.load(folder / "inputs.npz")["pixels"][0], [SOFT] * case["image_tokens"]
    try:
        session = runtime.open(folder, chunk=chunk, context=case["context"])
        session.reset()
        session.feed(tokens, np.asarray(session.encode_image(pixels)))
    except Exception:  # a runtime may raise anything
        return
    text = f"an image of {chunk + 1} tokens went through calls of {chunk}: its tokens cannot have seen each other"
    report.findings.append(Finding(case=case["name"], schedule="short_chunk", kind="cut", text=text))


def _play(
    session: Session, tokens: NDArray[np.int64], soft: NDArray[Any] | None, schedule: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Logits of every position that the schedule reaches."""
    session.reset()
    parts, position = [], 0
    for size in schedule["feeds"]:
        stop = position + size
        before, count = int((tokens[:position] == SOFT).sum()), int((tokens[position:stop] == SOFT).sum())
        own = None if soft is None or not count else soft[before : before + count]
        logits = np.asarray(session.feed(tokens[position:stop].tolist(), own), dtype=np.float64)
        if logits.shape[0] != size:
            raise ValueError(f"{size} tokens were fed and logits of {logits.shape[0]} came back")
        parts.append(logits)
        position = stop
    for token in tokens[position : position + schedule["decode"]].tolist():
        parts.append(np.asarray(session.decode(token), dtype=np.float64)[None])
    return np.concatenate(parts)


def _difference(logits: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest absolute difference of every position; what is no number, or of another shape, differs without bound."""
    if logits.shape != expected.shape:
        return np.full(len(expected), np.inf)
    difference = np.abs(logits - expected).max(axis=-1)
    return np.where(np.isnan(difference), np.inf, difference)


def _judge(
    where: Where, difference: NDArray[np.float64], tolerance: float, kind: Literal["logits", "soft"] = "logits"
) -> Finding | None:
    bad = np.flatnonzero(difference > tolerance)
    if not bad.size:
        return None
    first, largest = int(bad[0]), float(difference.max())
    text = (
        f"wrong from position {first} on ({bad.size} of {difference.size} positions), "
        f"largest difference {largest:.2e}, tolerance {tolerance:.0e}"
    )
    return Finding(**where, kind=kind, text=text, position=first, difference=largest)


def _widened(bounds: Sequence[Mapping[str, int]], layers: str, slots: int) -> list[Mapping[str, int]]:
    """Bounds that allow some slots more in every local layer."""
    return [
        {
            **bound,
            "most_slots": bound["most_slots"] + slots,
            "most_bytes": bound["most_bytes"] // bound["most_slots"] * (bound["most_slots"] + slots),
        }
        if layers[bound["layer"]] == "L"
        else bound
        for bound in bounds
    ]


def _check_caches(
    slots: Mapping[int, int] | None, size: int | None, layers: str, bounds: Sequence[Mapping[str, int]]
) -> list[str]:
    """What is wrong with the caches, in words."""
    texts = []
    for bound in bounds if slots is not None else ():
        index, least, most = bound["layer"], bound["least_slots"], bound["most_slots"]
        allocated = (slots or {}).get(index, 0)
        if not least <= allocated <= most:
            kind = "local" if layers[index] == "L" else "global"
            texts.append(f"layer {index} ({kind}) has {allocated} slots, expected {least} to {most}")
    if size is not None:
        least, most = (sum(bound[key] for bound in bounds) for key in ("least_bytes", "most_bytes"))
        if not least <= size <= most:
            texts.append(f"all caches have {size} bytes, expected {least} to {most}")
    return texts
