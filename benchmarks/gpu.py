"""Programs of the target `xla` on a GPU: logits against the reference, memory, and speed beside PyTorch's.

    python benchmarks/gpu.py --model gemma3-1b --schemes none,int8,int4 --out DIR

This file and a checkout are all that a machine needs beside jax, torch, safetensors, tokenizers, jinja2 and, for its
card, jax's plugin: weights are random, nothing is fetched, and `transom` need not be installed. Exits with 1 if a
program fails or its logits are out of tolerance, with 2 if it cannot start.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

if importlib.util.find_spec("transom") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "typings"))

import transom
from transom.backends.session import Session
from transom.backends.xla.runtime import XlaRuntime
from transom.errors import ContextLengthError, TargetError, TransomError
from transom.export.options import Options
from transom.validation.compare import Differences, compare
from transom.validation.judge import judge
from transom.validation.oracle import Oracle
from transom.validation.tolerances import tolerance
from transom.zoo.config import AttentionLayer
from transom.zoo.layers import Decoder
from transom.zoo.model import Model

DTYPE = "bfloat16"
"""What everything but the reference computes in."""

SEED = 0
"""Of the weights and of the tokens."""

PLATFORMS = {"auto": None, "cpu": "cpu", "cuda": "cuda,cpu", "rocm": "rocm,cpu"}
"""What jax is told; the CPU stays beside a GPU, for what runs there. None: a GPU if jax can start one."""

_STARTED = time.monotonic()

Float = NDArray[np.float32]


class Runner(Protocol):
    """What is measured: it reads tokens after those that its caches hold."""

    def reset(self) -> None:
        """Forget all tokens."""

    def prefill(self, tokens: Sequence[int]) -> Float:
        """Run tokens; returns the logits [V] of the last one."""

    def chunks(self, tokens: Sequence[int]) -> Iterator[Float]:
        """Run tokens; yields the logits [T, V] of each call."""


class XlaRunner:
    """The session of an artifact."""

    def __init__(self, session: Session) -> None:
        assert isinstance(session.runtime, XlaRuntime)
        self.session, self.runtime = session, session.runtime
        session.refuses_nonfinite = False  # the verdict says from which position on logits are no numbers

    def reset(self) -> None:
        self.session.reset()

    def prefill(self, tokens: Sequence[int]) -> Float:
        return self.session.prefill(tokens)

    def chunks(self, tokens: Sequence[int]) -> Iterator[Float]:
        return self.session.feed(tokens, wanted="all")


class TorchRunner:
    """The zoo's module with caches in torch's memory, and calls of as many tokens as the session's.

    Args:
        module: On the device that it runs on.
        model: What it is.
        context: Slots of the caches of global layers.
        chunk: Most new tokens in one call; local layers keep a window and one call.
        compile_mode: How `torch.compile` is called; None runs eagerly.
    """

    def __init__(self, module: Decoder, model: Model, *, context: int, chunk: int, compile_mode: str | None) -> None:
        self._module, self._context, self._chunk = module, context, chunk
        self._layers = [layer for layer in model.config.layers if isinstance(layer, AttentionLayer)]
        weight = next(module.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._step: Callable[..., Any] = self._run
        if compile_mode is not None:
            # The factor of an embedding is read from a tensor: one graph with it, two without.
            torch._dynamo.config.capture_scalar_outputs = True
            self._step = torch.compile(self._run, mode=compile_mode, dynamic=False)
        self.reset()

    def reset(self) -> None:
        self._position = 0
        self._caches: list[tuple[torch.Tensor, ...]] = []  # the old ones go first, so that there are never two sets
        self._caches = [
            tuple(
                torch.zeros((1, layer.kv_heads, slots, width), dtype=self._dtype, device=self._device)
                for width in (layer.key_width, layer.value_width)
            )
            for layer in self._layers
            if layer.kv_heads
            for slots in [min(self._context, (layer.window or self._context) + self._chunk - 1)]
        ]

    def prefill(self, tokens: Sequence[int]) -> Float:
        for low in range(0, len(tokens), self._chunk):
            # Every call brings its logits to the host, as the session does.
            logits = self._call(self._step, tokens[low : low + self._chunk], 1)
        return np.asarray(logits[-1])

    def chunks(self, tokens: Sequence[int]) -> Iterator[Float]:
        for low in range(0, len(tokens), self._chunk):
            part = tokens[low : low + self._chunk]
            # A shape more would be compiled for positions that only the comparison wants.
            yield self._call(self._step if len(part) == 1 else self._run, part, len(part))

    def cache_bytes(self) -> int:
        """Of all caches."""
        return sum(tensor.nbytes for pair in self._caches for tensor in pair)

    def _call(self, step: Callable[..., Any], tokens: Sequence[int], positions: int) -> Float:
        tokens_BT = torch.tensor([list(tokens)], device=self._device)
        start = torch.tensor(self._position, device=self._device)
        with torch.no_grad():
            logits, self._caches = step(tokens_BT, start, self._caches, positions)
        self._position += len(tokens)
        rows: Float = logits[0].float().cpu().numpy()
        return rows

    def _run(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: Any, positions: int
    ) -> tuple[torch.Tensor, Any]:
        x_BTD, caches = self._module.hidden(tokens_BT, start, caches)
        return self._module.head(x_BTD[:, -positions:]), caches


@dataclasses.dataclass(kw_only=True)
class Row:
    """What was measured of one runner. None: not measured, or not known on this device.

    Attributes:
        name: What runs, and the scheme of its weights.
        quant: Name of the scheme.
        device: Where it ran.
        note: Why it, or a part of it, was not measured.
        prefill_seconds: Of the prompt, one a turn.
        decode_seconds: Of all new tokens together, one a turn.
        warm_up_seconds: Compiling included.
        weight_bytes: Of the weights as stored.
        cache_bytes: As allocated.
        device_bytes: In use on the device after the warm-up, less what was in use before.
        scratch_bytes: Most that a call takes beside that.
        relative: Largest difference of a logit from the reference's, as a share of the largest of its position.
        kl_mean: Mean KL(reference || this), in nats.
        top1: Share of positions with the same likeliest token.
        failures: What is out of tolerance; None if nothing was compared.
    """

    name: str
    quant: str
    device: str
    note: str = ""
    prefill_seconds: list[float] = dataclasses.field(default_factory=list)
    decode_seconds: list[float] = dataclasses.field(default_factory=list)
    warm_up_seconds: float | None = None
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    device_bytes: int | None = None
    scratch_bytes: int | None = None
    relative: float | None = None
    kl_mean: float | None = None
    top1: float | None = None
    failures: list[str] | None = None

    @property
    def exported(self) -> bool:
        """Whether it is a program of ours."""
        return self.name.startswith("xla")


@dataclasses.dataclass(kw_only=True)
class Entry:
    """A row and what fills it; no runner: it is out."""

    row: Row
    runner: Runner | None = None

    def attempt(self, action: Callable[..., None], *args: Any) -> None:
        """Do something; what fails puts the entry out, with a note, and the others go on."""
        try:
            action(*args)
        except Exception as error:  # runtimes and compilers raise dozens of classes without a common base
            line = " ".join(str(error).split())[:300]
            self.row.note, self.runner = f"failed: {type(error).__name__}: {line}", None
            say(f"{self.row.name}: {self.row.note}")
            # The traceback keeps the runner's memory.
            error.__traceback__ = None
            gc.collect()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma3-1b", help="a preset's name")
    parser.add_argument("--context", type=int, default=4096, help="slots of the caches of global layers")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to decode after it")
    parser.add_argument("--chunk", type=int, default=512, help="most tokens of the prompt in one call")
    parser.add_argument("--schemes", default="none,int8,int4", help="schemes of the exported weights, with commas")
    parser.add_argument("--platform", choices=PLATFORMS, default="auto", help="where jax runs")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count, after the warm-up")
    parser.add_argument("--compile-mode", default="default", help="mode of torch.compile, or off to leave it out")
    parser.add_argument("--compile-limit", type=int, default=300, help="seconds after which torch.compile is left out")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.md and results.json")
    options = parser.parse_args(arguments)
    if min(options.prompt, options.new, options.chunk, options.repeats, options.compile_limit) < 1:
        parser.error("--prompt, --new, --chunk, --repeats and --compile-limit must be at least 1")
    try:
        return measure(options)
    except (TransomError, OSError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2


def measure(options: argparse.Namespace) -> int:
    """Measure all and write the results; returns the exit status."""
    length = options.prompt + options.new
    if length > options.context:
        raise ContextLengthError(f"{length} tokens do not fit into --context {options.context}: give a larger one")
    model = transom.load(options.model, weights="random", seed=SEED)
    schemes = options.schemes.split(",")
    for quant in schemes:
        Options.of(model, target="xla", quant=quant, dtype=DTYPE, context=options.context)
    options.chunk = min(options.chunk, options.context)
    jax = start_jax(options.platform)
    options.out.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(SEED).integers(0, model.config.vocab_size, length).tolist()
    known = facts(options, model, jax)
    with tempfile.TemporaryDirectory() as scratch:
        entries = [
            open_xla(model, quant, Path(scratch) / str(index), options, jax) for index, quant in enumerate(schemes)
        ]
        entries += open_torch(model, options, jax)
        for entry in entries:
            warm_up(entry, tokens, options)
        for number in range(options.repeats):
            # Each turn begins with another one, so that none always follows the same.
            shift = number % len(entries)
            for entry in [*entries[shift:], *entries[:shift]]:
                entry.attempt(time_once, entry, tokens, options)
            say(f"turn {number + 1} of {options.repeats}")
        # What was measured is on the disk before the next comparison takes its time.
        write(options, known, [entry.row for entry in entries])
        for _ in check(entries, model, tokens, options):
            write(options, known, [entry.row for entry in entries])
    say(f"wrote {options.out}/results.md and results.json")
    return int(any(entry.row.exported and (entry.row.note or entry.row.failures) for entry in entries))


def start_jax(chosen: str) -> Any:
    """The `jax` module, on the platform that was chosen.

    Raises:
        TargetError: If jax is missing or starts no device of that platform.
    """
    # Otherwise jax takes three quarters of the card at once, and torch runs beside it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if (names := PLATFORMS[chosen]) is not None:
        os.environ["JAX_PLATFORMS"] = names
    # Not before: jax reads its environment when it is imported.
    from transom.backends.xla.library import load_jax

    try:
        jax = load_jax()
        backend = jax.default_backend()
    except TargetError as error:
        if chosen == "auto":
            raise
        raise TargetError(f"--platform {chosen}: {error}") from error
    if chosen in ("cuda", "rocm") and backend != "gpu":
        raise TargetError(
            f"--platform {chosen}: jax starts no such GPU here and runs on {backend}: install jax's plugin for the "
            "card, or give --platform cpu"
        )
    return jax


def open_xla(model: Model, quant: str, folder: Path, options: argparse.Namespace, jax: Any) -> Entry:
    """Export a scheme and open its session."""
    row = Row(name=f"xla {quant}", quant=quant, device=device_name(jax))
    entry = Entry(row=row)

    def export() -> None:
        say(f"export {row.name}")
        transom.compile(
            model,
            target="xla",
            quant=quant,
            dtype=DTYPE,
            context=options.context,
            chunk=options.chunk,
            out=folder,
            on_progress=stages(),
        )
        before = bytes_in_use(jax)
        session = transom.open(folder, verify=False)
        entry.runner = XlaRunner(session)
        session.reserve(options.context)
        row.weight_bytes = (folder / "weights.safetensors").stat().st_size
        row.cache_bytes = sum(session.cache_bytes().values())
        after = bytes_in_use(jax)
        row.device_bytes = None if before is None or after is None else after - before

    entry.attempt(export)
    return entry


def open_torch(model: Model, options: argparse.Namespace, jax: Any) -> list[Entry]:
    """The zoo's module in torch, eager and compiled; both share its weights."""
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    say(f"load torch on {device}")
    allocated = torch.cuda.memory_allocated() if on_gpu else 0
    module = model.eager(getattr(torch, DTYPE)).to(device)
    module_bytes = torch.cuda.memory_allocated() - allocated if on_gpu else None
    modes = [None] if options.compile_mode == "off" else [None, options.compile_mode]
    entries = []
    for mode in modes:
        row = Row(
            name="torch eager" if mode is None else f"torch.compile ({mode})",
            quant="none",
            device=torch.cuda.get_device_name() if on_gpu else "cpu",
            weight_bytes=sum(weight.nbytes for weight in module.parameters()),
        )
        entry = Entry(row=row)

        def start(entry: Entry = entry, mode: str | None = mode) -> None:
            before = torch.cuda.memory_allocated() if on_gpu else 0
            runner = TorchRunner(module, model, context=options.context, chunk=options.chunk, compile_mode=mode)
            entry.row.cache_bytes = runner.cache_bytes()
            if module_bytes is not None:
                entry.row.device_bytes = module_bytes + torch.cuda.memory_allocated() - before
            entry.runner = runner

        entry.attempt(start)
        entries.append(entry)
    return entries


