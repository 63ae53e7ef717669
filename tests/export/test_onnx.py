"""Both ONNX dialects on the tiny model: the numbers, the files, and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx.external_data_helper import uses_external_data
from torch import nn

import transom
from tests.artifacts import CHUNK, Export
from tests.case import export
from tests.conftest import WINDOW
from tests.tolerances import FP32_ATTENTION, FP32_LOGITS, INT8_ACTIVATIONS
from tests.zoo.tiny_gguf import TINY, write_gguf
from transom.backends.artifact import MODEL_FILE
from transom.errors import QuantizationError, UnsupportedOpsError
from transom.export.lowering import Table
from transom.export.onnx import emitter, onnxruntime, standard
from transom.export.onnx.data import ALIGNMENT, INLINE_BYTES, data_file
from transom.export.onnx.dialect import Dialect
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.weight import Weight
from transom.passes.base import Pipeline
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized, dequantized
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.model import Model, load

TARGETS = ["onnxruntime", "onnx"]


@pytest.mark.parametrize(
    ("target", "quant"),
    [
        *((target, quant) for target in TARGETS for quant in ("int8", "int4", "int4_block32", "fp8_e4m3")),
        *(("onnxruntime", quant) for quant in ("int4_table", "int4_channel", "int4_block128", "int8_channel")),
    ],
)
def test_quantised_logits_differ_by_the_activations_only(
    target: str, quant: str, exported: Export, text: list[int], text_logits: NDArray[np.float32]
) -> None:
    """Held against the reference on the very same codes, whose activations are float32."""
    pair = exported(target, quant)
    session, expected = pair.session(), pair.reference().logits(text[:101])
    logits = session.logits(text[:100])
    assert np.sqrt(np.square(logits - expected[:100]).mean()) < INT8_ACTIVATIONS
    assert np.sqrt(np.square(session.decode(text[100]) - expected[100]).mean()) < INT8_ACTIVATIONS
    assert np.abs(expected - text_logits[:101]).max() > FP32_LOGITS, "nothing was quantised"


@pytest.mark.parametrize("target", TARGETS)
def test_activations_of_8_bit_floats_are_not_rounded(
    target: str, exported: Export, text: list[int], text_logits: NDArray[np.float32]
) -> None:
    """Where the table is of floats too, nothing differs from the reference."""
    pair = exported(target, "sfp8")
    session, expected = pair.session(), pair.reference().logits(text[:101])
    assert np.abs(session.logits(text[:100]) - expected[:100]).max() < FP32_LOGITS
    assert np.abs(session.decode(text[100]) - expected[100]).max() < FP32_LOGITS
    assert np.abs(expected - text_logits[:101]).max() > 100 * FP32_LOGITS, "nothing was quantised"


@pytest.mark.parametrize("target", TARGETS)
def test_a_gguf_file_as_shipped(target: str, tmp_path: Path) -> None:
    """Its own codes, of six kinds that packing brings together, are the numbers of the plain module."""
    config = dataclasses.replace(TINY, layer_kinds=("local", "global"))
    types = {
        "attn_q.weight": "Q4_0",
        "attn_k.weight": "Q5_0",
        "attn_v.weight": "Q6_K",
        "attn_output.weight": "Q8_0",
        "ffn_gate.weight": "Q4_1",
        "ffn_up.weight": "Q5_1",
        "ffn_down.weight": "Q6_K",
        "token_embd.weight": "Q8_0",
    }
    model = load(write_gguf(tmp_path / "mixed.gguf", config, random_weights(config, 0), types=types))
    tokens = [index * 37 % config.vocab_size for index in range(3 * WINDOW + 6)]
    with torch.no_grad():
        expected = model.eager()(torch.tensor([tokens]), torch.tensor(0), None)[0][0].numpy()
    artifact = transom.compile(model, target=target, quant="as_shipped", chunk=CHUNK, out=tmp_path / "model")
    session = transom.open(artifact.folder, threads=1)
    for logits, rows in ((session.logits(tokens[:-1]), expected[:-1]), (session.decode(tokens[-1]), expected[-1])):
        difference = np.sqrt(np.square(logits - rows).mean())
        assert difference < INT8_ACTIVATIONS * expected.std() / 2.5, "more than rounded activations"


def test_standard_onnx_refuses_a_table_of_4_bits(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="8-bit table"):
        transom.compile(tiny, target="onnx", quant="int4_table", out=tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quant", ["none", "int8", "int4", "sfp8"])
def test_the_standard_dialect_is_standard(quant: str, exported: Export) -> None:
    path = exported("onnx", quant).folder / MODEL_FILE
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    names = [entry.name for entry in model.graph.input]
    assert names[:3] == ["tokens", "start", "logit_positions"]
    assert names[3:5] == ["cache.0.key", "cache.0.value"]


def test_the_reference_evaluator_of_onnx_agrees(
    exported: Export, text: list[int], text_logits: NDArray[np.float32]
) -> None:
    """Onnx's own definition of every operator, past the window, in bounded caches."""
    pair = exported("onnx", "none")
    evaluator = onnx.reference.ReferenceEvaluator(str(pair.folder / MODEL_FILE))
    shapes = [list(state.shape(64)) for state in pair.graph.states.values()]
    names = list(pair.graph.states)
    caches: list[Any] = [np.zeros(shape, np.float32) for shape in shapes]
    start = 0
    for count in (CHUNK, 1, 3):
        feeds = {
            "tokens": np.array([text[start : start + count]]),
            "start": np.array(start),
            "logit_positions": np.arange(count),
            **dict(zip(names, caches, strict=True)),
        }
        outputs: Any = evaluator.run(None, feeds)
        logits, *caches = outputs
        assert np.abs(logits[0] - text_logits[start : start + count]).max() < FP32_LOGITS
        start += count


