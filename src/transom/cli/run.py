"""`transom run`, `chat` and `bench`."""

from __future__ import annotations

import enum
import itertools
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from transom.backends.prompt import MARKER, Part, Prompt, split_at
from transom.backends.sampling import Sampling
from transom.backends.session import Session, TokenStream
from transom.cli.options import Folder, Json, Threads, console, print_json, progress_console, size
from transom.errors import ContextLengthError, ImageError, TokenizerError, TransomError
from transom.images.pan_and_scan import SETTINGS
from transom.zoo.text import argument_text, check_text, decode_text, read_text

Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Keep this many likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that add up to this probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this times the likeliest.")]
SampleSeed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]


class PanAndScanName(enum.StrEnum):
    """Keys of `images.pan_and_scan.SETTINGS`."""

    off = "off"
    hf = "hf"
    google = "google"


PanAndScanOption = Annotated[
    PanAndScanName,
    typer.Option(help="Show a long image in parts too: from a ratio of sides of 1.2 (hf) or of 1.5 (google) on."),
]
MaxNew = Annotated[int, typer.Option("--max-new-tokens", help="Stop after this many tokens.", min=1)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(run)
    app.command()(chat)
    app.command()(bench)


def run(
    folder: Folder,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue; - reads standard input.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image; several are given by several options. They stand at <image> in the text, or before it."
        ),
    ] = None,
    pan_and_scan: PanAndScanOption = PanAndScanName.off,
    max_new_tokens: MaxNew = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: SampleSeed = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a text, which may show images."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    text = _prompt(prompt, prompt_file)
    session, load_s = _open(folder, threads)
    decoder = _stream(folder, session)
    ids = _read(session, split_at(text, MARKER, image or []) if image or session.images else [text], pan_and_scan, json)
    session.reserve(len(ids) + max_new_tokens - 1)
    meter = _Meter()
    with _prefill_bar(len(ids), json) as on_chunk:
        stream = session.generate(ids, max_new_tokens=max_new_tokens, sampling=sampling, on_chunk=on_chunk)
        first = list(meter.watch(stream, first_only=True))
    if not json:
        # As it is: neither wrapped nor read as markup.
        console.print(Text(text, style="dim"), end="", soft_wrap=True)
    tokens: list[int] = []
    pieces: list[str] = []
    for token in itertools.chain(first, meter.watch(stream)):
        tokens.append(token)
        pieces.append(decoder.add(token))
        _say(pieces[-1], json)
    pieces.append(decoder.finish())
    _say(pieces[-1] + "\n", json)
    report = meter.report(len(ids), len(tokens)) | _memory(session, load_s)
    if json:
        print_json({"text": "".join(pieces), "tokens": tokens, "prompt_tokens": len(ids), **report})
        return
    _summary(report)


