"""The tiny model as machine code: the numbers of the graph and of each kernel, the files, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import struct
import sys
from collections.abc import Sequence
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
from tests.tolerances import FP32_ATTENTION, FP32_LOGITS, FP32_SUMS
from transom.backends.safetensors import ALIGNMENT, reading
from transom.backends.tvm.artifact import LIBRARY, PARAMETERS
from transom.backends.tvm.versions import PAIR, require
from transom.errors import TargetError, UnsupportedOpsError
from transom.formats.quantized import dequantize, pack
from transom.formats.rounding import round_rows
from transom.formats.schemes import QuantSpec
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.ops import Mask
from transom.graphs.weight import Weight
from transom.zoo.checkpoints import safetensors_writer
from transom.zoo.model import Model

tvm = pytest.importorskip("tvm")

from transom.export.exporter import Progress  # noqa: E402
from transom.export.options import Options  # noqa: E402
from transom.export.tvm import linking  # noqa: E402
from transom.export.tvm.export import export as export_tvm  # noqa: E402
from transom.export.tvm.kernels import attention, linear, quantized, rows  # noqa: E402
from transom.export.tvm.kernels.tile import AVX2, AVX512, NEON, SSE, Tile, divisor, part  # noqa: E402
from transom.export.tvm.processor import processor  # noqa: E402

HOST = processor(None)


@pytest.mark.parametrize("quant", ["int8", "int4", "int4_table", "int4_block32", "sfp8", "fp8", "fp8_channel"])
def test_quantised_logits_are_the_references(
    quant: str, exported: Export, text: list[int], text_logits: NDArray[np.float32]
) -> None:
    """Activations stay in float32, so quantised weights change nothing but the order of sums."""
    pair = exported("tvm", quant)
    session, expected = pair.session(), pair.reference().logits(text[:101])
    assert np.abs(session.logits(text[:100]) - expected[:100]).max() < FP32_LOGITS
    assert np.abs(session.decode(text[100]) - expected[100]).max() < FP32_LOGITS
    assert np.abs(expected - text_logits[:101]).max() > 100 * FP32_LOGITS, "nothing was quantised"


def test_files_and_details(exported: Export) -> None:
    pair = exported("tvm", "int4")
    manifest = json.loads((pair.folder / "manifest.json").read_text())
    assert manifest["entries"]["decode"]["payload"] == LIBRARY
    assert manifest["libraries"].items() >= PAIR.items()
    details = manifest["details"]
    assert (details["triple"], details["cpu"]) == (HOST.triple, HOST.cpu)
    with reading(pair.folder / PARAMETERS) as file:
        weights = {name: file.read(name) for name in file.entries}
    assert set(details["parameters"]) == set(weights)
    assert all(array.ctypes.data % ALIGNMENT == 0 for array in weights.values())
    # The embedding is the head, and stands in the file once.
    assert [name for name in weights if name.startswith("embed") or "lm_head" in name] == [
        "embed_tokens.weight.codes",
        "embed_tokens.weight.scales",
    ]
    assert sum(array.nbytes for array in weights.values()) == pair.graph.weight_bytes()


def test_tensors_of_odd_sizes_push_none_off_its_alignment(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "even": torch.arange(32.0),
        "scalar": torch.tensor(3),
        "wide": torch.randn(5, 16),
        "flags": torch.tensor([True, False, True]),
    }
    counts: list[int] = []
    weights = {name: Weight.of(tensor) for name, tensor in tensors.items()}
    weights["again"] = weights["wide"]
    safetensors_writer.write(weights, tmp_path / PARAMETERS, on_bytes=counts.append)
    with reading(tmp_path / PARAMETERS) as file:
        arrays = {name: file.read(name) for name in file.entries}
    assert sum(counts) == sum(array.nbytes for array in arrays.values())
    assert arrays.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())
        assert arrays[name].ctypes.data % ALIGNMENT == 0
    from safetensors.torch import load_file

    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / PARAMETERS).items())


# Kernels, each against the body of the operation that it stands for.

TILES = [HOST.tile] if HOST.machine != "x86_64" else [HOST.tile, AVX2, NEON, SSE]
"""Every tile is right on every machine; only its speed differs."""


def run(kernel: Any, *inputs: torch.Tensor, out: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compile a kernel and call it; returns its output, and its inputs as it left them."""
    *left, output = in_place(kernel, *inputs, torch.full(tuple(out), torch.nan))
    return output, left


