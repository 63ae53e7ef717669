"""Quantised weights mean the same numbers on every target, to the bit, whatever the scheme.

Each runtime is asked for the numbers that it computes with: a table by its rows, a matrix by its products with ones at
one column each, of which every other term is zero. So nothing is rounded but the number itself (a zero may have either
sign). The weights go through each target's own file.

ONNX Runtime rounds activations of quantised products to int8, and has 1.0 back as 127 * (1 / 127), which is not always
1: here its products are told to compute in float32 (`accuracy_level` 1). Their codes are the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tests.case import export, run_graph
from tests.zoo.tiny_gguf import TINY, write_gguf
from transom.backends.artifact import MODEL_FILE
from transom.backends.safetensors import reading
from transom.errors import QuantizationError
from transom.export.onnx import emitter, onnxruntime, standard
from transom.export.onnx.dialect import Dialect
from transom.export.tensorrt import dialect
from transom.formats.schemes import SCHEMES, scheme
from transom.graphs import ops
from transom.graphs.graph import Graph, Tap
from transom.graphs.weight import Weight
from transom.passes.base import Pipeline
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized, dequantized
from transom.zoo.checkpoints import safetensors_writer
from transom.zoo.checkpoints.gguf import open_gguf
from transom.zoo.checkpoints.random import random_weights

ROWS, COLUMNS = 48, 256
TABLE, QUERY, DOWN = "embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight"
OUTPUTS = (TABLE, TABLE, QUERY, DOWN)
"""Whose numbers the outputs of the graph are: looked-up rows, then three products."""

SHIPPED = {"attn_q.weight": "Q4_0", "token_embd.weight": "Q8_0", "ffn_down.weight": "Q6_K"}
WITH_OFFSETS = {"attn_q.weight": "Q4_1", "token_embd.weight": "Q5_1", "ffn_down.weight": "Q4_1"}

EYE = np.eye(COLUMNS, dtype=np.float32)[None]
TOKENS = np.arange(ROWS)[None]
SOME = [0, 1, 31, 32, 130, COLUMNS - 1]
"""Columns that are asked for one at a time: kernels for one token are others."""

Outputs = list[NDArray[np.float32]]
"""Rows of the table [R, K], and each matrix transposed [K, R]."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(COLUMNS, ROWS, bias=False)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Linear(COLUMNS, ROWS, bias=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()


class Weights(nn.Module):
    """A table that is the head too, and a projection of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(ROWS, COLUMNS), nn.ModuleList([Layer()])

    def forward(self, tokens: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layer: Any = self.layers[0]
        head = nn.functional.linear(x, self.embed_tokens.weight)
        return self.embed_tokens(tokens), head, layer.self_attn.q_proj(x), layer.mlp.down_proj(x)


@pytest.fixture(scope="module")
def plain() -> Graph:
    """Weights of every size, with blocks of zeros and with numbers that stick out."""
    generator = torch.Generator().manual_seed(0)
    module = Weights()
    for parameter in module.parameters():
        sizes = torch.exp2(torch.randint(-6, 3, (ROWS, 1), generator=generator))
        parameter.data = torch.randn(ROWS, COLUMNS, generator=generator) * sizes
        parameter.data[5], parameter.data[6, 32:64] = 0, 0
        parameter.data[7, 100], parameter.data[8, 200] = 9, -9
    dynamic: Any = ({}, {1: torch.export.Dim("tokens", min=1, max=COLUMNS)})
    graph = export(module, torch.from_numpy(TOKENS), torch.from_numpy(EYE), dynamic_shapes=dynamic)
    # What graphs return beside logits and caches are taps.
    graph.taps = tuple(Tap(name=f"tap.{index}", layer=None, op="projection") for index in range(1, len(OUTPUTS)))
    return Pipeline([Canonicalize()]).run(graph)[0]


def of_gguf(plain: Graph, path: Path, types: dict[str, str]) -> Graph:
    """The same graph, with weights that a GGUF file holds as codes."""
    weights = open_gguf(write_gguf(path, TINY, random_weights(TINY, 0), types=types))[1].weights
    graph = plain.clone()
    for name in (TABLE, QUERY, DOWN):
        graph.weights[name] = dataclasses.replace(weights[name], shape=(ROWS, COLUMNS))
    return graph


@pytest.fixture(scope="module")
def shipped(plain: Graph, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return of_gguf(plain, tmp_path_factory.mktemp("gguf") / "codes.gguf", SHIPPED)


def converted(graph: Graph, quant: str) -> Graph:
    return Pipeline([ConvertQuantized(scheme(quant))]).run(graph)[0]


# What each runtime says.


def of_reference(graph: Graph, folder: Path) -> tuple[Outputs, Outputs]:
    runs = [run_graph(graph, torch.from_numpy(TOKENS), torch.from_numpy(x)) for x in (EYE, EYE[:, SOME])]
    return tuple([value[0].numpy() for value in outputs] for outputs in runs)  # type: ignore[return-value]


def _whole_and_single(run: Callable[[dict[str, Any]], Any]) -> tuple[Outputs, Outputs]:
    """All columns at once, and some one at a time."""
    whole = run({"tokens": TOKENS, "x": EYE})
    single = [run({"tokens": TOKENS, "x": EYE[:, column : column + 1]}) for column in SOME]
    parts = [whole[0], *(np.concatenate([one[part] for one in single], 1) for part in range(1, len(whole)))]
    return [value[0] for value in whole], [value[0] for value in parts]


def _of_onnx(graph: Graph, dialect: Dialect, folder: Path) -> tuple[Outputs, Outputs]:
    emitter.write(graph, dialect, folder)
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    return _whole_and_single(lambda feeds: session.run(None, feeds))


def of_onnxruntime(graph: Graph, folder: Path) -> tuple[Outputs, Outputs]:
    return _of_onnx(graph, onnxruntime.DIALECT, folder)


def of_onnx(graph: Graph, folder: Path) -> tuple[Outputs, Outputs]:
    """By ONNX Runtime, and by onnx's own definition of every operator."""
    outputs = _of_onnx(graph, standard.DIALECT, folder)
    evaluator = onnx.reference.ReferenceEvaluator(str(folder / MODEL_FILE))
    defined = evaluator.run(None, {"tokens": TOKENS, "x": EYE})
    for ours, theirs in zip(outputs[0], defined, strict=True):
        np.testing.assert_array_equal(ours, theirs[0])
    return outputs