def bench(
    folder: Folder,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt to time.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=1)] = 64,
    past: Annotated[int, typer.Option(help="Tokens in the caches before decoding; by default the prompt.", min=0)] = 0,
    repeat: Annotated[int, typer.Option(help="Take the median of this many runs.", min=1)] = 1,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Time prefill and decode on random tokens."""
    session, load_s = _open(folder, threads)
    generator = np.random.default_rng(0)
    past = max(past, prompt_tokens)
    session.reserve(past + new_tokens)
    # Control tokens stand at the front of the vocabulary.
    low = min(300, session.vocab_size // 2)
    ids = generator.integers(low, session.vocab_size, past + new_tokens).tolist()
    prefill, decode = [], []
    for _ in range(repeat):
        session.reset()
        began = time.perf_counter()
        session.prefill(ids[:prompt_tokens])
        prefill.append(time.perf_counter() - began)
        if past > prompt_tokens:
            session.prefill(ids[prompt_tokens:past])
        began = time.perf_counter()
        for token in ids[past:]:
            session.decode(token)
        decode.append(time.perf_counter() - began)
    report = {
        "prompt_tokens": prompt_tokens,
        "past": past,
        "new_tokens": new_tokens,
        "prefill_tokens_per_s": prompt_tokens / float(np.median(prefill)),
        "decode_tokens_per_s": new_tokens / float(np.median(decode)),
        **_memory(session, load_s),
    }
    if json:
        print_json(report)
        return
    table = Table("measure", "value", title=f"{escape(str(folder))}, random tokens")
    table.add_row("prefill", f"{report['prefill_tokens_per_s']:.1f} tokens/s, prompt of {prompt_tokens:,}")
    table.add_row("decode", f"{report['decode_tokens_per_s']:.1f} tokens/s, {new_tokens:,} after {past:,}")
    table.add_row("caches", _caches(report))
    table.add_row("peak memory", size(report["peak_rss_bytes"]))
    table.add_row("load", f"{load_s:.2f} s")
    console.print(table)


def chat(
    folder: Folder,
    system: Annotated[str | None, typer.Option(help="Instructions for the whole conversation.")] = None,
    pan_and_scan: PanAndScanOption = PanAndScanName.off,
    max_new_tokens: MaxNew = 512,
    temperature: Annotated[float | None, typer.Option(help="By default what the artifact says.")] = None,
    top_k: Annotated[int | None, typer.Option(help="By default what the artifact says.")] = None,
    top_p: Annotated[float | None, typer.Option(help="By default what the artifact says.")] = None,
    min_p: Annotated[float | None, typer.Option(help="By default what the artifact says.")] = None,
    seed: SampleSeed = None,
    threads: Threads = None,
) -> None:
    """Talk with an instruction-tuned model. An empty line, or end of input, ends the conversation.

    A line "/image FILE" shows an image with the next line.
    """
    from transom.zoo.chat import Message
    from transom.zoo.generation import read_sampling

    system = None if system is None else argument_text(system, "--system")
    session, _ = _open(folder, threads)
    sampling = _sampling(read_sampling(folder), temperature, top_k, top_p, min_p, seed)
    _stream(folder, session)
    assert session.tokenizer is not None
    session.tokenizer.check_template()
    messages: list[Message] = [Message(role="system", content=system.replace(_IMAGE, ""))] if system else []
    cached_ids: list[int] = []
    images: list[Path] = []
    shown = 0
    while (line := _ask()) is not None:
        if line.split()[0] == "/image":
            shown += _show(session, line, images, pan_and_scan)
            continue
        content = _IMAGE * shown + line.replace(_IMAGE, "")
        messages.append(Message(role="user", content=content))
        try:
            check_text(line, "the line")
            text = session.tokenizer.chat_text(messages)
            parts = split_at(text, _IMAGE, images) if images else [text]
            prompt = session.prompt(parts, pan_and_scan=SETTINGS[pan_and_scan], bos=False)
            _check_room(session, len(prompt))
        except (ContextLengthError, ImageError, TokenizerError) as error:
            # The conversation is as it was before the line.
            messages.pop()
            del images[len(images) - shown :]
            shown = 0
            progress_console.print(f"[yellow]left out:[/yellow] {escape(str(error))}", highlight=False, soft_wrap=True)
            continue
        shown, ids = 0, prompt.tokens.tolist()
        same = next(
            (i for i, (a, b) in enumerate(zip(cached_ids, ids, strict=False)) if a != b), min(len(cached_ids), len(ids))
        )
        # Caches of local layers cannot be rewound, so they are kept only if nothing in them changed.
        keep = same == len(cached_ids) and len(ids) > same
        new = prompt.after(same) if keep else prompt
        decoder, answer = _stream(folder, session), []
        # A conversation may fill the context; only when not one token more fits is it over.
        room = max(1, min(max_new_tokens, session.context - len(ids) + 1))
        for token in session.generate(new, max_new_tokens=room, sampling=sampling, keep=keep):
            answer.append(token)
            _say(decoder.add(token), quiet=False)
        _say(decoder.finish() + "\n", quiet=False)
        cached_ids = [*ids, *answer][: session.position]
        messages.append(Message(role="assistant", content=session.tokenizer.decode(answer).replace(_IMAGE, "")))


_IMAGE = "\ufffc"
"""Where an image stands in the text of a conversation: Unicode's own character for an object among letters."""