def in_place(kernel: Any, *buffers: torch.Tensor) -> list[torch.Tensor]:
    """Compile a kernel and call it; returns its buffers as it left them."""
    module = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target=HOST.target())
    arrays = [tvm.runtime.tensor(value.contiguous().numpy()) for value in buffers]
    module["main"](*arrays)
    return [torch.from_numpy(array.numpy()) for array in arrays]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() < FP32_SUMS * expected.abs().max()


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.registers}x{tile.lanes}")
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 64, 96), (1, 7, 3), (1, 40, 2056), (5, 33, 7), (37, 96, 4112), (7, 32, 4096), (0, 8, 8)]
)
def test_linear(m: int, n: int, k: int, tile: Tile) -> None:
    x, weight = torch.randn(m, k), torch.randn(n, k)
    kernel = (linear.vector_product if m == 1 else linear.matrix_product)(n, k, tile)
    product, _ = run(kernel, x, weight, out=(m, n))
    if m:
        close(product, x @ weight.T)


FORMATS = [
    *((format, symmetric) for format in ("int4", "int8") for symmetric in (True, False)),
    ("float8_e4m3fn", True),
    ("sfp8", True),
]


@pytest.mark.parametrize(("format", "symmetric"), FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k", "block"), [(1, 6, 96, 32), (1, 64, 48, 16), (9, 33, 160, 32), (37, 64, 384, 128)]
)
def test_linear_quantized(m: int, n: int, k: int, block: int, format: Any, symmetric: bool) -> None:
    x = torch.randn(m, k)
    parts = round_rows(torch.randn(n, k) + 0.3, QuantSpec(format=format, block=block, symmetric=symmetric))
    codes, scales = pack(parts.codes, format), parts.scales
    zeros = None if parts.zero_points is None else pack(parts.zero_points, format)
    layout = quantized.Codes(n=n, blocks=k // block, block=block, format=format, symmetric=symmetric)
    kernel = (quantized.vector_product if m == 1 else quantized.matrix_product)(layout, HOST.tile)
    raw = codes.view(torch.uint8)
    given = raw if zeros is None else zeros
    product, _ = run(kernel, x, raw, scales, given, out=(m, n))
    close(product, ops.linear_quantized(x, codes, scales, zeros, format))
    tokens = torch.tensor([n - 1, 0, 3])
    table, _ = run(quantized.table_rows(layout), tokens, raw, scales, given, out=(3, k))
    assert torch.equal(table, ops.embedding_quantized(tokens, codes, scales, zeros, format))


@pytest.mark.parametrize("format", ["float8_e4m3fn", "sfp8"])
def test_every_8_bit_float_is_exact(format: Any) -> None:
    """All 256 bytes, subnormals among them; those that are no number are left out."""
    raw = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    raw[[0x7F, 0xFF]] = 0
    codes = raw.view(torch.float8_e4m3fn) if format == "float8_e4m3fn" else raw
    layout = quantized.Codes(n=1, blocks=2, block=128, format=format, symmetric=True)
    scales = torch.tensor([[1.0, 3.0]])
    numbers, _ = run(
        quantized.table_rows(layout), torch.zeros(1, dtype=torch.int64), raw.view(1, 2, 128), scales,
        raw.view(1, 2, 128), out=(1, 256),
    )  # fmt: skip
    assert torch.equal(numbers, dequantize(codes.view(1, 2, 128), scales, None, format))


@pytest.mark.parametrize(("m", "heads", "h"), [(1, 1, 640), (5, 3, 10), (37, 4, 32)])
def test_operations_on_rows(m: int, heads: int, h: int) -> None:
    tile, x, weight = HOST.tile, torch.randn(m, heads, h), torch.randn(h)
    wide = x.view(m, -1)
    output, _ = run(rows.rms_norm(heads, h, 1e-6, tile), wide, weight, out=wide.shape)
    close(output, ops.rms_norm(x, weight, 1e-6).view(m, -1))
    residual, weight = torch.randn(m, heads * h), torch.randn(heads * h)
    total = torch.zeros_like(wide)
    # The kernel's last two parameters are its outputs: the norm, then the sum.
    output, left = run(
        rows.add_rms_norm(heads * h, 1e-6, tile), wide, residual, weight, torch.zeros_like(wide), out=total.shape
    )
    norm, expected = ops.add_rms_norm(wide, residual, weight, 1e-6)
    assert torch.equal(output, expected)
    close(left[3], norm)
    cos, sin = torch.randn(m, h // 2), torch.randn(m, h // 2)
    output, _ = run(rows.rotary(heads, h, tile), wide, cos, sin, out=wide.shape)
    close(output, ops.rotary(x[None], cos, sin, False).view(m, -1))
    packed = torch.randn(m, 2 * h) * 8
    packed[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -1e-30])
    for single, activation in itertools.product({False, m == 1}, ops.ACTIVATIONS):
        output, _ = run(rows.gated(h, activation, tile, single=single), packed, out=(m, h))
        close(output, ops.gated(packed, activation))
    for activation, function in {**ops.ACTIVATIONS, "tanh": torch.tanh}.items():
        output, _ = run(rows.activated(2 * h, activation, tile), packed, out=packed.shape)
        close(output, function(packed))
    bias = torch.randn(heads * h)
    output, _ = run(rows.layer_norm(1, heads * h, 1e-6, tile), wide + 9, weight, bias, out=wide.shape)
    close(output, torch.nn.functional.layer_norm(wide + 9, (heads * h,), weight, bias, 1e-6))
    index = torch.tensor([m - 1, 0])
    output, _ = run(rows.table_rows(heads * h, tile), index, wide, out=(2, heads * h))
    assert torch.equal(output, wide[index])


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.registers}x{tile.lanes}")
@pytest.mark.parametrize(
    ("m", "heads", "key_heads", "h", "slots", "mask", "start", "softcap"),
    [
        (1, 4, 1, 32, 16, Mask(window=16), 0, 0),
        (1, 4, 1, 32, 16, Mask(window=16), 1000, 2),
        (1, 4, 2, 32, 300, Mask(), 299, 0),
        (37, 4, 2, 32, 52, Mask(window=16), 5, 0),
        (37, 4, 2, 32, 16, Mask(window=16), 50, 2),
        (70, 2, 2, 10, 66, Mask(window=66), 66, 0),
        (5, 6, 2, 24, 200, Mask(), 195, 50),
        (37, 4, 2, 32, 300, Mask(dilation=3), 263, 0),
        (300, 4, 2, 32, 128, Mask(segment=129, dilation=4), 1000, 0),
    ],
)
def test_attention_and_writes(
    m: int, heads: int, key_heads: int, h: int, slots: int, mask: Mask, start: int, softcap: float, tile: Tile
) -> None:
    """Capped scores come with sinks, some far above all scores."""
    sinks = torch.linspace(-3, 9, heads) if softcap else None
    q, k, v = (torch.randn(1, m, count, h) for count in (heads, key_heads, key_heads))
    caches = [torch.randn(1, key_heads, slots, h) for _ in range(2)]
    position = torch.tensor(start)
    expected = ops.attend(
        q, k, v, *caches, position, None, sinks, scale=0.3, softcap=softcap, **dataclasses.asdict(mask)
    )
    rule = attention.Rule(mask=mask, scale=0.3, softcap=softcap, sinks=sinks is not None)
    kernel = attention.attend(heads, key_heads, h, rule, tile, single=m == 1)
    flat = [value.view(m, -1) for value in (q, k, v)]
    attended, inputs = run(kernel, *flat, *caches, position, flat[0] if sinks is None else sinks, out=(m, heads * h))
    assert (attended - expected.view(m, -1)).abs().max() < FP32_ATTENTION
    assert torch.equal(inputs[3], caches[0]) and torch.equal(inputs[4], caches[1])
    written = ops.write_cache(caches[0], k, position, heads_first=False)
    assert torch.equal(in_place(attention.write_cache(key_heads, h, tile), flat[1], caches[0], position)[1], written)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.registers}x{tile.lanes}")
