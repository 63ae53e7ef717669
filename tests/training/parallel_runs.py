"""What `test_parallel` runs in each of several processes: `python -m tests.training.parallel_runs FOLDER`.

Every process writes what it saw to `FOLDER/rank-N.json`; the last run ends with an error on the second one.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from transom.errors import TransomError
from transom.training.align import AlignSettings, align
from transom.training.distill import distill
from transom.training.loop import Loop, Metrics
from transom.training.objectives.distillation import Distillation, DistillSettings
from transom.training.parallel import Processes
from transom.zoo.model import Model, load

FULL = DistillSettings(
    steps=3, length=16, batch=2, learning_rate=2e-3, save_every=2, targets="full", forward=0.5
)  # fmt: skip
REPLAY = dataclasses.replace(FULL, steps=1, targets="counts", forward=1.0, samples=32, replay=0.5)
SFT = AlignSettings(objective="sft", steps=2, batch=4, parts=2, max_new=8, learning_rate=2e-3, clip=0.5)


class StoppedError(Exception):
    """Ends a run from outside."""


@functools.cache
def models() -> tuple[Model, Model]:
    """A student and its teacher."""
    return load("gemma3-tiny", weights="random", seed=7), load("gemma3-tiny", weights="random", seed=1)


def begin(folder: Path, out: Path) -> None:
    """A run that is saved after two steps and stopped before the third."""
    step = Loop._step

    def until(loop: Loop, number: int) -> Metrics:
        if number == 2:
            raise StoppedError
        return step(loop, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Loop, "_step", until)
        distill(*models(), FULL, text=folder / "text.txt", out=out)


def results(folder: Path, out: Path) -> dict[str, Any]:
    """Losses of runs, the share of bytes that this process keeps, and the first gradients as `OUT/gradients`."""
    text, prompts = folder / "text.txt", folder / "prompts.jsonl"
    shares, step = list[float](), Loop._step

    def watched(loop: Loop, number: int) -> Metrics:
        metrics = step(loop, number)
        tensors: dict[str, Any] = loop._saved()["tensors"]
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors.values()]
        kept = sum(tensor.untyped_storage().nbytes() for tensor in local)
        shares.append(kept / sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        if len(shares) == 1:
            parameters = loop.objective.parameters
            gradients = {n: loop._shards.whole(p.grad) for n, p in parameters.items() if p.grad is not None}
            if loop._shards.is_first:
                save_file(gradients, out / "gradients")
        return metrics

    out.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", watched)
        full = distill(*models(), FULL, text=text, out=out / "full")
        drawn = distill(*models(), REPLAY, text=text, out=out / "samples", replay=text, teacher_samples=out / "drawn")
        sft = align(models()[0], SFT, data=prompts, out=out / "sft")
    norms = [[metrics["loss"], metrics["gradient_norm"]] for metrics in sft]
    return {"full": full, "samples": drawn, "sft": norms, "shares": [min(shares), max(shares)]}


def refused(run: Callable[[], Any]) -> str:
    """What a run is refused with."""
    with pytest.raises(TransomError) as error:
        run()
    return str(error.value)


def main(folder: Path) -> None:
    """Run everything."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, out, text = dist.get_rank(), folder / "two", folder / "text.txt"
    seen = results(folder, out)
    # A run of one process goes on here, and one of two processes is left for one.
    seen["from one"] = distill(*models(), FULL, text=text, out=folder / "from-one")
    begin(folder, folder / "from-two")

    def run(settings: DistillSettings, read: Path = text) -> str:
        return refused(lambda: distill(*models(), settings, text=read, out=out / "refused"))

    sampled = dataclasses.replace(SFT, objective="rloo", reward="instructions")
    seen["refused"] = [
        run(dataclasses.replace(FULL, batch=3)),
        run(dataclasses.replace(FULL, online=0.5, prompt=8)),
        refused(lambda: align(models()[0], sampled, data=folder / "prompts.jsonl", out=out / "refused")),
        run(FULL, text if rank else folder / "other.txt"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        # A file stands where one of them is to write tensors; all are told.
        save = Processes.save
        patch.setattr(Processes, "save", lambda self, tensors, to: save(self, tensors, text if self.rank else to))
        seen["refused"].append(run(dataclasses.replace(FULL, save_every=1)))
    if rank == 1:
        Distillation._targets = _fail  # type: ignore[method-assign,assignment]
    seen["ended"] = run(FULL)
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))


def _fail(objective: Distillation, tokens_BT: torch.Tensor, place: int, first: int) -> None:
    raise TransomError("the second process cannot go on")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
