"""Encoding an image on ONNX Runtime beside transformers: SigLIP So400m at 896 pixels, random weights, one thread.

    python -m benchmarks.images --rounds 2 --schemes none,int8 --out benchmarks/results

Contenders take turns in one process. What is compared is the time that the processor spends (one thread), which other
programs on the machine disturb less than the clock's; and how far the soft tokens are from transformers'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import transom
from transom.compiler import versions
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.model import Model

Float = NDArray[np.float32]


def model() -> Model:
    """The encoder of the released sizes before a decoder that is hardly there."""
    tiny: Any = preset("gemma3-vision-tiny")
    released: Any = preset("gemma3-4b")
    images = dataclasses.replace(tiny.images, size=released.images.size, soft_tokens=released.images.soft_tokens)
    config = dataclasses.replace(tiny, name="so400m", vision=released.vision, images=images)
    return Model(config=config, weights=random_weights(config, 0), tokenizer=None, source="random", revision="seed 0")


def theirs(folder: Path, attention: str) -> Callable[[Float], Float]:
    """The encoder and the projector of transformers."""
    loaded = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()

    def encode(pixels: Float) -> Float:
        with torch.no_grad():
            soft: Any = loaded.get_image_features(torch.from_numpy(pixels)).pooler_output
            return soft.reshape(-1, soft.shape[-1]).numpy()  # type: ignore[no-any-return]

    return encode


def main() -> None:
    """Measure, and write `images.json` and `images.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="turns of every contender after one that is not counted")
    parser.add_argument("--schemes", default="none,int8", help="what the artifacts are quantised to")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the two files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels = (np.random.default_rng(0).random((1, 3, 896, 896), np.float32) * 2 - 1).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), model()
        write_checkpoint(folder / "model", source.config, source.weights, dtype=torch.float32)
        contenders = {f"transformers, {kind}": theirs(folder / "model", kind) for kind in ("sdpa", "eager")}
        for scheme in options.schemes.split(","):
            transom.compile(source, quant=scheme, out=folder / scheme, chunk=256)
            runtime = transom.open(folder / scheme, threads=1).runtime
            contenders[f"transom, {scheme}"] = runtime.encode_image
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        results: dict[str, Float] = {}
        for turn in range(options.rounds):
            for contender, encode in contenders.items():
                began = time.process_time()
                results[contender] = encode(pixels)
                seconds[contender].append(time.process_time() - began)
                print(f"turn {turn}: {contender}: {seconds[contender][-1]:.1f} s", flush=True)
    exact = results["transformers, sdpa"]
    rows = [
        {
            "contender": contender,
            "seconds": [round(value, 2) for value in times],
            "median": statistics.median(times),
            "of_sdpa": statistics.median(seconds["transformers, sdpa"]) / statistics.median(times),
            "of_eager": statistics.median(seconds["transformers, eager"]) / statistics.median(times),
            "largest_difference": float(np.abs(results[contender] - exact).max() / np.abs(exact).max()),
        }
        for contender, times in seconds.items()
    ]
    report = {
        "machine": platform.processor() or platform.machine(),
        "libraries": versions(["torch", "transformers", "onnxruntime"]),
        "peak_rss_bytes_of_all": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rows": rows,
    }
    (options.out / "images.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "images.md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a page."""
    lines = [
        "# Encoding an image",
        "",
        "SigLIP So400m at 896 pixels and the projector, random weights, one thread, seconds of the processor,",
        "contenders in turns; written by `python -m benchmarks.images`. The last column is the largest difference of a",
        "soft token from transformers' (sdpa), relative to the largest value.",
        "",
        "| contender | median s | speed against sdpa | against eager | difference |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['contender']} | {row['median']:.1f} | {row['of_sdpa']:.2f} | {row['of_eager']:.2f} "
        f"| {row['largest_difference']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
