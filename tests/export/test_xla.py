"""The target `xla` on the tiny model: the numbers, the files, and what it refuses. Runs on XLA's CPU backend."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import transom
from tests.artifacts import CHUNK, Export
from tests.case import export
from tests.conftest import WINDOW, stages_of
from tests.tolerances import BFLOAT16_LOGITS_XLA, FP32_LOGITS
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.backends.xla.parameters import WEIGHTS_FILE, Parameter, read_parameters
from transom.errors import TargetError, UnsupportedOpsError
from transom.export.exporter import Progress
from transom.export.options import Options
from transom.formats import sfp8
from transom.formats.quantized import dequantize
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model

jax = pytest.importorskip("jax", reason="the xla extra is not installed")
# These import jax themselves.
from transom.export.xla import export as xla  # noqa: E402
from transom.export.xla import weights  # noqa: E402
from transom.export.xla.interpreter import step  # noqa: E402

ROOT = Path(__file__).parents[2]
KINDS = {
    "int8": {"int8"},
    "int4": {"int8", "uint4"},
    "int4_table": {"int8", "uint4", "int4"},
    "int4_block32": {"int4", "int8"},
    "fp8": {"float8_e4m3fn", "int8"},
    "sfp8": {"uint8"},
}
"""What codes are held as in memory, by scheme."""

QUANTS = tuple(KINDS)

Sessions = Callable[[str], Session]


@pytest.fixture(scope="module")
def sessions(exported: Export) -> Sessions:
    """One session a scheme, so that each program is compiled once; `reset` it before use."""
    opened: dict[str, Session] = {}

    def make(quant: str) -> Session:
        if quant not in opened:
            opened[quant] = exported("xla", quant).session()
        opened[quant].reset()
        return opened[quant]

    return make


@pytest.mark.parametrize("quant", QUANTS)
def test_quantised_logits_are_the_references(
    quant: str, sessions: Sessions, exported: Export, text: list[int], text_logits: NDArray[np.float32]
) -> None:
    """On the same codes; nothing else is rounded, so the bound is that of floats."""
    session, expected = sessions(quant), exported("xla", quant).reference().logits(text[:101])
    assert np.abs(session.logits(text[:100]) - expected[:100]).max() < FP32_LOGITS
    assert np.abs(session.decode(text[100]) - expected[100]).max() < FP32_LOGITS
    assert np.abs(expected - text_logits[:101]).max() > 100 * FP32_LOGITS, "nothing was quantised"


@pytest.mark.parametrize("quant", QUANTS)
def test_codes_mean_exactly_the_references_numbers(quant: str, exported: Export) -> None:
    """Whatever the layout: linears have codes [G, C, R], tables [R, K]; scales and zero points are [G, R]."""
    pair = exported("xla", quant)
    parameters = read_parameters(pair.folder / WEIGHTS_FILE, weights.parameters(pair.graph), lambda array: array)
    kinds = set()
    for node in pair.graph.calls(ops.LINEAR_QUANTIZED, ops.EMBEDDING_QUANTIZED):
        parts: list[Any] = [None if part is None else pair.graph.weight_of(part) for part in node.args[1:4]]
        tensors: list[Any] = [None if part is None else part[1].read() for part in parts]
        arrays: list[Any] = [None if part is None else parameters[part[0]] for part in parts]
        expected = dequantize(tensors[0], tensors[1], tensors[2], node.args[4])
        codes, scales_GR, zeros_GR = arrays
        codes_RK = codes if codes.ndim == 2 else codes.transpose(2, 0, 1)
        if node.args[4] == "sfp8":
            codes_RK = sfp8.decode(torch.from_numpy(codes_RK)).numpy()
        codes_RGC = codes_RK.astype(np.float32).reshape(scales_GR.shape[1], scales_GR.shape[0], -1)
        if zeros_GR is not None:
            codes_RGC -= zeros_GR.T.astype(np.float32)[..., None]
        numbers = (codes_RGC * scales_GR.T[..., None]).reshape(expected.shape)
        np.testing.assert_array_equal(numbers, expected.numpy())
        kinds.add(codes.dtype.name)
    assert kinds == KINDS[quant]


@pytest.fixture(scope="module")
def traced_bfloat16(tiny: Model) -> Graph:
    return tiny.trace(dtype=torch.bfloat16)


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_bfloat16(
    quant: str,
    tiny: Model,
    traced_bfloat16: Graph,
    tmp_path: Path,
    text: list[int],
) -> None:
    artifact = transom.compile(
        tiny, target="xla", quant=quant, dtype="bfloat16", context=128, chunk=CHUNK, out=tmp_path / "model"
    )
    assert {state.dtype for state in artifact.manifest.decode.states} == {"bfloat16"}
    graph, _ = pipeline("xla", chunk=CHUNK, scheme=scheme(quant)).run(traced_bfloat16)
    expected = ReferenceSession(graph, context=128, chunk=CHUNK).logits(text[:91])
    session = transom.open(artifact.folder, threads=1)
    logits = np.concatenate((session.logits(text[:90]), [session.decode(text[90])]))
    assert np.sqrt(np.square(logits - expected).mean()) < BFLOAT16_LOGITS_XLA
    # Layers, keys and values, kv heads, head dim, bytes, slots.
    assert session.cache_bytes()["local"] == 4 * 2 * 2 * 32 * 2 * WINDOW


def test_intermediate_stages_can_be_lowered(traced: Graph, text: list[int], text_logits: NDArray[np.float32]) -> None:
    """As traced, with attention and cache writes apart, and with both fused but caches that still grow."""
    stages = {type(stage.ran).__name__: stage.graph for stage in stages_of(traced, "xla")}
    graphs = {"as traced": traced, **{name: stages[name] for name in ("FuseRotary", "AttendBeforeWrites")}}
    for name, graph in graphs.items():
        run, parameters = jax.jit(step(graph, weights.stored_names(graph))), weights_of(graph)
        caches: Any = [np.zeros((1, 2, 64, 32), np.float32) for _ in graph.states]
        # Only fused operations know of padding.
        padded = CHUNK if name == "as traced" else CHUNK + 5
        start = 0
        for count, length in ((CHUNK, padded), (1, 1)):
            tokens, positions = np.zeros((1, length), np.int32), np.arange(count, dtype=np.int32)
            tokens[0, :count] = text[start : start + count]
            logits, caches, _ = run(parameters, caches, tokens, np.int32(start), np.int32(count), positions)
            assert np.abs(logits[0] - text_logits[start : start + count]).max() < FP32_LOGITS, name
            start += count


def test_a_residual_stream_is_summed_once(traced: Graph) -> None:
    """After attention and after the MLP of each layer; what the last one adds is read by the last norm alone."""
    graph, _ = pipeline("xla", chunk=CHUNK, scheme=scheme("none")).run(traced)
    caches: Any = [np.zeros((1, 2, 64, 32), np.float32) for _ in graph.states]
    tokens, number, positions = np.zeros((1, 1), np.int32), np.int32(0), np.zeros(1, np.int32)
    run = step(graph, weights.stored_names(graph))
    jaxpr = jax.make_jaxpr(run)(weights_of(graph), caches, tokens, number, np.int32(1), positions)
    assert str(jaxpr).count("optimization_barrier") == len(graph.states) - 1  # two states a layer


def weights_of(graph: Graph) -> dict[str, Any]:
    """All weights of a float graph."""
    names = weights.stored_names(graph)
    return {name: weight.read().numpy() for name, weight in graph.weights.items() if names[name] == name}


def test_lengths_of_programs() -> None:
    assert [xla.lengths(chunk) for chunk in (1, 2, 32, 37, 256)] == [
        [1],
        [1, 2],
        [1, 32],
        [1, 10, 37],
        [1, 16, 64, 256],
    ]


def test_files(exported: Export) -> None:
    """The file is what any reader of safetensors sees; the shared table stands in it once, and in no program."""
    from safetensors.torch import load_file

    pair = exported("xla", "none")
    tensors = load_file(pair.folder / WEIGHTS_FILE)
    assert [tuple(tensor.shape) for tensor in tensors.values()].count((512, 64)) == 1
    names = weights.stored_names(pair.graph)
    assert set(tensors) == set(names.values())
    for name, weight in pair.graph.weights.items():
        assert torch.equal(tensors[names[name]], weight.read()), name
    sizes = {path.name: path.stat().st_size for path in pair.folder.glob("*.jaxexport")}
    assert set(sizes) == {"decode.jaxexport", f"prefill_{CHUNK}.jaxexport", "prefill_10.jaxexport"}
    assert max(sizes.values()) < 512 * 64 * 4, "weights stand in a program"


def test_weights_that_share_a_buffer_are_written_once(traced: Graph, tmp_path: Path) -> None:
    graph = traced.clone()
    graph.weights["twin"] = graph.weights["norm.weight"]
    assert weights.stored_names(graph)["twin"] == "norm.weight"
    weights.write(graph, tmp_path / WEIGHTS_FILE)
    assert "twin" not in (tmp_path / WEIGHTS_FILE).read_bytes()[:20_000].decode(errors="ignore")


def test_quantised_bytes_stay_narrow(exported: Export) -> None:
    for quant in QUANTS:
        pair = exported("xla", quant)
        size, expected = (pair.folder / WEIGHTS_FILE).stat().st_size, pair.graph.weight_bytes()
        header = int.from_bytes((pair.folder / WEIGHTS_FILE).read_bytes()[:8], "little")
        assert size == 8 + header + expected


def test_progress_counts_bytes_and_programs(exported: Export, tmp_path: Path) -> None:
    graph = exported("xla", "int4").graph
    written: list[int] = []
    programs: list[tuple[int, int]] = []
    progress = Progress(on_bytes=written.append, on_program=lambda done, total: programs.append((done, total)))
    lowered = xla.export(graph, tmp_path, Options(target="xla", context=64, chunk=4), progress)
    assert sum(written) == graph.weight_bytes()
    assert programs == [(1, 2), (2, 2)]
    assert {(state.window, state.slots) for state in lowered.entry.states} == {(WINDOW, WINDOW), (None, 64)}
    assert any("six months" in reason for reason in lowered.not_done)


def test_a_topology_is_compiled_for(exported: Export, tmp_path: Path) -> None:
    pytest.importorskip("libtpu", reason="the tpu extra is not installed")
    programs: list[tuple[int, int]] = []
    options = Options(target="xla", context=64, chunk=1, topology="v5e:1x1")
    progress = Progress(on_program=lambda done, total: programs.append((done, total)))
    lowered = xla.export(exported("xla", "int4").graph, tmp_path, options, progress)
    assert programs == [(1, 2), (2, 2)]
    assert lowered.tpu is not None and json.loads(json.dumps(lowered.tpu)) == lowered.tpu
    report = lowered.tpu["programs"]["decode"]
    assert report["alias_bytes"] >= report["cache_bytes"] == (4 * WINDOW + 2 * 64) * 2 * 2 * 32 * 4
    with pytest.raises(TargetError, match="v99"):
        xla.export(exported("xla", "int4").graph, tmp_path, dataclasses.replace(options, topology="v99:1x1"), progress)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return torch.linalg.norm(x.erf(), dim=-1).erf() + x.cumsum(1).prod(-1)  # type: ignore[no-any-return]


def test_all_unsupported_operations_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    graph = export(Odd(), torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(UnsupportedOpsError, match="'xla'") as caught:
        xla.export(graph, tmp_path, Options(target="xla", context=8, chunk=4), Progress())
    _, *lines = str(caught.value).splitlines()
    assert lines[0].split("[")[0].split() == ["2", "x", "aten.erf.default"]
    assert sorted(line.split()[2] for line in lines) == [
        "aten.cumsum.default",
        "aten.erf.default",
        "aten.linalg_norm.default",
        "aten.prod.dim_int",
    ]
    assert all("test_xla.py:" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


class Details(nn.Module):
    """What is easily dropped: a bias, and the factor of an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(600, 8), nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor, start: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.table(tokens) + start
        return (torch.sub(torch.add(self.linear(x), x, alpha=3), x * x, alpha=2).index_select(1, positions),)


