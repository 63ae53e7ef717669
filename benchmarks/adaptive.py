"""Learned windows against a fixed ratio of local to global layers, at equal cache bytes, on one small task.

    python -m benchmarks.adaptive --out benchmarks/results

Sequences begin with random words; then comes text in which the next token follows from the two before it; in the end
the words are to be said again. Text needs short windows, the copy a long one; nothing says in which layer. Every
contender has the same layers, steps and sequences; the learned one also learns its windows, within the cache bytes of
5:1. Every run is written when it is done; the same command adds what is missing.

Axes: N sequences, T tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transom.compiler import versions
from transom.training.loop import Loop, Metrics
from transom.training.objectives.windows import LearnWindows, WindowSettings
from transom.validation.evaluation.speed import processor
from transom.validation.evaluation.statistics import Estimate, estimate_runs
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.config import tile
from transom.zoo.llama3 import Llama3Config
from transom.zoo.model import Model
from transom.zoo.rope import Rope

LAYERS, CONTEXT = 6, 64
COPIED = 10
"""Tokens at the beginning that are to be said again at the end."""
TEXT, WORDS = 16, 16
"""Tokens of text, and of what is copied; one more, the last, comes before the copy."""
AGAIN = TEXT + WORDS
WINDOWS = (4, 8, 16, 32, 0)
LOCAL = 8
FIXED = (LOCAL,) * (LAYERS - 1) + (0,)
BUDGET = sum(window or CONTEXT for window in FIXED) / (LAYERS * CONTEXT)
SEEDS, STEPS, BATCH = 5, 600, 24
TRAINED, MEASURED = 20_000, 512


def sequences(count: int, seed: int) -> torch.Tensor:
    """Words, text, and the words again: int64 [N, T]."""
    draw = torch.Generator().manual_seed(seed)
    # The same language for all: after two tokens come two others at most, one of them mostly.
    table = torch.randint(0, TEXT, (TEXT, TEXT, 2), generator=torch.Generator().manual_seed(1))
    words = torch.randint(TEXT, TEXT + WORDS, (count, COPIED), generator=draw)
    text = torch.randint(0, TEXT, (count, CONTEXT - 2 * COPIED - 1), generator=draw)
    other = (torch.rand(text.shape, generator=draw) < 0.2).long()
    for place in range(2, text.shape[1]):
        text[:, place] = table[text[:, place - 2], text[:, place - 1], other[:, place]]
    return torch.cat((words, text, torch.full((count, 1), AGAIN), words), 1)


def model(seed: int) -> Model:
    """A Llama of six layers, all global until something bounds them."""
    config = Llama3Config(
        name="adaptive", vocab_size=AGAIN + 1, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2,
        head_dim=16, layer_kinds=tile("G", LAYERS), rope=Rope(theta=1e4), tied=True, context=CONTEXT,
    )  # fmt: skip
    weights = random_weights(config, seed)
    return Model(config=config, weights=weights, tokenizer=None, source="random", revision=f"seed {seed}")


CONTENDERS: Mapping[str, Sequence[int] | None] = {
    "learned": None,
    "5:1": FIXED,
    "one window": (int(BUDGET * CONTEXT),) * LAYERS,
    "all global": (0,) * LAYERS,
}
"""Windows of every layer; None where they are learned."""


@torch.no_grad()
def measure(objective: LearnWindows, tokens_NT: torch.Tensor) -> tuple[list[float], list[float]]:
    """Of every sequence: nats a token of text after its first two, and the share of copied words that are likeliest."""
    logits_NTV = objective.head.logits(objective.hidden(tokens_NT[:, :-1]))
    next_NT = tokens_NT[:, 1:]
    log_probs_NT = logits_NTV.log_softmax(-1).gather(2, next_NT[..., None])[..., 0]
    right_NT = logits_NTV.argmax(-1) == next_NT
    text = slice(COPIED + 1, -COPIED - 1)
    return (-log_probs_NT[:, text].mean(1)).tolist(), right_NT[:, -COPIED:].float().mean(1).tolist()


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train a contender and measure it on sequences that stood in no training."""
    windows = CONTENDERS[name]
    offered = WINDOWS if windows is None else (*sorted(set(windows) - {0}), 0)
    settings = WindowSettings(
        windows=offered if len(offered) > 1 else WINDOWS, budget=BUDGET, context=CONTEXT, steps=steps, batch=BATCH,
        learning_rate=3e-3, seed=seed,
    )  # fmt: skip
    objective = LearnWindows(model(seed), settings, sequences(TRAINED, 100 + seed), windows)

    def on_step(done: int, total: int, metrics: Metrics) -> None:
        if done % 100 == 0:
            print(
                f"{name}, seed {seed}, step {done} of {total}: {metrics['nats']:.3f}, slots {metrics['slots']:.2f}",
                flush=True,
            )

    began = time.process_time()
    Loop(objective, settings.loop, on_step=on_step).run()
    seconds = time.process_time() - began
    chosen = objective.windows
    assert chosen is not None
    text, right = measure(objective, sequences(MEASURED, 999))
    return {
        "name": name, "seed": seed, "steps": steps, "windows": list(chosen), "seconds": seconds,
        "slots": sum(window or CONTEXT for window in chosen) / (LAYERS * CONTEXT),
        "text_nats": text, "copied": right,
    }  # fmt: skip


