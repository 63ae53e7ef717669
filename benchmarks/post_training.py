"""The real Gemma 3 270M learns sums, is trained for int4, and what is deployed of it is measured.

    python -m benchmarks.post_training --out benchmarks/results

Every stage is a command of transom's. A stage whose folder is there is not run again, and one that was stopped goes on.
Problems are split before anything is trained, a sum and its mirror image on one side.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transom.compiler import versions
from transom.validation.evaluation.speed import processor

MODEL = "gemma3-270m"
SCHEME = "int4_block32"
HELD_OUT, SHOTS = 400, 4
ANSWER_TOKENS = 3
"""A space and two digits: every right answer is as long, so no format need be learned to be right."""
LINE_TOKENS = 12
"""A problem with its answer, between the token that begins a text and a new line."""

RECIPE = """\
objective = "sft"
steps = 120
batch = 32
max_new = 4
learning_rate = 4e-5
warmup = 0.1
last_rate = 0.1
train_table = false
save_every = 20
"""

ARTIFACTS: Mapping[str, str] = {
    "base": "the model as it was, float32",
    "base-int4": "the model as it was, int4",
    "aligned": "after align, float32",
    "aligned-int4": "after align, rounded to int4",
    "calibrated-int4": "after align and quantize (GPTQ), int4",
    "trained-int4": "after align and qat, int4",
}
"""Folder -> what it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A command.

    Attributes:
        out: Its folder.
        words: What stands behind `transom`, less the folder.
    """

    out: str
    words: tuple[str, ...]


STAGES = (
    Stage(out="base", words=("export", MODEL, "--quant", "none")),
    Stage(out="base-int4", words=("export", MODEL, "--quant", SCHEME)),
    Stage(
        out="sft", words=("align", MODEL, "--recipe", "recipe.toml", "--data", "train.jsonl", "--dtype", "float32")
    ),
    Stage(out="aligned", words=("export", "sft", "--quant", "none")),
    Stage(out="aligned-int4", words=("export", "sft", "--quant", SCHEME)),
    Stage(out="gptq", words=("quantize", "sft", "--scheme", SCHEME, "--calibrate", "train.txt")),
    Stage(out="calibrated-int4", words=("export", "gptq")),
    Stage(
        out="qat",
        words=(
            "qat", "sft", "--scheme", SCHEME, "--data", "train.txt", "--length", str(LINE_TOKENS), "--batch", "32",
            "--steps", "80", "--learning-rate", "1e-5", "--target", "none", "--save-every", "20",
        ),
    ),
    Stage(out="trained-int4", words=("export", "qat")),
)  # fmt: skip


def problems(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write sums and differences of two-digit numbers whose result has two digits; returns how many of each kind.

    `train.jsonl` and `train.txt` are learned from; `test.jsonl` has problems that stand in neither, nor their mirror
    images, `test-shots.jsonl` the same behind examples.
    """
    groups: dict[tuple[str, int, int], list[tuple[str, int]]] = {}
    for a in range(10, 100):
        for b in range(10, 100):
            if a + b < 100:
                groups.setdefault(("+", min(a, b), max(a, b)), []).append((f"{a} + {b} =", a + b))
            if a - b >= 10:
                groups.setdefault(("-", a, b), []).append((f"{a} - {b} =", a - b))
    draw, keys = random.Random(seed), sorted(groups)
    draw.shuffle(keys)
    test = [draw.choice(groups[key]) for key in keys[:HELD_OUT]]
    train = [problem for key in keys[HELD_OUT:] for problem in groups[key]]
    draw.shuffle(train)
    shots = "".join(f"{prompt} {answer}\n" for prompt, answer in train[:SHOTS])
    for name, rows, before in (("train", train, ""), ("test", test, ""), ("test-shots", test, shots)):
        lines = [json.dumps({"prompt": before + prompt, "answer": f" {answer}"}) for prompt, answer in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "train.txt").write_text("".join(f"{prompt} {answer}\n" for prompt, answer in train))
    return {"distinct": len(keys), "train": len(train), "test": len(test)}


