"""What an adapter gets back of a domain shift: a tiny model reads digits, then digits in inverted colours and noise.

    python -m benchmarks.adapters --out benchmarks/results

All weights of `gemma3-vision-tiny` learn dark digits on light ground. Then 256 pairs of light digits on dark, noisy
ground teach an adapter on the projector, on the tower, on both, or all weights of both; the decoder stays. Measured on
pairs that no run saw, of the new kind and of the old. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from transom.compiler import versions
from transom.graphs.weight import Weight
from transom.images.pairs import Pair
from transom.training.loop import Loop, Metrics
from transom.training.objectives.vision import Example, Vision, VisionSettings, read_examples
from transom.zoo.model import Model, load

NAME, SIDE, PROMPT = "gemma3-vision-tiny", 64, "Digit?"
BASE = VisionSettings(method="full", steps=800, batch=16, rows=16, learning_rate=2e-3)
SHIFTED = VisionSettings(rank=4, steps=200, batch=16, rows=16)
CONTENDERS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "LoRA, projector": {"train": "projector", "learning_rate": 1e-2},
    "LoRA, tower": {"train": "tower", "learning_rate": 5e-3},
    "LoRA, both": {"train": "both", "learning_rate": 5e-3},
    "full, both": {"train": "both", "method": "full", "learning_rate": 1e-3},
}


def digit_image(digit: int, draw: np.random.Generator, *, shifted: bool) -> Image.Image:
    """A digit of some size, place and turn: dark on light ground, or, shifted, light on dark ground under noise."""
    size, turn = int(draw.integers(34, 46)), float(draw.uniform(-12, 12))
    x, y = (float(draw.uniform(-5, 5)) for _ in range(2))
    page = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(page).text((SIDE / 2 + x, SIDE / 2 + y), str(digit), 255, ImageFont.load_default(size), anchor="mm")
    ink = np.asarray(page.rotate(turn, Image.Resampling.BILINEAR), np.float32)[..., None] / 255
    ground, colour = draw.uniform(200, 255, 3), draw.uniform(0, 80, 3)
    values = ground * (1 - ink) + colour * ink
    if shifted:
        values = 255 - values + draw.normal(0, 35, values.shape)
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def pairs(folder: Path, count: int, seed: int, *, shifted: bool) -> list[Pair]:
    """Images with their digits, each digit as often as any other."""
    folder.mkdir(parents=True)
    draw, result = np.random.default_rng(seed), []
    for index in range(count):
        path = folder / f"{index}.png"
        digit_image(index % 10, draw, shifted=shifted).save(path)
        result.append(Pair(image=path, prompt=PROMPT, answer=str(index % 10)))
    return result


def trained_base(model: Model, examples: Sequence[Example], steps: int) -> Model:
    """The model after all of its weights, the decoder's too, have learned."""
    objective = Vision(model, dataclasses.replace(BASE, steps=steps), examples)
    objective.parameters = {name: p.requires_grad_(True) for name, p in objective.module.named_parameters()}

    def on_step(done: int, total: int, metrics: Metrics) -> None:
        if done % 50 == 0:
            print(f"base model, step {done} of {total}: {metrics['loss']:.3f}, {metrics['exact']:.0%}", flush=True)

    Loop(objective, objective.settings.loop, on_step=on_step).run()
    trained = {name: Weight.of(tensor, "training") for name, tensor in objective.weights().items()}
    return dataclasses.replace(model, weights=trained, revision="digits")


def measured(model: Model, contender: dict[str, Any], data: dict[str, list[Example]], seed: int) -> dict[str, Any]:
    """Loss and exact match on both kinds of pairs, after training if there is any."""
    settings = dataclasses.replace(SHIFTED, seed=seed, **contender)
    objective, began = Vision(model, settings, data["learnt"]), time.process_time()
    if contender:
        Loop(objective, settings.loop).run()
    return {
        "parameters": sum(p.numel() for p in objective.parameters.values()) if contender else 0,
        "seconds": time.process_time() - began if contender else 0.0,
        "shifted": objective.measure(data["shifted"]),
        "normal": objective.measure(data["normal"]),
    }


def main() -> None:
    """Train, measure, and write `adapters.json` and `adapters.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=BASE.steps, help="steps that the base model learns")
    parser.add_argument("--seeds", type=int, default=2, help="runs of every contender")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the two files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), load(NAME, images=True)
        sets = {
            "base": (2000, 1, False),
            "learnt": (256, 2, True),
            "normal": (300, 3, False),
            "shifted": (300, 4, True),
        }
        data = {
            kind: read_examples(model, pairs(folder / kind, count, seed, shifted=shifted))
            for kind, (count, seed, shifted) in sets.items()
        }
        base = trained_base(model, data["base"], options.steps)
        rows = []
        for contender, changes in CONTENDERS.items():
            runs = [measured(base, changes, data, seed) for seed in range(options.seeds if changes else 1)]
            rows.append({"contender": contender, "settings": changes, "runs": runs})
            print(contender, json.dumps(runs), flush=True)
    report = {
        "base": dataclasses.asdict(dataclasses.replace(BASE, steps=options.steps)),
        "shifted": dataclasses.asdict(SHIFTED),
        "libraries": versions(["torch", "numpy", "pillow"]),
        "rows": rows,
    }
    (options.out / "adapters.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "adapters.md").write_text(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as a page: means over the runs, and the lowest and highest exact match."""
    lines = [
        "# Adapters after a domain shift",
        "",
        "`gemma3-vision-tiny`, all of whose weights learned to read dark digits on light ground, then 200 steps on 256",
        "pairs of light digits on dark, noisy ground, rank 4, the decoder frozen; written by",
        "`python -m benchmarks.adapters`. Measured on 300 pairs of each kind that no run saw: loss in nats, and how",
        "many answers greedy decoding gives exactly. Means over the runs (lowest to highest).",
        "",
        "| contender | trained | loss, shifted | exact, shifted | loss, normal | exact, normal | s of a run |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        runs = row["runs"]
        cells = []
        for kind in ("shifted", "normal"):
            exact = [run[kind]["exact_match"] for run in runs]
            spread = f" ({min(exact):.0%} to {max(exact):.0%})" if len(runs) > 1 else ""
            mean_loss = sum(run[kind]["loss"] for run in runs) / len(runs)
            cells += [f"{mean_loss:.3f}", f"{sum(exact) / len(runs):.0%}{spread}"]
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        lines.append(f"| {row['contender']} | {runs[0]['parameters']:,} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
