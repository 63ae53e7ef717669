"""Pairs of images and texts for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_pairs(folder: Path, count: int = 8) -> Path:
    """Images of random blocks, each with a question and a letter; returns the file of pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, lines = np.random.default_rng(3), []
    for index in range(count):
        blocks = draw.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(folder / f"{index}.png")
        # Two lengths of prompts and answers, and an image after the text.
        prompt = ("Which?", "Letter of <image>:")[index % 2]
        lines.append({"image": f"{index}.png", "prompt": prompt, "answer": "abcd"[index % 4] * (1 + index % 2)})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