def of_xla(graph: Graph, folder: Path) -> tuple[Outputs, Outputs]:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_platforms", "cpu")
    from transom.backends.xla.parameters import WEIGHTS_FILE, read_parameters
    from transom.export.xla import weights
    from transom.export.xla.interpreter import step

    graph = dataclasses.replace(graph, input_names=("tokens", "x"))
    graph.output_names = ("logits", *(tap.name for tap in graph.taps))
    weights.write(graph, folder / WEIGHTS_FILE)
    parameters = read_parameters(folder / WEIGHTS_FILE, weights.parameters(graph), jax.numpy.asarray)
    run = jax.jit(step(graph, weights.stored_names(graph)))

    def call(feeds: dict[str, Any]) -> Any:
        first, _, others = run(parameters, (), feeds["tokens"].astype(np.int32), feeds["x"])
        return [np.asarray(value) for value in (first, *others)]

    return _whole_and_single(call)


@functools.cache
def _kernels(layout: Any) -> Any:
    """The compiled kernels of a layout: for one token, for several, and for rows."""
    import tvm

    from transom.export.tvm.kernels import quantized
    from transom.export.tvm.processor import processor

    host = processor(None)
    kernels = {
        "single": quantized.vector_product(layout, host.tile),
        "several": quantized.matrix_product(layout, host.tile),
        "rows": quantized.table_rows(layout),
    }
    module = tvm.IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()})
    return tvm.compile(module, target=host.target())


def of_tvm(graph: Graph, folder: Path) -> tuple[Outputs, Outputs]:
    tvm = pytest.importorskip("tvm")
    from transom.export.tvm.products import _codes

    safetensors_writer.write(graph.weights, folder / "weights")
    stored = safetensors_writer.stored_names(graph.weights)
    with reading(folder / "weights") as file:
        tensors = {name: np.ascontiguousarray(file.read(stored[name])) for name in graph.weights}

    def call(node: Any, kernel: str, x: NDArray[Any], shape: tuple[int, int]) -> NDArray[np.float32]:
        _, codes, scales, zeros, format = node.args
        names = [graph.weight_of(part)[0] for part in (codes, scales, codes if zeros is None else zeros)]  # type: ignore[index]
        arrays = [tensors[name].view(np.uint8) if name.endswith("codes") else tensors[name] for name in names]
        out = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
        _kernels(_codes(codes, zeros, format))[kernel](*map(tvm.runtime.tensor, (x, *arrays)), out)
        result: NDArray[np.float32] = out.numpy()
        return result

    whole, single = [], []
    for node in graph.outputs.values():
        if node.target is ops.EMBEDDING_QUANTIZED:
            whole.append(call(node, "rows", TOKENS[0], (ROWS, COLUMNS)))
            single.append(whole[-1])
        else:
            whole.append(call(node, "several", EYE[0], (COLUMNS, ROWS)))
            single.append(np.concatenate([call(node, "single", EYE[0, [column]], (1, ROWS)) for column in SOME]))
    return whole, single


