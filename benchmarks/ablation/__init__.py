"""Every alignment method on one small task: sums of one- and two-digit numbers, a Gemma 3 of two layers.

    python -m benchmarks.ablation --jobs 2 --out benchmarks/results

A base model learns sums of which 55% are wrong in ways that people get sums wrong: it mostly knows the right answer and
seldom samples it, so there is something for a reward to do. Then every method gets as many samples, and the same
reward: exact match, or for WARM what reward models learned of it. Problems are split before anything is trained; those
that are measured stood in no training.

Every run is written when it is done, so the same command goes on from there; the report is of what there is.
"""