def _show(session: Session, line: str, images: list[Path], pan_and_scan: PanAndScanName) -> int:
    """Read the image of a line "/image FILE" and put it to the others; returns how many images that are more."""
    path = Path(line.removeprefix("/image").strip())
    try:
        session.prompt([path], pan_and_scan=SETTINGS[pan_and_scan], bos=False)
    except TransomError as error:
        progress_console.print(f"[yellow]left out:[/yellow] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 0
    images.append(path)
    return 1


def _sampling(
    settings: Mapping[str, Any],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | None,
) -> Sampling:
    """What the artifact says, where the user does not say otherwise; greedy if it does not sample."""
    own = 0.0 if not settings["do_sample"] else settings["temperature"]
    return Sampling(
        temperature=own if temperature is None else temperature,
        top_k=settings.get("top_k", 0) if top_k is None else top_k,
        top_p=settings.get("top_p", 1.0) if top_p is None else top_p,
        min_p=settings.get("min_p", 0.0) if min_p is None else min_p,
        seed=seed,
    )


def _check_room(session: Session, tokens: int) -> None:
    """Raise an error for a conversation that is empty, or after which not one token more can be had."""
    if not tokens:
        raise TokenizerError("the chat template writes nothing for this conversation: mend it, or export without it")
    if tokens > session.context:
        raise ContextLengthError(
            f"with this line the conversation has {tokens} tokens, its context holds {session.context}: say it "
            "shorter, begin anew, or export with a larger --context"
        )


def _ask() -> str | None:
    if sys.stdin is None:
        return None
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except UnicodeError as error:
        raise TokenizerError(f"standard input is not {sys.stdin.encoding} ({error}): write UTF-8") from error
    return line.removeprefix("\ufeff").strip() or None


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is None:
        return argument_text(prompt, "--prompt")
    if prompt is not None or prompt_file is None:
        raise TokenizerError("give either --prompt TEXT or --prompt-file FILE")
    if str(prompt_file) == "-" and sys.stdin is not None:
        return decode_text(sys.stdin.buffer.read(), "standard input")
    return read_text(prompt_file)


def _read(session: Session, parts: Sequence[Part], pan_and_scan: PanAndScanName, quiet: bool) -> Prompt:
    """A prompt, with a bar while images are encoded."""
    with Progress(console=progress_console, transient=True, disable=quiet or not progress_console.is_terminal) as bars:
        task = bars.add_task("image", total=None, visible=False)

        def on_image(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total, visible=True)

        return session.prompt(parts, pan_and_scan=SETTINGS[pan_and_scan], on_image=on_image)


def _open(folder: Path, threads: int | None) -> tuple[Session, float]:
    import transom

    began = time.perf_counter()
    session = transom.open(folder, threads=threads)
    if session.note:
        progress_console.print(f"[yellow]note:[/yellow] {escape(session.note)}", highlight=False)
    return session, time.perf_counter() - began


def _stream(folder: Path, session: Session) -> TokenStream:
    if session.tokenizer is None:
        raise TokenizerError(f"{folder} has no tokenizer, so it cannot read text: export from a source that has one")
    return session.tokenizer.stream()


def _say(text: str, quiet: bool) -> None:
    if not quiet and text:
        print(text, end="", flush=True)


@contextmanager
def _prefill_bar(total: int, quiet: bool) -> Iterator[Any]:
    """A bar while a long prompt is read."""
    with Progress(console=progress_console, transient=True, disable=quiet or not progress_console.is_terminal) as bars:
        task = bars.add_task("prompt", total=total)
        yield lambda count: bars.advance(task, count)


class _Meter:
    """Times a stream of tokens: up to the first it is prefill, from there on decode."""

    def __init__(self) -> None:
        self.prefill = self.decode = 0.0

    def watch(self, stream: Iterator[int], *, first_only: bool = False) -> Iterator[int]:
        while True:
            began = time.perf_counter()
            token = next(stream, None)
            spent = time.perf_counter() - began
            if first_only:
                self.prefill = spent
            elif token is not None:
                self.decode += spent
            if token is None:
                return
            yield token
            if first_only:
                return

    def report(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        return {
            "prefill_tokens_per_s": prompt_tokens / self.prefill,
            "decode_tokens_per_s": (new_tokens - 1) / self.decode if self.decode else None,
        }


def _memory(session: Session, load_s: float) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "cache_bytes": session.cache_bytes(),
        # Linux counts in KiB, macOS in bytes.
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "load_s": load_s,
    }


def _summary(report: dict[str, Any]) -> None:
    decode = report["decode_tokens_per_s"]
    speed = f"prefill {report['prefill_tokens_per_s']:.0f} tokens/s" + (f", decode {decode:.1f}" if decode else "")
    memory = f"caches {_caches(report)}, peak {size(report['peak_rss_bytes'])}"
    progress_console.print(
        f"[dim]{speed}, {memory}, loaded in {report['load_s']:.1f} s[/dim]",
        highlight=False,
    )


def _caches(report: dict[str, Any]) -> str:
    """Bytes of caches of every kind."""
    return " + ".join(f"{size(count)} {kind}" for kind, count in report["cache_bytes"].items())
