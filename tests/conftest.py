"""Models, graphs and numbers that several tests share."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.artifacts import CHUNK, SHARED, Export, Exported, shared
from tests.case import Case
from transom.cli import main
from transom.cli.options import console
from transom.compiler import compile_model
from transom.errors import CheckpointError
from transom.export.options import Options
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.trace import trace
from transom.graphs.weight import Weight
from transom.passes.base import Pass
from transom.passes.pipelines import pipeline
from transom.zoo import model as zoo_model
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.model import Model, load

Cli = Callable[..., tuple[int, str, str]]

WINDOW = 16
"""Window of gemma3-tiny."""

LENGTH = 10 * WINDOW + 5
"""Tokens of the shared text: a prefill of several windows and six windows of decode."""


# The console is made once a process: tables must not wrap where some test made it narrow.
console.width = 400

# Tiny tensors gain nothing from threads, and lose tenfold when workers share the cores.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """What is made once a run: workers and the processes that tests start share XLA's programs and our folders."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="transom-tests-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        for variable in ("JAX_COMPILATION_CACHE_DIR", SHARED):
            os.environ[variable] = str(Path(folder.name) / variable.lower())
        Path(os.environ[SHARED]).mkdir()
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


LONGEST = (
    "test_every_architecture", "test_real_270m", "test_conformance", "test_bisect", "test_faults", "test_tvm",
    "test_validate", "test_xla", "test_bit_equality", "test_evaluate", "test_onnx", "test_quantize", "test_qat",
    "test_checkpoint_fuzz", "test_gguf_fuzz", "test_streams", "test_parallel", "test_adapters", "test_bisect_images",
    "test_images", "test_every_operation", "test_finetune_vision", "test_warp", "test_reward_model", "test_align",
)  # fmt: skip
"""Files that take longest, which run first: otherwise a core is idle while the last one ends."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. Workers take file after file in this order."""
    for item in items:
        if "rtx" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.rtx)
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pass that ran, and a copy of the graph as it left it."""

    ran: Pass
    graph: Graph


def stages_of(traced: Graph, target: str, quant: str = "none") -> list[Stage]:
    """Every stage of a target's pipeline."""
    kept: list[Stage] = []
    passes = pipeline(target, chunk=CHUNK, scheme=scheme(quant))
    passes.run(traced, on_pass=lambda ran, graph: kept.append(Stage(ran, graph.clone())))
    return kept


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """A configuration is traced once a process: weights are recipes that stand beside the graph."""
    done: dict[Any, Graph] = {}

    def remembered(build: functools.partial[torch.nn.Module], weights: Mapping[str, Weight], **options: Any) -> Graph:
        key = (build.func, build.args, options["task"], options["dtype"])
        if key not in done or done[key].weights.keys() - weights.keys():
            done[key] = trace(build, weights, **options)
        graph = done[key].clone()
        graph.weights = {name: weights[name].to(options["dtype"]) for name in graph.weights}
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo_model, "trace", remembered)
        yield


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `transom ARGS`; returns (exit code, standard output, standard error)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transom", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def tiny() -> Model:
    """gemma3-tiny: six layers LLGLLG, a window of 16, random weights."""
    return load("gemma3-tiny")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gemma3-tiny` with random weights as a sharded Hugging Face folder in bfloat16."""
    folder = tmp_path_factory.mktemp("tiny")
    config = preset("gemma3-tiny")
    write_checkpoint(folder, config, random_weights(config, 0), shard_bytes=200_000)
    return folder


@pytest.fixture(scope="session")
def traced(tiny: Model) -> Graph:
    """Its decode graph as traced. Tests must not edit it: clone it first."""
    return Case.of(tiny).graph


@pytest.fixture(scope="session")
def scored(tiny: Model) -> Graph:
    """Its score graph as traced. Tests must not edit it: clone it first."""
    return Case.of(tiny, "score").graph


@pytest.fixture(scope="session")
def traced_float16(tiny: Model) -> Graph:
    """Its decode graph as traced in float16. Tests must not edit it: clone it first."""
    return tiny.trace(dtype=torch.float16)


@pytest.fixture(scope="session")
def stages(traced: Graph) -> list[Stage]:
    """The decode graph after every pass of the target `onnxruntime`."""
    return stages_of(traced, "onnxruntime")


@pytest.fixture(scope="session")
def text(tiny: Model) -> list[int]:
    """A text of random tokens."""
    ids = torch.randint(0, tiny.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1))
    return [int(token) for token in ids]


@pytest.fixture(scope="session")
def text_logits(tiny: Model, text: list[int]) -> NDArray[np.float32]:
    """What the plain module says of every position of the text, [LENGTH, V], without any cache."""
    with torch.no_grad():
        logits_BTV, _ = tiny.eager()(torch.tensor([text]), torch.tensor(0), None)
    logits: NDArray[np.float32] = logits_BTV[0].numpy()
    return logits


@pytest.fixture(scope="session")
def exported(tiny: Model) -> Export:
    """Compile the tiny model, each way once a run."""

    @functools.cache
    def export(target: str, quant: str = "none", **changes: Any) -> Exported:
        options = Options.of(tiny, target=target, quant=quant, **{"chunk": CHUNK, **changes})
        traced = tiny.trace(dtype=getattr(torch, options.dtype))
        folder = shared(
            f"{target}-{quant}".replace(":", "-"),
            tiny.config, tiny.revision, options, traced.digest(),
            write=lambda out: compile_model(tiny, options, out=out),
        )  # fmt: skip
        return Exported(folder, traced, options)

    return export


@pytest.fixture(scope="session")
def real() -> Model:
    """The real Gemma 3 270M. Its file is decoded once a run, which takes seconds; numbers are then read from rows on
    disk, as a worker that keeps them in memory has a gigabyte less for what it tests.
    """
    try:
        model = load("gemma3-270m")
    except CheckpointError as error:
        pytest.skip(str(error))

    def decode(folder: Path) -> None:
        folder.mkdir()
        for name, weight in model.weights.items():
            with (folder / name).open("wb") as file:
                for block in weight.blocks():
                    block.numpy().tofile(file)

    folder = shared("gemma3-270m", model.revision, write=decode)
    weights = {name: on_disk(weight, folder / name) for name, weight in model.weights.items()}
    return dataclasses.replace(model, weights=weights)


def on_disk(weight: Weight, path: Path) -> Weight:
    """The same weight, read from a file of its float32 numbers."""
    assert weight.dtype == torch.float32
    width = math.prod(weight.shape[1:])

    def read_rows(start: int, stop: int) -> torch.Tensor:
        rows = np.fromfile(path, np.float32, count=(stop - start) * width, offset=4 * start * width)
        return torch.from_numpy(rows).view(stop - start, *weight.shape[1:])

    return dataclasses.replace(weight, read_rows=read_rows)
