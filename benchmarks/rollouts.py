"""Samples of a policy on ONNX Runtime, which reads the policy's own weights, beside PyTorch's.

    python -m benchmarks.rollouts --model gemma3-270m --batches 1,8,32 --threads 1 --out benchmarks/results

Both take turns in one process, on prompts that all differ. With one thread, what is compared is the time that the
processor spends, which other programs disturb less than the clock's. With more it is the clock's, and threads that wait
for each other make it worthless on a machine that is not quiet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation import task
from benchmarks.quiet import OtherCpu
from transom.compiler import versions
from transom.training.policy import Policy
from transom.training.rollouts import ROLLOUTS, TORCH
from transom.zoo.model import Model, load

SMALL = "ablation"
"""The policy of `benchmarks.ablation`: two layers, a width of 64."""


def model_of(name: str, context: int) -> Model:
    """A model by its name; random weights will do, but a real one ends as it would."""
    if name != SMALL:
        return load(name)
    small = task.untrained()
    return dataclasses.replace(small, config=dataclasses.replace(small.config, context=context))


def measure(
    model: Model, *, batches: list[int], threads: int, prompt: int, new: int, rounds: int
) -> list[dict[str, Any]]:
    """Seconds of every sampler and batch."""
    torch.set_num_threads(threads)
    policies = {rollouts: Policy(model, trained=lambda name: False, rollouts=rollouts) for rollouts in ROLLOUTS}
    clock = time.process_time if threads == 1 else time.perf_counter
    rows = []
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).tolist()
        seconds: dict[str, list[float]] = {rollouts: [] for rollouts in policies}
        meter = OtherCpu()
        for turn in range(rounds + 1):
            for rollouts, policy in policies.items():
                generator.manual_seed(turn)
                began = clock()
                policy.sample(prompts, max_new=new, stops=frozenset(), generator=generator)
                if turn:  # the first one warms up
                    seconds[rollouts].append(clock() - began)
        best = {rollouts: min(values) for rollouts, values in seconds.items()}
        rows.append(
            {
                "batch": batch,
                "threads": threads,
                "seconds": seconds,
                "samples_per_second": {rollouts: batch / value for rollouts, value in best.items()},
                "gain": {rollouts: best[TORCH] / value for rollouts, value in best.items()},
                "busy_cpus": meter.read(),
            }
        )
        print(json.dumps({"model": model.config.name, **rows[-1]}), flush=True)
    return rows


def main() -> None:
    """Measure, and add what was measured to `rollouts.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMALL, help=f"{SMALL!r}, or what `transom.load` takes")
    parser.add_argument("--batches", default="1,8,32", help="sequences at a time")
    parser.add_argument("--threads", type=int, default=1, help="of both")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="new tokens")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both after one that is not counted")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the file")
    options = parser.parse_args()
    rows = measure(
        model_of(options.model, options.prompt + options.new),
        batches=[int(batch) for batch in options.batches.split(",")],
        threads=options.threads,
        prompt=options.prompt,
        new=options.new,
        rounds=options.rounds,
    )
    path = options.out / "rollouts.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report[f"{options.model}, {options.threads} threads"] = {
        "machine": platform.processor() or platform.machine(),
        "libraries": versions(["torch", "onnxruntime"]),
        "prompt": options.prompt,
        "new": options.new,
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