def test_biases_and_factors_are_lowered() -> None:
    torch.manual_seed(0)
    module = Details()
    inputs = torch.tensor([[3, 599, 0]]), torch.tensor(2), torch.tensor([2, 0])
    graph = export(module, *inputs)
    graph.input_names, graph.output_names = ("tokens", "start", "logit_positions"), ("logits",)
    arrays = [value.to(torch.int32).numpy() for value in inputs]
    logits, _, _ = step(graph, weights.stored_names(graph))(
        weights_of(graph), [], arrays[0], arrays[1], np.int32(3), arrays[2]
    )
    np.testing.assert_allclose(logits, module(*inputs)[0].detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("middle", [0, 8])
def test_packed_codes_of_an_odd_number_of_blocks(middle: int, tmp_path: Path) -> None:
    """Zero points of 3 blocks stand in 2 bytes; the fourth half is no zero point."""
    from safetensors.numpy import save_file

    codes = np.random.default_rng(0).integers(0, 16, (5, 3), dtype=np.uint8)
    pairs = np.pad(codes, ((0, 0), (0, 1)))
    save_file({"zeros": pairs[:, 0::2] | pairs[:, 1::2] << 4}, tmp_path / "file")
    parameter = Parameter(
        dtype="int4" if middle else "uint4", file_shape=(5, 3), axes=(1, 0), packed=True, middle=middle
    )
    actual = read_parameters(tmp_path / "file", {"zeros": parameter}, lambda array: array)["zeros"]
    np.testing.assert_array_equal(actual.astype(np.int32), codes.T.astype(np.int32) - middle)


PROGRAM = """
import resource, sys, tempfile, pathlib
import torch
from torch import nn
from transom.export.xla import weights
from transom.graphs.graph import Graph
from transom.formats.schemes import scheme
from transom.graphs.weight import Weight
from transom.passes.base import Pipeline
from transom.passes.convert_quantized import ConvertQuantized

torch.set_num_threads(1)
ROWS, WIDTH = 300_000, 512

class Table(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.table = nn.Embedding(rows, WIDTH)
    def forward(self, tokens):
        return nn.functional.linear(self.table(tokens), self.table.weight)

with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
    program = torch.export.export(Table(ROWS), (torch.zeros(1, 4, dtype=torch.int64),), strict=False)
noise = torch.randn(997, WIDTH)
read = lambda start, stop: noise[torch.arange(start, stop) % 997]
weight = Weight(shape=(ROWS, WIDTH), dtype=torch.float32, read_rows=read, origin="synthetic")
graph = Graph.from_program(program)
graph.weights = {"table.weight": weight}
graph, _ = Pipeline([ConvertQuantized(scheme(sys.argv[1]))]).run(graph)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "file"
    weights.write(graph, path)
    size = path.stat().st_size
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(size, (after - before) * 1024)
"""


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_table_of_600_megabytes_is_written_in_blocks(quant: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, quant], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > (600e6 if quant == "none" else 150e6)
    # Three row blocks of 64 MiB: the source's, the codes', and one that is on its way out.
    assert grown < 3 * 2**26 + 50e6, f"memory grew by {grown / 1e6:.0f} MB while {size / 1e6:.0f} MB were written"
