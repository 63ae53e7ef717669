"""Measure every contender on the same model and the same tokens, in turns, and write the report."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import text
from benchmarks.contender import Contender, Setup
from benchmarks.contenders import BASELINE, CONTENDERS, DEFAULT
from benchmarks.quiet import OtherCpu, wait_for_quiet
from benchmarks.report import Results, Row, Timing, draw, render
from benchmarks.worker import ContenderError, Worker
from transom.validation.evaluation.speed import processor
from transom.zoo.architectures import packaged
from transom.zoo.tokenizer import Tokenizer

ROOM = 256
"""Slots beyond the longest prompt; decoding may take this many tokens."""

_STARTED = time.monotonic()


class Entry:
    """A contender that takes part: its process, and what was found out so far. One that fails is out, with a note."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.row, self.setup = Row(name=name), setup
        self._worker: Worker | None = None

    def prepare(self) -> None:
        """Make what it runs, unless that is there already."""
        if not (Path(self.setup.artifacts) / self.row.name).is_dir():
            self._worker = Worker(self.row.name, self.setup)
            self.ask("prepare")
            self.close()

    def open(self, first: int) -> float | None:
        """Load the model in a fresh process; returns the seconds up to the first token."""
        self.close()
        if not self.row.note:
            self._worker = Worker(self.row.name, self.setup)
        seconds: float | None = self.ask("open", first)
        return seconds

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the contender; None if it is out."""
        if self._worker is None:
            return None
        try:
            return self._worker.call(method, *args)
        except ContenderError as error:
            self.row.note = str(error)
            say(f"{self.row.name}: {error}")
            self.close()
            return None

    def time(self, ids: Sequence[int], length: int, options: argparse.Namespace) -> Timing | None:
        """Read the first `length` tokens, then the rest one by one; None if it is out or too slow."""
        if self._worker is None or length in self.row.skipped:
            return None
        wait_for_quiet(options.patience)
        meter = OtherCpu(self._worker)
        try:
            prefill = self._worker.call("prefill", ids[:length], ROOM, cap=options.cap)
            decode = self._worker.call("decode", ids[length:], cap=options.cap)
        except ContenderError as error:
            self.row.skipped[length] = str(error)
            say(f"{self.row.name} at {length}: {error}")
            # The process may be gone, and it is wanted for the other lengths.
            self.open(ids[0])
            return None
        return Timing(prefill, decode, meter.read())

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the report")
    parser.add_argument("--artifacts", type=Path, help="keep exports here, and use those that are here, as they are")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT, metavar="NAME", help="who")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 8192], help="tokens of the prompts")
    parser.add_argument("--rounds", type=int, default=5, help="each contender is measured once a round")
    parser.add_argument("--decode-tokens", type=int, default=64, help=f"tokens to decode, at most {ROOM}")
    parser.add_argument("--perplexity-tokens", type=int, default=2045, help="tokens of the text to score")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender")
    parser.add_argument("--cap", type=float, default=120, help="a prompt that takes more seconds is left out")
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for quiet CPUs before a timing")
    parser.add_argument("--quick", action="store_true", help="one round of 512 tokens: does it all work?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.lengths, options.decode_tokens = 1, [512], 16
        options.perplexity_tokens = min(options.perplexity_tokens, 513)
    if not 1 <= options.decode_tokens <= ROOM:
        parser.error(f"--decode-tokens must lie in 1 to {ROOM}")
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(options, (options.artifacts or Path(scratch)).resolve())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results.to_json(), indent=1) + "\n")
    (options.out / "results.md").write_text(render(results))
    draw(results, options.out / "results.png")
    say(f"wrote {options.out}/results.md, .json and .png")


def measure(options: argparse.Namespace, artifacts: Path) -> Results:
    """All measurements of one run."""
    lengths = sorted(options.lengths)
    needed = max(options.perplexity_tokens, lengths[-1] + options.decode_tokens)
    ids = text.read_tokens(Tokenizer.from_gguf(packaged("gemma3-270m")), needed)
    context = max(lengths[-1] + ROOM, options.perplexity_tokens)
    folder = artifacts / f"context-{context}"
    setup = Setup(artifacts=str(folder), context=context, threads=options.threads)
    entries = [Entry(name, setup) for name in options.contenders]
    try:
        for entry in entries:
            say(f"prepare {entry.row.name}")
            entry.prepare()
        for number in range(options.rounds):
            for entry in in_turns(entries, number):
                wait_for_quiet(options.patience)
                if (seconds := entry.open(ids[0])) is not None:
                    entry.row.load_seconds.append(seconds)
                    say(f"load {entry.row.name}: {seconds:.2f} s")
        for length in lengths:
            _measure_speed(entries, ids[: length + options.decode_tokens], length, options)
        for entry in entries:
            _measure_rest(entry, ids[: options.perplexity_tokens])
    finally:
        for entry in entries:
            entry.close()
    rows = [entry.row for entry in entries]
    return Results(facts=facts(options), lengths=lengths, rows=rows)


def in_turns(entries: Sequence[Entry], number: int) -> list[Entry]:
    """All of them, each round with another one first, so that none always follows the same."""
    shift = number % len(entries)
    return [*entries[shift:], *entries[:shift]]


def _measure_speed(entries: Sequence[Entry], ids: list[int], length: int, options: argparse.Namespace) -> None:
    # Round 0 warms up: memory of that size is allocated, and who is too slow is found out.
    for number in range(options.rounds + 1):
        for entry in in_turns(entries, number):
            if (timing := entry.time(ids, length, options)) is None:
                continue
            if number:
                entry.row.timings.setdefault(length, []).append(timing)
            kind = f"round {number}" if number else "warm-up"
            speeds = f"{length / timing.prefill:.0f} tokens/s, then {1 / timing.decode:.1f}"
            say(f"{length} tokens, {kind}, {entry.row.name}: {speeds}{'' if timing.quiet else ', DISTURBED'}")


def _measure_rest(entry: Entry, ids: list[int]) -> None:
    row = entry.row
    row.description = entry.ask("describe") or ""
    row.weight_bytes = entry.ask("weight_bytes")
    row.cache_bytes = entry.ask("cache_bytes")
    # The logits of every position take memory that running a model does not need: so before them.
    row.peak_rss_bytes = entry.ask("peak_rss")
    row.log_likelihoods = entry.ask("log_likelihoods", ids) or []
    entry.close()
    if row.perplexity is not None:
        say(f"perplexity {row.name}: {row.perplexity:.3f}")


def facts(options: argparse.Namespace) -> dict[str, str]:
    """Machine, versions and protocol, for the report."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("transom", "onnxruntime", "llama-cpp-python", "transformers", "torch", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} CPUs, {memory:.0f} GiB, {platform.system()}",
        "versions": ", ".join([f"Python {platform.python_version()}", *(_version(name) for name in packages)]),
        "model": f"{Contender.model}, the real weights, all from one GGUF file (Q4_K_M)",
        "text": text.DESCRIPTION,
        "perplexity": f"{options.perplexity_tokens - 1} predictions in one sequence; beside it the change against "
        f"{BASELINE}, with its standard error from the differences token by token",
        "speed": f"{options.threads} threads each; {options.rounds} rounds after a warm-up; in a round all contenders "
        f"one after the other; median of undisturbed timings; {options.decode_tokens} tokens decoded, given ones, "
        "after each prompt",
        "memory": "peak resident memory while speed was measured, mapped files included; caches as allocated after "
        "the longest prompt",
        "load": "open the files in a fresh process and run one token; imports not counted, the checks that the "
        "library makes by default counted; files were read before, so they may come from memory",
    }


def say(line: str) -> None:
    """Tell how far it is."""
    minutes, seconds = divmod(int(time.monotonic() - _STARTED), 60)
    print(f"[{minutes:02}:{seconds:02}] {line}", file=sys.stderr, flush=True)


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


if __name__ == "__main__":
    main()