@pytest.mark.parametrize("blocks", [(), ((0, 20),), ((3, 6), (6, 37))], ids=len)
@pytest.mark.parametrize("window", [16, 0])
def test_images_are_seen_to_their_ends(window: int, blocks: Sequence[tuple[int, int]], tile: Tile) -> None:
    m, heads, key_heads, h, slots, start = 37, 4, 2, 32, window or 100, 50
    q, k, v = (torch.randn(1, m, count, h) for count in (heads, key_heads, key_heads))
    caches, position = [torch.randn(1, key_heads, slots, h) for _ in range(2)], torch.tensor(start)
    until = start + torch.arange(m)
    for first, end in blocks:
        until[first:end] = start + end - 1
    expected = ops.attend(q, k, v, *caches, position, until, scale=0.3, window=window)
    kernel = attention.attend(
        heads, key_heads, h, attention.Rule(mask=Mask(window=window), scale=0.3, images=True), tile
    )
    flat = [value.view(m, -1) for value in (q, k, v)]
    attended, _ = run(kernel, *flat, *caches, position, until, flat[0], out=(m, heads * h))
    assert (attended - expected.view(m, -1)).abs().max() < FP32_ATTENTION


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.registers}x{tile.lanes}")
@pytest.mark.parametrize(
    ("m", "slots", "heads", "key_heads", "h"),
    [(1, 1, 2, 2, 8), (5, 64, 4, 2, 10), (37, 70, 3, 3, 72), (attention.QUERIES + 3, 200, 2, 1, 32)],
)
def test_attention_of_encoders(m: int, slots: int, heads: int, key_heads: int, h: int, tile: Tile) -> None:
    q, k, v = (torch.randn(1, *shape, h) for shape in ((m, heads), (slots, key_heads), (slots, key_heads)))
    expected = ops.full_attention(*(value.transpose(1, 2) for value in (q, k, v)), scale=0.3).transpose(1, 2)
    flat = [value.view(value.shape[1], -1) for value in (q, k, v)]
    attended, _ = run(attention.attend_fully(heads, key_heads, h, 0.3, tile), *flat, out=(m, heads * h))
    assert (attended - expected.reshape(m, -1)).abs().max() < FP32_ATTENTION


