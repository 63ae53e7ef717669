"""`transom ranges` names what is NaN or infinite."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.conftest import Cli
from transom.graphs.weight import Weight
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.model import Model


def test_what_is_not_finite_is_named(tiny: Model, cli: Cli, tmp_path: Path) -> None:
    """Activations by their layer and operation, although logits are NaN then; a weight by its tensor and rows."""
    weights = dict(tiny.weights)
    for name in ("layers.2.mlp.gate_proj.weight", "layers.2.mlp.up_proj.weight"):
        weights[name] = Weight.of(tiny.weights[name].read() * 1e30)
    write_checkpoint(tmp_path / "hot", tiny.config, weights, dtype=None)
    assert tiny.tokenizer is not None
    tiny.tokenizer.save(tmp_path / "hot")
    for dtype in ("float16", "bfloat16"):
        code, out, _ = cli("ranges", tmp_path / "hot", "--tokens", 5, "--dtype", dtype)
        assert code == 1 and re.search(r"not finite: layers\.2\.mlp\.mul: \d+ of 480 numbers are NaN or infinite", out)
        assert "not finite: linear: 2,560 of 2,560 numbers" in out and "not finite: layers.1." not in out
    code, out, _ = cli("ranges", tmp_path / "hot", "--tokens", 5, "--json")
    data = json.loads(out)
    assert code == 1 and data["not_finite"][0] == "layers.2.mlp.mul"
    tensor = tiny.weights["norm.weight"].read()
    tensor[7] = float("nan")
    write_checkpoint(tmp_path / "bad", tiny.config, {**tiny.weights, "norm.weight": Weight.of(tensor)}, dtype=None)
    tiny.tokenizer.save(tmp_path / "bad")
    code, out, err = cli("ranges", tmp_path / "bad", "--tokens", 5)
    assert code == 2 and "norm.weight holds numbers that are not finite in row 7: " in err
