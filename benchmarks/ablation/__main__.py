"""`python -m benchmarks.ablation`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import benchmarks.ablation
from benchmarks.ablation.report import ENOUGH_SEEDS, report, rows
from benchmarks.ablation.study import CONTENDERS, cells, run_all, tuning_cells
from benchmarks.ablation.task import Study, frozen, measure, split, trained_base
from benchmarks.ablation.warm import train_members
from transom.training.policy import Policy


def main() -> None:
    """Run what is missing, and write `ablation.json`, `ablation.md` and, with matplotlib, `ablation.png`."""
    parser = argparse.ArgumentParser(
        description=benchmarks.ablation.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=ENOUGH_SEEDS, help="runs of every method")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="methods to run, with commas between")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing, report what there is")
    parser.add_argument("--work", type=Path, default=Path("artifacts/ablation"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the report")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - CONTENDERS.keys():
        parser.error(f"no method named {', '.join(sorted(unknown))}: choose of {', '.join(CONTENDERS)}")
    study = Study()
    folder = options.work / study.digest
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not options.report:
        trained_base(study, folder)
        if any(CONTENDERS[name].warm for name in names):
            share = train_members(study, folder)["accuracy"][-1]["accuracy"]
            print(f"reward models: {share:.3f} of held-out pairs ranked right by their average", flush=True)
        run_all([cell for name in names for cell in tuning_cells(name, study)], study, folder, options.jobs)
        # Seed by seed, so that a run that is stopped has as many of every method.
        todo = [cells(name, study, folder, options.seeds) for name in names]
        run_all([cell for seed in zip(*todo, strict=True) for cell in seed], study, folder, options.jobs)
    base = trained_base(study, folder)
    policy = Policy(base, trained=frozen)
    start = measure(policy, policy, split(study)["unseen"], study.draws)
    report(study, folder, rows(study, folder, options.seeds, start["sampled"]), start, options.out)


if __name__ == "__main__":
    main()