def test_tiles_divide() -> None:
    assert (divisor(96, 64), divisor(7, 16), divisor(640, 512)) == (32, 1, 128)
    assert (part(6912, 2048, 32), part(640, 2048, 16), part(21504, 2048, 32)) == (1728, 640, 1792)
    assert part(7 * 4099, 2048, 1) == 7


# What is refused, and other processors.


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return torch.linalg.norm(x.erf(), dim=-1).erf() + x.cumsum(1).prod(-1)  # type: ignore[no-any-return]


def request(cpu: str | None = None) -> tuple[Options, Progress]:
    return Options(target="tvm", context=512, chunk=CHUNK, cpu=cpu), Progress()


def test_all_unsupported_operations_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    graph: Graph = export(Odd(), torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(UnsupportedOpsError) as caught:
        export_tvm(graph, tmp_path, *request())
    first, *lines = str(caught.value).splitlines()
    assert "'tvm'" in first
    assert lines[0].split()[:3] == ["2", "x", "aten.erf.default"]
    assert len(lines) == 4 and all("test_tvm.py:" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_without_fused_attention_is_refused(traced: Graph, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpsError, match=r"cannot lower these operations:\n(.*\n)*.*aten\.index_copy"):
        export_tvm(traced, tmp_path, *request())


def elf(path: Path) -> tuple[int, int]:
    """Type and machine of an ELF file."""
    head = path.read_bytes()[:20]
    assert head[:6] == b"\x7fELF\x02\x01", "a little-endian ELF file of 64 bits"
    kind, machine = struct.unpack("<HH", head[16:20])
    return kind, machine


SHARED, X86_64, AARCH64 = 3, 62, 183


@pytest.mark.parametrize(
    ("cpu", "machine", "needs"),
    [
        ("aarch64", AARCH64, set()),
        ("neoverse-n1", AARCH64, {"asimddp", "atomics"}),
        ("x86-64-v3", X86_64, {"avx2", "fma"}),
    ],
)
def test_other_processors(cpu: str, machine: int, needs: set[str], exported: Export, tmp_path: Path) -> None:
    if machine == AARCH64:
        pytest.importorskip("ziglang")
    lowered = export_tvm(exported("tvm", "int4").graph, tmp_path, *request(cpu=cpu))
    assert elf(tmp_path / LIBRARY) == (SHARED, machine)
    assert lowered.details["triple"].startswith({AARCH64: "aarch64", X86_64: "x86_64"}[machine])
    assert needs <= set(lowered.details["needs"])
    assert "avx512f" not in lowered.details["needs"]


def test_processors() -> None:
    assert processor("x86-64-v4").tile is AVX512 and processor("x86-64-v3").tile is AVX2
    assert processor("x86_64").tile is SSE and processor("x86_64").needs == ()
    assert processor("aarch64").tile is NEON and processor("aarch64").needs == ()
    with pytest.raises(TargetError, match="no processor named 'pentium-9'"):
        processor("pentium-9")


def test_linking_needs_a_compiler_or_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"no C compiler was found: pip install 'transom\[tvm-cross\]'"):
        linking.linker(HOST)
    other = processor("aarch64" if HOST.machine == "x86_64" else "x86_64")
    with pytest.raises(TargetError, match=r"needs zig: pip install 'transom\[tvm-cross\]'"):
        linking.linker(other)


def test_zig_links_where_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, exported: Export, tmp_path: Path
) -> None:
    pytest.importorskip("ziglang")
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    export_tvm(exported("tvm", "none").graph, tmp_path, *request())
    assert elf(tmp_path / LIBRARY)[0] == SHARED


def test_a_linker_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: "cc")
    with pytest.raises(TargetError, match="cc could not link for"):
        linking.linker(HOST)(str(tmp_path / "x.so"), [str(tmp_path / "missing.o")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apache-tvm-ffi": "0.1.15.post2"}, r"needs apache-tvm-ffi 0\.1\.14\.post1, not 0\.1\.15\.post2: pip install"),
        ({"apache-tvm": None}, r"needs apache-tvm 0\.27\.0\.post1, which is missing: pip install 'transom\[tvm\]'"),
    ],
)
def test_other_versions_are_refused(
    change: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if (installed := {**PAIR, **change}[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(TargetError, match=message):
        require(*PAIR)
    for name in [name for name in sys.modules if name.startswith("transom.export.tvm")]:
        monkeypatch.delitem(sys.modules, name)
    from transom.export.exporter import exporter

    with pytest.raises(TargetError, match=message):
        exporter("tvm")


def test_options_are_checked(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no processor named 'z80'"):
        transom.compile(tiny, target="tvm", cpu="z80", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
