"""What `test_parallel` runs in each of several processes: `python -m tests.training.parallel_runs FOLDER`.

Every process writes what it saw to `FOLDER/rank-N.json`; the last run ends with an error on the second one.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from transom.errors import TransomError
from transom.training.align import AlignSettings, align
from transom.training.distill import distill
from transom.training.loop import Loop, Loss, Metrics
from transom.training.objectives.distillation import Distillation, DistillSettings
from transom.training.parallel import Processes
from transom.zoo.model import Model, load

SETTINGS = DistillSettings(steps=4, length=24, batch=4, learning_rate=2e-3, samples=32, save_every=2)
FULL = dataclasses.replace(SETTINGS, targets="full", forward=0.5)
SFT = AlignSettings(objective="sft", steps=3, batch=4, parts=2, max_new=8, learning_rate=2e-3, clip=0.5)
REPLAY = dataclasses.replace(SETTINGS, steps=2, replay=0.5)


class StoppedError(Exception):
    """Ends a run from outside."""


def models() -> tuple[Model, Model]:
    """A student and its teacher, of another architecture."""
    return load("gemma3-tiny", weights="random", seed=7), load("llama3-tiny", weights="random", seed=1)


def runs(folder: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Runs whose losses do not depend on the number of processes."""
    student, teacher = models()
    text, prompts = folder / "text.txt", folder / "prompts.jsonl"
    return {
        "full": lambda: distill(student, teacher, FULL, text=text, out=out / "full"),
        "samples": lambda: distill(
            student, teacher, REPLAY, text=text, out=out / "samples", replay=text, teacher_samples=out / "drawn"
        ),
        "sft": lambda: [
            [metrics["loss"], metrics["gradient_norm"]]
            for metrics in align(student, SFT, data=prompts, out=out / "sft")
        ],
    }


def main(folder: Path) -> None:
    """Run everything."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, seen, out = dist.get_rank(), dict[str, Any](), folder / "two"
    student, teacher = models()
    text = folder / "text.txt"
    with pytest.MonkeyPatch.context() as patch:
        shares, step = list[float](), Loop._step

        def watched(loop: Loop, number: int) -> Metrics:
            metrics = step(loop, number)
            tensors: dict[str, Any] = loop._saved()["tensors"]
            whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors.values()]
            shares.append(sum(tensor.untyped_storage().nbytes() for tensor in local) / whole)
            return metrics

        patch.setattr(Loop, "_step", watched)
        for name, run in runs(folder, out).items():
            seen[name] = run()
        seen["shares"] = [min(shares), max(shares)]

    # A run of one process goes on here, and one that two processes began is left for one.
    seen["from one"] = distill(student, teacher, FULL, text=text, out=folder / "from-one")
    original = Loop._step
    with pytest.MonkeyPatch.context() as patch:

        def until(loop: Loop, number: int) -> Metrics:
            if number == 3:
                raise StoppedError
            return original(loop, number)

        patch.setattr(Loop, "_step", until)
        try:
            distill(student, teacher, FULL, text=text, out=folder / "from-two")
        except StoppedError:
            seen["stopped"] = True

    def refused(run: Callable[[], Any]) -> str:
        try:
            run()
        except TransomError as error:
            return str(error)
        return ""

    odd, online = dataclasses.replace(FULL, batch=3), dataclasses.replace(FULL, online=0.5, prompt=8)
    sampled = dataclasses.replace(SFT, objective="rloo", reward="instructions")
    seen["refused"] = [
        refused(lambda: distill(student, teacher, odd, text=text, out=out / "odd")),
        refused(lambda: distill(student, teacher, online, text=text, out=out / "online")),
        refused(lambda: align(student, sampled, data=folder / "prompts.jsonl", out=out / "rloo")),
        refused(
            lambda: distill(student, teacher, FULL, text=text if rank else folder / "other.txt", out=out / "other")
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        # A file stands where tensors are to be written, on one process only: all of them are told.
        save = Processes.save
        patch.setattr(Processes, "save", lambda self, tensors, to: save(self, tensors, text if self.rank else to))
        seen["refused"].append(refused(lambda: distill(student, teacher, FULL, text=text, out=out / "full-disk")))

    loss = Distillation._loss

    def failing(objective: Distillation, tokens_BT: torch.Tensor, place: int, *others: Any, **more: Any) -> Loss:
        if place == FULL.batch + 1:
            raise TransomError("the second process cannot go on")
        return loss(objective, tokens_BT, place, *others, **more)

    Distillation._loss = failing  # type: ignore[method-assign,assignment]
    seen["ended"] = refused(lambda: distill(student, teacher, FULL, text=text, out=out / "ended"))
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