def of_tensorrt(graph: Graph, folder: Path) -> tuple[Outputs, Outputs]:
    """The file that engines are built from, in float32; its scales lose nothing in bfloat16."""
    emitter.write(graph, dialect.DIALECT, folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / MODEL_FILE)
    scales = [entry for entry in model.graph.initializer if ".scales" in entry.name]
    assert scales
    for entry in scales:
        numbers = torch.from_numpy(onnx.numpy_helper.to_array(entry).copy())
        assert torch.equal(numbers.bfloat16().float(), numbers) and bool((numbers > 0).all()), entry.name
    return _whole_and_single(lambda feeds: session.run(None, feeds))


RUNTIMES = {
    "reference": of_reference,
    "onnxruntime": of_onnxruntime,
    "onnx": of_onnx,
    "xla": of_xla,
    "tvm": of_tvm,
    "tensorrt": of_tensorrt,
}


def expect_equal(graph: Graph, quant: str, target: str, folder: Path, rounded: Graph | None = None) -> None:
    rounded = rounded or converted(graph, quant)
    assert {node.target for node in rounded.calls_all()} == {ops.LINEAR_QUANTIZED, ops.EMBEDDING_QUANTIZED}
    whole, single = RUNTIMES[target](rounded, folder)
    for name, actual, some in zip(OUTPUTS, whole, single, strict=True):
        expected = dequantized(name, graph.weights[name], scheme(quant)).numpy()
        if actual is whole[0]:
            np.testing.assert_array_equal(actual, expected)
        else:
            np.testing.assert_array_equal(actual, expected.T)
            np.testing.assert_array_equal(some, expected.T[SOME])


QUANTS = sorted(SCHEMES.keys() - {"none", "fp8_activations", "fp8_channel_activations", "as_shipped"})
"""What `fp8_activations` does to weights is what `fp8` does."""

PAIRS = [
    (quant, target)
    for quant in QUANTS
    for target in RUNTIMES
    if target != "tensorrt" or all(spec.scale_dtype == "bfloat16" for spec in SCHEMES[quant].specs)
]
"""Of the schemes that TensorRT takes, those whose scales it must not round."""


def test_tensorrt_is_among_them() -> None:
    assert {quant for quant, target in PAIRS if target == "tensorrt"} == {"int4_block32_bf16", "fp8_channel"}


@pytest.mark.parametrize(("quant", "target"), PAIRS)
def test_weights_are_equal_to_the_bit(quant: str, target: str, plain: Graph, tmp_path: Path) -> None:
    if target == "onnx" and quant in ("int4_table", "int4_block32_bf16"):
        with pytest.raises(QuantizationError, match="8-bit table"):
            expect_equal(plain, quant, target, tmp_path)
        return
    expect_equal(plain, quant, target, tmp_path)


@pytest.mark.parametrize("target", sorted(RUNTIMES.keys() - {"tensorrt"}))
@pytest.mark.parametrize("quant", ["as_shipped", "int8_block32:int8_block32"])
def test_weights_of_a_gguf_file_are_equal_to_the_bit(quant: str, target: str, shipped: Graph, tmp_path: Path) -> None:
    expect_equal(shipped, quant, target, tmp_path)
    kept = {name: quant == "as_shipped" or name != DOWN for name in (TABLE, QUERY, DOWN)}
    for name, is_kept in kept.items():
        numbers = dequantized(name, shipped.weights[name], scheme(quant))
        assert torch.equal(numbers, shipped.weights[name].read()) == is_kept, "Q6_K has blocks of 16"


@pytest.mark.parametrize("target", sorted(RUNTIMES.keys() - {"tensorrt"}))
def test_codes_with_offsets_are_equal_to_the_bit(target: str, plain: Graph, tmp_path: Path) -> None:
    """Of Q4_1 and Q5_1, which mean what the `gguf` package says."""
    graph = of_gguf(plain, tmp_path / "offsets.gguf", WITH_OFFSETS)
    expect_equal(graph, "as_shipped", target, tmp_path)
    for name in (TABLE, QUERY, DOWN):
        assert torch.equal(dequantized(name, graph.weights[name], scheme("as_shipped")), graph.weights[name].read())


@pytest.mark.parametrize("part", ["scales", "codes"])
def test_one_bit_is_noticed(part: str, plain: Graph, tmp_path: Path) -> None:
    rounded = converted(plain, "int8")
    wrong = rounded.weights[f"{DOWN}.{part}"].read()
    wrong.view(torch.uint8).flatten()[100] ^= 1
    rounded.weights[f"{DOWN}.{part}"] = Weight.of(wrong)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        expect_equal(plain, "int8", "onnxruntime", tmp_path, rounded)