def warm_up(entry: Entry, tokens: Sequence[int], options: argparse.Namespace) -> None:
    """Compile what needs compiling, and measure memory."""
    on_gpu = isinstance(entry.runner, TorchRunner) and entry.row.device != "cpu"

    def run() -> None:
        say(f"warm up {entry.row.name}")
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with limited(options.compile_limit if "compile" in entry.row.name else None):
            _read(entry, tokens, options.prompt)
        entry.row.warm_up_seconds = time.perf_counter() - began
        if on_gpu:
            entry.row.scratch_bytes = torch.cuda.max_memory_allocated() - before
        elif isinstance(entry.runner, XlaRunner):
            entry.row.scratch_bytes = entry.runner.runtime.scratch_bytes()

    if entry.runner is not None:
        entry.attempt(run)


def time_once(entry: Entry, tokens: Sequence[int], options: argparse.Namespace) -> None:
    """One turn."""
    if entry.runner is not None:
        prefill, decode = _read(entry, tokens, options.prompt)
        entry.row.prefill_seconds.append(prefill)
        entry.row.decode_seconds.append(decode)


def _read(entry: Entry, tokens: Sequence[int], prompt: int) -> tuple[float, float]:
    """Read the prompt, then the rest one by one; returns the seconds of both. Logits are on the host at each end."""
    runner = entry.runner
    assert runner is not None
    runner.reset()
    began = time.perf_counter()
    runner.prefill(tokens[:prompt])
    middle = time.perf_counter()
    for token in tokens[prompt:]:
        runner.prefill([token])
    return middle - began, time.perf_counter() - middle