def report(runs: Sequence[Mapping[str, Any]], environment: str) -> str:
    """The results as a page of Markdown."""
    lines = [
        "# Learned windows against a fixed ratio",
        "",
        f"Written by `python -m benchmarks.adaptive`. {LAYERS} layers, a context of {CONTEXT} tokens: random words,",
        "text in which the next token follows from the two before it, then the words again. Every contender learns for",
        f"{runs[0]['steps']:,} steps of {BATCH} sequences. `learned` finds its windows meanwhile, of",
        f"{', '.join(map(str, WINDOWS[:-1]))} and all, within the bytes of 5:1, {BUDGET:.1%} of all global layers.",
        f"Measured on {MEASURED} unseen sequences; in brackets 95%, by the bootstrap over seeds and sequences.",
        "",
        "| contender | seeds | cache | copied right | nats a token of text |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in CONTENDERS:
        rows = [row for row in runs if row["name"] == name]
        if rows:
            slots = max(row["slots"] for row in rows)
            copied, text = (estimate_runs([row[key] for row in rows]) for key in ("copied", "text_nats"))
            lines.append(f"| {name} | {len(rows)} | {slots:.1%} | {_shown(copied, '.1%')} | {_shown(text, '.3f')} |")
    lines += ["", "| seed | windows learned, first layer to last | copied right |", "|---:|---|---:|"]
    for row in runs:
        if row["name"] == "learned":
            windows = ", ".join(str(window or "all") for window in row["windows"])
            lines.append(f"| {row['seed']} | {windows} | {sum(row['copied']) / len(row['copied']):.1%} |")
    return "\n".join([*lines, "", environment]) + "\n"


def _shown(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each contender")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--work", type=Path, default=Path("artifacts/adaptive"), help="folder of single runs")
    parser.add_argument("--out", type=Path, default=Path("artifacts/adaptive"), help="folder of the report")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    runs = []
    for seed in range(options.seeds):
        for name in CONTENDERS:
            path = options.work / f"{name.replace(' ', '-').replace(':', '-')}-{seed}-{options.steps}.json"
            if not path.exists():
                path.write_text(json.dumps(run(name, seed, options.steps)))
            runs.append(json.loads(path.read_text()))
    environment = ", ".join(f"{name} {version}" for name, version in versions([]).items()) + f"; {processor()}."
    (options.out / "adaptive.json").write_text(json.dumps({"runs": runs, "environment": environment}) + "\n")
    (options.out / "adaptive.md").write_text(report(runs, environment))
    print(report(runs, environment))


if __name__ == "__main__":
    main()
