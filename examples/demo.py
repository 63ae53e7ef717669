"""Compile the real Gemma 3 270M, check it against the reference, generate text, and show what its caches cost."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import transom
from rich.console import Console
from rich.table import Table
from transom.backends.session import Session
from transom.cli.export import stage_bars
from transom.cli.options import size
from transom.export.compile import compile_model
from transom.zoo.model import Model
from transom.zoo.plan import plan

MODEL, CONTEXT, NEW_TOKENS = "gemma3-270m", 4096, 64
SCHEMES = ("none", "int8", "int4")
PROMPT = Path(__file__).parent / "prompt.txt"

console = Console()


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder for the artifacts")
    out: Path = parser.parse_args().out

    model = transom.load(MODEL)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(PROMPT.read_text())
    console.print(
        f"[bold]{MODEL}[/bold]: a prompt of {len(ids)} tokens, more than twice the window of {model.config.window}; "
        "the reference is the plain PyTorch model in float32."
    )
    expected = reference_logits(model, ids)
    table = Table(
        "weights", "bytes", "prefill", "decode", "bounded", "global-only", "top-1", "largest difference", title="Result"
    )
    sizes = plan(model.config, context=CONTEXT, cache_dtype="fp32")
    for quant in SCHEMES:
        folder = out / f"{MODEL}-{quant}"
        console.rule(f"onnxruntime, {quant}")
        with stage_bars() as on_progress:
            compile_model(model, quant=quant, context=CONTEXT, out=folder, overwrite=True, on_progress=on_progress)
        session = transom.open(folder)
        prefill, decode = generate(session, ids)
        caches = session.cache_bytes()
        agreement, difference = compare(session, ids, expected)
        table.add_row(
            quant,
            size((folder / "model.onnx.data").stat().st_size),
            f"{prefill:.0f} tokens/s",
            f"{decode:.0f} tokens/s",
            size(caches["local"] + caches["global"]),
            size(sizes.cache_bytes_global_only),
            f"{agreement:.1%}",
            f"{difference:.2g}",
        )
    console.print(table)
    console.print(
        f"Caches as allocated for {CONTEXT:,} tokens of context in float32; 'global-only' is what they take when every "
        "layer grows.\nTop-1 and the largest difference of logits: against the reference, at every position of the "
        "prompt."
    )


def reference_logits(model: Model, ids: list[int]) -> np.ndarray:
    """Logits of the plain PyTorch model, float32 [T, V]."""
    with console.status("running the reference"), torch.no_grad():
        logits, _ = model.eager()(torch.tensor([ids]), torch.tensor(0), None)
    return logits[0].numpy()


def generate(session: Session, ids: list[int]) -> tuple[float, float]:
    """Print a continuation; returns tokens per second of prefill and decode."""
    assert session.tokenizer is not None
    session.reserve(CONTEXT)
    stream, decoder = session.generate(ids, max_new_tokens=NEW_TOKENS, stop_ids=()), session.tokenizer.stream()
    began = time.perf_counter()
    token = next(stream)
    first = time.perf_counter()
    console.print(f"[dim]… {PROMPT.read_text()[-60:].strip()}[/dim]", end="", highlight=False)
    print(decoder.add(token), end="", flush=True)
    count = 0
    for count, token in enumerate(stream, 1):  # noqa: B007 (counts the tokens after the first)
        print(decoder.add(token), end="", flush=True)
    print(decoder.finish())
    return len(ids) / (first - began), count / (time.perf_counter() - first)


def compare(session: Session, ids: list[int], expected: np.ndarray) -> tuple[float, float]:
    """Share of positions with the same likeliest token, and the largest difference of logits."""
    same, largest, position = 0, 0.0, 0
    session.reset()
    for logits in session.feed(ids, wanted="all"):
        rows = expected[position : position + len(logits)]
        same += int((logits.argmax(-1) == rows.argmax(-1)).sum())
        largest = max(largest, float(np.abs(logits - rows).max()))
        position += len(logits)
    return same / len(ids), largest


if __name__ == "__main__":
    main()