def check(entries: Sequence[Entry], model: Model, tokens: Sequence[int], options: argparse.Namespace) -> Iterator[None]:
    """Compare every position's logits, of the prompt and of the decoded tokens, with the float32 module's.

    Yields after each entry.
    """
    for quant in dict.fromkeys(entry.row.quant for entry in entries if entry.runner is not None):
        say(f"reference of {quant}, float32 on the CPU")
        oracle = Oracle(model, quant, tokens)
        for entry in entries:
            if entry.runner is not None and entry.row.quant == quant:
                entry.attempt(_check, entry, oracle, tokens, options.prompt)
                yield


def _check(entry: Entry, oracle: Oracle, tokens: Sequence[int], prompt: int) -> None:
    row, runner = entry.row, entry.runner
    assert runner is not None
    say(f"check {row.name}")
    runner.reset()
    read: list[Differences] = []
    for logits in runner.chunks(tokens[:prompt]):
        read.append(compare(logits, oracle.text.logits, sum(len(part.kl) for part in read)))
    decoded = [
        compare(runner.prefill([tokens[position]])[None], oracle.text.logits, position)
        for position in range(prompt, len(tokens))
    ]
    both = Differences.join([*read, *decoded])
    row.relative, row.kl_mean = float(both.relative.max()), float(both.kl.mean())
    row.top1 = float((both.gap == 0).mean())
    bound = tolerance("xla", dtype=DTYPE, quant=row.quant)
    row.failures = [
        *judge("prefill", Differences.join(read), bound),
        *judge("decode", Differences.join(decoded), bound),
    ]
    for line in row.failures:
        say(f"{row.name}: OUT OF TOLERANCE: {line}")