def run(words: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a command of transom in a folder, to its end: seconds of the processor, and the most bytes of memory."""
    print("transom", shlex.join(words), flush=True)
    process = subprocess.Popen([sys.executable, "-m", "transom", *words], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"transom {shlex.join(words)} ended with {process.returncode}")
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def measure(folder: Path, artifacts: Sequence[str], tasks: str) -> Any:
    """What artifacts answer greedily, of `transom evaluate`."""
    words = (
        "--tasks",
        tasks,
        "--reward",
        "mathematics",
        "--max-new",
        str(ANSWER_TOKENS),
        "--start",
        "base",
        "--threads",
        "1",
    )
    run(("evaluate", *artifacts, *words, "--json", "measured.json"), folder)
    return json.loads((folder / "measured.json").read_text())


def report(result: Mapping[str, Any]) -> str:
    """The results as a page of Markdown."""
    contenders = {Path(row["folder"]).name: row for row in result["contest"]["contenders"]}
    lines = [
        "# The real Gemma 3 270M, aligned, trained for int4, deployed",
        "",
        "Written by `python -m benchmarks.post_training`. Sums and differences of two-digit numbers whose result has",
        f"two digits: {result['problems']['distinct']:,} distinct problems (a sum and its mirror image are one), of",
        f"which {result['problems']['test']} are held out before anything is trained. Artifacts run on ONNX Runtime",
        f"and answer greedily, with {ANSWER_TOKENS} tokens: as many as every right answer has, so there is no format",
        "to be learned. Intervals are 95%, by the bootstrap over problems.",
        "",
        "| artifact | exact match | more than base | KL to base, nats | bytes of weights |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, note in ARTIFACTS.items():
        row = contenders[name]
        more = row["differences"].get("exact match")
        lines.append(
            f"| {note} | {_estimate(row['measures']['exact match'])} | {_estimate(more) if more else ''} | "
            f"{row['measures']['KL to start']['value']:.2f} | {result['bytes'][name] / 1e6:,.0f} MB |"
        )
    shots = result["shots"]["contenders"][0]
    lines += [
        "",
        f"Behind {SHOTS} examples, the base model is right on {_estimate(shots['measures']['exact match'])}.",
        "",
        "| command | CPU minutes | peak memory |",
        "|---|---:|---:|",
        *(
            f"| `transom {command}` | {use['cpu_seconds'] / 60:.1f} | {use['peak_bytes'] / 1e9:.1f} GB |"
            for command, use in result["stages"].items()
        ),
        "",
        "The recipe of `align`:",
        "",
        "```toml",
        RECIPE.rstrip(),
        "```",
        "",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + f"; {result['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def _estimate(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.1%} ({estimate['low']:.1%} to {estimate['high']:.1%})"


def main() -> None:
    """Run the stages that are missing, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("artifacts/post-training"), help="folder of all stages")
    parser.add_argument("--out", type=Path, default=Path("artifacts/post-training"), help="folder of the report")
    options = parser.parse_args()
    folder = options.work
    folder.mkdir(parents=True, exist_ok=True)
    counts = problems(folder)
    (folder / "recipe.toml").write_text(RECIPE)
    uses = folder / "stages.json"
    stages = json.loads(uses.read_text()) if uses.exists() else {}
    for stage in STAGES:
        if not (folder / stage.out).exists():
            words = (*stage.words, "-o", stage.out)
            stages[shlex.join(words)] = run(words, folder)
            uses.write_text(json.dumps(stages, indent=2))
    result = {
        "problems": counts,
        "contest": measure(folder, list(ARTIFACTS), "test.jsonl"),
        "shots": measure(folder, ["base"], "test-shots.jsonl"),
        "bytes": {name: sum(f.stat().st_size for f in (folder / name).glob("*.data")) for name in ARTIFACTS},
        "stages": stages,
        "versions": versions(["onnxruntime"]),
        "machine": processor(),
    }
    (options.out / "post_training.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "post_training.md").write_text(report(result))
    print(report(result))


if __name__ == "__main__":
    main()
