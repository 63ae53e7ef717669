"""Compile the real Gemma 3 270M, check it against the reference, generate text, and show what its caches cost."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import transom
from transom.backends.session import Session
from transom.cli.export import stage_bars
from transom.cli.options import size
from transom.zoo.model import Model
from transom.zoo.plan import plan

MODEL, CONTEXT, NEW_TOKENS = "gemma3-270m", 4096, 64
SCHEMES = ("none", "int8", "int4")
PROMPT = (Path(__file__).parent / "prompt.txt").read_text().strip()

console = Console()


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder for the artifacts")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()

    model = transom.load(MODEL)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(PROMPT)
    console.print(
        f"[bold]{MODEL}[/bold]: a prompt of {len(ids)} tokens, more than twice the window of "
        f"{model.config.longest_window}; the reference is the plain PyTorch model in float32."
    )
    expected = reference_logits(model, ids)
    rows = [run(model, quant, ids, expected, options.out / f"{MODEL}-{quant}") for quant in SCHEMES]
    console.print(table(rows))
    console.print(
        f"Caches as allocated for {CONTEXT:,} tokens in float32; 'unbounded' is what they take when every layer grows, "
        "as traced.\nAgreement: how often the likeliest token is the reference's, and the largest difference of any "
        "logit, over all positions of the prompt."
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def run(model: Model, quant: str, ids: list[int], expected: NDArray[np.float32], folder: Path) -> dict[str, Any]:
    """Compile with one scheme, generate, and compare with the reference."""
    console.rule(f"onnxruntime, {quant}")
    with stage_bars() as on_progress:
        transom.compile(model, quant=quant, context=CONTEXT, out=folder, overwrite=True, on_progress=on_progress)
    session = transom.open(folder)
    session.reserve(CONTEXT)
    prefill, decode = generate(session, ids)
    top1, difference = compare(session, ids, expected)
    return {
        "quant": quant,
        "weight_bytes": (folder / "model.onnx.data").stat().st_size,
        "cache_bytes": sum(session.cache_bytes().values()),
        "cache_bytes_unbounded": plan(model.config, context=CONTEXT, cache_dtype="fp32").cache_bytes_global_only,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "top1_agreement": top1,
        "max_abs_difference": difference,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The results as people read them."""
    results = Table(title="Weights, caches, tokens per second, agreement with the reference")
    for name in ("quant", "weights", "caches", "unbounded", "prefill", "decode", "top-1", "max diff"):
        results.add_column(name, justify="left" if name == "quant" else "right")
    for row in rows:
        results.add_row(
            row["quant"],
            size(row["weight_bytes"]),
            size(row["cache_bytes"]),
            size(row["cache_bytes_unbounded"]),
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['max_abs_difference']:.1e}",
        )
    return results


def reference_logits(model: Model, ids: list[int]) -> NDArray[np.float32]:
    """Logits of the plain PyTorch model, float32 [T, V]."""
    with console.status("running the reference"), torch.no_grad():
        logits, _ = model.eager()(torch.tensor([ids]), torch.tensor(0), None)
    rows: NDArray[np.float32] = logits[0].numpy()
    return rows


def generate(session: Session, ids: list[int]) -> tuple[float, float]:
    """Print a continuation; returns tokens per second of prefill and decode."""
    assert session.tokenizer is not None
    stream, decoder = session.generate(ids, max_new_tokens=NEW_TOKENS, stop_ids=()), session.tokenizer.stream()
    began = time.perf_counter()
    tokens = [next(stream)]
    first = time.perf_counter()
    console.print(f"[dim]… {PROMPT[-75:]}[/dim]", end="", highlight=False)
    print(decoder.add(tokens[0]), end="", flush=True)
    for token in stream:
        tokens.append(token)
        print(decoder.add(token), end="", flush=True)
    print(decoder.finish())
    return len(ids) / (first - began), (len(tokens) - 1) / (time.perf_counter() - first)


def compare(session: Session, ids: list[int], expected: NDArray[np.float32]) -> tuple[float, float]:
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