def facts(options: argparse.Namespace, model: Model, jax: Any) -> dict[str, str]:
    """Machine, versions and protocol: a label and a sentence each."""
    client = jax.devices()[0].client
    window = model.config.longest_window
    past = "no layer has a window" if window is None else f"the window is {window}"
    if window is not None and options.prompt <= window:
        past += ": NOT past the window, give a longer --prompt"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{device_name(jax)} for jax ({' '.join(client.platform_version.split())})",
        "driver": driver(),
        "versions": f"transom {transom.__version__}, jax {jax.__version__}, torch {torch.__version__} "
        f"(CUDA {torch.version.cuda or 'none'}), Python {platform.python_version()}, {platform.system()}",
        "torch": "on the card" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "on the CPU",
        "model": f"{model.config.name}, random weights of seed {SEED}, {model.parameters:,} parameters; everything "
        f"computes in {DTYPE}, caches included",
        "work": f"a prompt of {options.prompt} random tokens in calls of at most {options.chunk}, then {options.new} "
        f"given tokens one by one, in a context of {options.context}; {past}",
        "speed": f"median of {options.repeats} turns after a warm-up; in a turn all run one after the other; every "
        "call ends with the logits of one position on the host",
        "memory": "weights as stored; device: what weights and caches took on the card, by jax's or torch's own count; "
        "scratch: most that a call takes beside that, by XLA's plan of its programs or torch's peak in the warm-up",
        "difference": "from the plain module in eager float32 on the CPU, of a scheme with the numbers that its codes "
        "mean, over all positions of prompt and decode; bounds are those of validation/tolerances.py",
    }


