"""The benchmark of post-training: its problems, and what its report says."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.post_training import ARTIFACTS, HELD_OUT, problems, report


def test_no_problem_that_is_measured_stands_in_training(tmp_path: Path) -> None:
    counts = problems(tmp_path)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test", "test-shots")
    }
    assert counts["test"] == len(rows["test"]) == HELD_OUT and counts["train"] == len(rows["train"])
    learned = {row["prompt"] for row in rows["train"]}
    for row, behind in zip(rows["test"], rows["test-shots"], strict=True):
        a, sign, b, _ = row["prompt"].split()
        assert int(row["answer"]) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert row["prompt"] not in learned and (sign == "-" or f"{b} + {a} =" not in learned)
        assert behind["prompt"].endswith("\n" + row["prompt"]) and behind["answer"] == row["answer"]
    assert len((tmp_path / "train.txt").read_text().splitlines()) == len(rows["train"])


def test_the_report_has_every_artifact() -> None:
    estimate = {"value": 0.25, "low": 0.2, "high": 0.3}
    measures = {"exact match": estimate, "KL to start": estimate}
    rows = [
        {"folder": name, "measures": measures, "differences": {} if name == "base" else measures} for name in ARTIFACTS
    ]
    page = report(
        {
            "problems": {"distinct": 4880, "test": 400},
            "contest": {"contenders": rows},
            "shots": {"contenders": rows[:1]},
            "bytes": dict.fromkeys(ARTIFACTS, 10**9),
            "stages": {"align gemma": {"cpu_seconds": 90, "peak_bytes": 5 * 10**9}},
            "versions": {"torch": "2.13"},
            "machine": "CPU",
        }
    )
    assert "| after align and qat, int4 | 25.0% (20.0% to 30.0%) | 25.0% (20.0% to 30.0%) | 0.25 | 1,000 MB |" in page
    assert "| `transom align gemma` | 1.5 | 5.0 GB |" in page
