"""`benchmarks/gpu.py` on a machine that has a checkout and no `transom` installed; here on XLA's CPU backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Row, limited, render
from transom.validation.tolerances import BFLOAT16

pytest.importorskip("jax", reason="the xla extra is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"

SIZES = ("--context", "128", "--prompt", "64", "--new", "8")
"""Past the window of gemma3-tiny, in seconds."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without `site`, so that the installed packages are there, and editable installs such as our own are not."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    # Tiny tensors gain nothing from threads, and lose tenfold when workers share the cores.
    environment |= {"PYTHONPATH": str(Path(torch.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    missing = "import importlib.util, sys; sys.exit(importlib.util.find_spec('transom') is not None)"
    if subprocess.run([sys.executable, "-S", "-c", missing], env=environment, cwd="/", check=False).returncode:
        pytest.skip("transom is installed as a copy, which cannot be hidden")
    return subprocess.run(
        [sys.executable, "-S", str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_a_run_past_the_window(tmp_path: Path) -> None:
    done = run(
        "--model", "gemma3-tiny", "--platform", "cpu", "--schemes", "none", "--compile-mode", "off", *SIZES,
        "--chunk", "24", "--repeats", "2", "--out", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["xla none", "torch eager"]
    for row in results["rows"]:
        # Both round to bfloat16, and neither is the reference itself.
        assert 0 < row["relative"] <= BFLOAT16.relative and row["failures"] == [] and row["note"] == ""
        assert len(row["prefill_seconds"]) == len(row["decode_seconds"]) == 2
        assert min(row["tokens_per_second"].values()) > 0
        assert row["weight_bytes"] > 0 and row["cache_bytes"] > 0
    page = (tmp_path / "results.md").read_text()
    assert [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")][1:] == [
        "| xla none",
        "| torch eager",
    ]
    assert "torch: on the CPU" in page and "NOT past the window" not in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_no_gpu(name: str, tmp_path: Path) -> None:
    done = run("--model", "gemma3-tiny", "--platform", name, *SIZES, "--out", str(tmp_path / "none"))
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gpu.py: --platform {name}: jax ") and not (tmp_path / "none").exists()


def test_what_fails_stands_in_the_table() -> None:
    rows = [
        Row(name="torch.compile (default)", quant="none", device="cpu", note="failed: TimeoutError: too long"),
        Row(name="xla int4", quant="int4", device="cpu", failures=["a prompt of 64: top-1 agreement is 3%"]),
    ]
    page = render({"model": "gemma3-tiny, random"}, rows, [{"prefill": None, "decode": 2.5}] * 2)
    assert "| - | 2.5 |" in page and "| failed: TimeoutError: too long |" in page
    assert "| a prompt of 64: top-1 agreement is 3% |" in page


def test_a_limit_ends_what_takes_too_long() -> None:
    with pytest.raises(TimeoutError, match="more than 1 s"), limited(1):
        while True:
            pass