def device_name(jax: Any) -> str:
    """The card as jax names it."""
    return str(jax.devices()[0].device_kind)


def driver() -> str:
    """Of an NVIDIA card, with its name and memory."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not tell"


def bytes_in_use(jax: Any) -> int | None:
    """Of jax's device; None where it does not count."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("bytes_in_use") if stats else None


def write(options: argparse.Namespace, known: dict[str, str], rows: Sequence[Row]) -> None:
    """Write results.json and results.md."""
    rates = [
        {"prefill": rate(options.prompt, row.prefill_seconds), "decode": rate(options.new, row.decode_seconds)}
        for row in rows
    ]
    contents = {
        "facts": known,
        "rows": [dataclasses.asdict(row) | {"tokens_per_second": both} for row, both in zip(rows, rates, strict=True)],
    }
    (options.out / "results.json").write_text(json.dumps(contents, indent=1) + "\n")
    (options.out / "results.md").write_text(render(known, rows, rates))


def rate(tokens: int, seconds: Sequence[float]) -> float | None:
    """Median tokens a second; None without a timing."""
    return tokens / statistics.median(seconds) if seconds else None


def render(known: dict[str, str], rows: Sequence[Row], rates: Sequence[dict[str, float | None]]) -> str:
    """The page."""
    lines = [
        f"# {known['model'].partition(',')[0]} through XLA and PyTorch",
        "",
        "| | runs on | prefill, tokens/s | decode, tokens/s | warm-up, s | weights, MB | caches, MB | device, MB | "
        "scratch, MB | largest difference | mean KL, nats | top-1 | verdict |",
        f"|---|---|{'---:|' * 10}---|",
    ]
    for row, both in zip(rows, rates, strict=True):
        numbers = [
            shown(both["prefill"], "{:,.0f}"),
            shown(both["decode"], "{:,.1f}"),
            shown(row.warm_up_seconds, "{:.1f}"),
            *(
                shown(None if count is None else count / 1e6, "{:,.1f}")
                for count in (row.weight_bytes, row.cache_bytes, row.device_bytes, row.scratch_bytes)
            ),
            shown(row.relative, "{:.2%}"),
            shown(row.kl_mean, "{:.1e}"),
            shown(row.top1, "{:.1%}"),
        ]
        passes = "not compared" if row.failures is None else "; ".join(row.failures) or "within tolerance"
        verdict = (row.note or passes).replace("|", "/")
        lines.append(f"| {row.name} | {row.device} | {' | '.join(numbers)} | {verdict} |")
    return "\n".join([*lines, "", *(f"- {label}: {text}" for label, text in known.items()), ""])


def shown(value: float | None, pattern: str) -> str:
    """A number, or a dash."""
    return "-" if value is None else pattern.format(value)


def stages() -> Callable[[str, int, int], None]:
    """Prints each stage of an export once."""
    seen: set[str] = set()

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            say(f"  {stage}")

    return on_progress


@contextmanager
def limited(seconds: int | None) -> Iterator[None]:
    """In the block, a `TimeoutError` comes after so many seconds; None: never."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    if seconds is not None:
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def say(line: str) -> None:
    """Tell how far it is."""
    minutes, seconds = divmod(int(time.monotonic() - _STARTED), 60)
    print(f"[{minutes:02}:{seconds:02}] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