@pytest.mark.parametrize("quant", ["none", "int8", "int4", "sfp8"])
@pytest.mark.parametrize("target", TARGETS)
def test_files(target: str, quant: str, exported: Export) -> None:
    """One copy of the embedding; every tensor on a page of its own; nothing past the end, nothing twice."""
    pair = exported(target, quant)
    model = onnx.load(pair.folder / MODEL_FILE, load_external_data=False)
    size, ends = (pair.folder / data_file(MODEL_FILE)).stat().st_size, [0]
    tables = [tensor.name for tensor in model.graph.initializer if np.prod(tensor.dims) == 512 * 64]
    assert len(tables) == 1 and tables[0].startswith("embed_tokens.weight")
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(entries["offset"]), int(entries["length"])
            assert offset % ALIGNMENT == 0 and offset >= ends[-1] and entries["location"] == data_file(MODEL_FILE)
            ends.append(offset + length)
        else:
            assert len(tensor.raw_data) <= INLINE_BYTES
    assert ends[-1] == size
    assert model.ByteSize() < 200_000


def test_quantised_bytes_are_those_of_the_scheme(exported: Export) -> None:
    sizes = {quant: exported("onnxruntime", quant).graph.weight_bytes() for quant in ("none", "int8", "int4")}
    assert sizes["int4"] < sizes["int8"] < 0.35 * sizes["none"]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return torch.linalg.norm(x.erf(), dim=-1).erf() + x.prod(-1).erf() + x.cumsum(1).prod(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dialect", [onnxruntime.DIALECT, standard.DIALECT], ids=lambda dialect: dialect.name)
def test_all_unsupported_operations_are_named_and_nothing_is_written(dialect: Dialect, tmp_path: Path) -> None:
    graph: Graph = export(Odd(), torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(UnsupportedOpsError) as caught:
        emitter.write(graph, dialect, tmp_path)
    first, *lines = str(caught.value).splitlines()
    assert dialect.name in first
    assert lines[0].split("[")[0].split() == ["3", "x", "aten.erf.default"]
    assert sorted(line.split()[2] for line in lines) == [
        "aten.cumsum.default",
        "aten.erf.default",
        "aten.linalg_norm.default",
        "aten.prod.dim_int",
    ]
    assert all("test_onnx.py:" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


class Details(nn.Module):
    """What is easily dropped: a bias, and the factor of an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(600, 8), nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return torch.sub(torch.add(self.linear(x), x, alpha=3), x * x, alpha=2)


@pytest.mark.parametrize("dialect", [onnxruntime.DIALECT, standard.DIALECT], ids=lambda dialect: dialect.name)
def test_biases_and_factors_are_lowered(dialect: Dialect, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, tokens = Details(), torch.tensor([[3, 599, 0]])
    emitter.write(export(module, tokens), dialect, tmp_path)
    session = ort.InferenceSession(tmp_path / MODEL_FILE, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"tokens": tokens.numpy()})
    assert np.abs(logits - module(tokens).detach().numpy()).max() < FP32_ATTENTION


def test_an_operation_is_lowered_once() -> None:
    table = Table()

    @table.lowers(aten.erf.default)
    def first(emitter: emitter.Emitter, node: object) -> str:
        return ""

    with pytest.raises(ValueError, match=r"aten\.erf\.default is lowered by first already"):
        table.lowers(aten.erf.default)(first)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(256, 70_000, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("quant", ["none", "int4_block32", "int8"])
def test_a_transposed_matrix_of_several_blocks(quant: str, tmp_path: Path) -> None:
    """Blocks of rows become strips of columns, each read once."""
    graph, name = export(Wide(), torch.zeros(1, 256)), "proj.weight"
    rows, columns = graph.weights[name].shape
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    reads: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> torch.Tensor:
        reads.append((start, stop))
        return numbers[start:stop]

    graph.weights[name] = Weight(shape=(rows, columns), dtype=torch.float32, read_rows=read, origin="noise")
    graph, _ = Pipeline([Canonicalize(), ConvertQuantized(scheme(quant))]).run(graph)
    emitter.write(graph, standard.DIALECT, tmp_path)
    starts, stops = zip(*reads, strict=True)
    assert len(reads) > 1 and (0, *stops) == (*starts, rows), "every row is read once, in order"
    initializers = onnx.load(tmp_path / MODEL_FILE).graph.initializer
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in initializers}
    if quant == "none":
        np.testing.assert_array_equal(arrays[f"{name}.transposed"], numbers.numpy().T)
        return
    codes = arrays[f"{name}.codes.transposed"].astype(np.float32).T.reshape(rows, -1, 32)
    decoded = (codes * arrays[f"{name}.scales.transposed"].T[..., None]).reshape(rows, columns)
    np.testing.assert_array_equal(decoded, dequantized(name, Weight.of(numbers), scheme(quant)).numpy())
