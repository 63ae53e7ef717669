"""Every rule of the dialect catches what it is there for, and lets what TensorRT takes pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.conftest import Cli
from transom.errors import DialectError
from transom.export.tensorrt.verify.verify import RULES, require, verify

HEADER = '<ir_version: 11, opset_import: ["" : {opset}, "trt" : 1]> g ({inputs}) => ({outputs}) {{ {nodes} }}'


def model(inputs: str, outputs: str, nodes: str, *, opset: int = 24, **constants: TensorProto) -> ModelProto:
    """A model in ONNX's own notation; `constants` are initializers by name."""
    proto = onnx.parser.parse_model(HEADER.format(opset=opset, inputs=inputs, outputs=outputs, nodes=nodes))
    for index, node in enumerate(proto.graph.node):
        node.name = f"node_{index}"
    for name, tensor in constants.items():
        tensor.name = name
        proto.graph.initializer.append(tensor)
    return proto


def tensor(kind: int, *shape: int, value: float = 0.0) -> TensorProto:
    """A constant of one number."""
    return helper.make_tensor("", kind, shape, np.full(int(np.prod(shape)), value).tolist())


BF16, F32 = "bfloat16[1,t,64]", "float[1,t,64]"
QKV = "bfloat16[1,4,t,32] q, bfloat16[1,2,48,32] k, bfloat16[1,2,48,32] v"
OUT = "bfloat16[1,4,t,32] y"
SCALE = {"s": tensor(TensorProto.BFLOAT16, 2, 8, value=0.5)}
CODES = {"w": tensor(TensorProto.INT4, 64, 8, value=1)}
SCATTER = "int64[1] at, bfloat16[1,2,48,32] c, bfloat16[1,2,t,32] n"
CACHE = "bfloat16[1,2,48,32] o"

BROKEN: dict[str, tuple[str, ModelProto]] = {
    "an old opset": ("opset", model(f"{BF16} x", f"{BF16} y", "y = Tanh(x)", opset=21)),
    "TensorScatter before its time": (
        "opset",
        model(SCATTER, CACHE, 'o = TensorScatter<axis=-2, mode="linear">(c, n, at)', opset=23),
    ),
    "an unknown operation": ("operation", model(f"{BF16} x", f"{BF16} y", "y = Det(x)")),
    "an unknown domain": ("operation", model(f"{BF16} x", f"{BF16} y", "y = trt.Something(x)")),
    "a mixed dtype add": ("mixed-types", model(f"{BF16} x, {F32} z", f"{BF16} y", "y = Add(x, z)")),
    "float64": ("double", model("double[1,t,64] x", "double[1,t,64] y", "y = Tanh(x)")),
    "a norm of two dtypes": (
        "norm",
        model(f"{BF16} x, float[64] w", f"{F32} y", "y = RMSNormalization<axis=-1>(x, w)"),
    ),
    "a rotation of two dtypes": (
        "rotary",
        model(
            "bfloat16[1,2,t,64] x, float[1,t,32] c, float[1,t,32] s",
            "bfloat16[1,2,t,64] y",
            "y = RotaryEmbedding(x, c, s)",
        ),
    ),
    "uint4": (
        "int4",
        model(
            f"{BF16} x", "bfloat16[1,t,8] y", "d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d)",
            w=tensor(TensorProto.UINT4, 64, 8, value=1), **SCALE,
        ),
    ),
    "E5M2": (
        "float8",
        model(f"{BF16} x, float8e5m2[64,8] w, bfloat16[8] s", "bfloat16[1,t,8] y",
              "w1 = Identity(w) d = DequantizeLinear<axis=1>(w1, s) y = MatMul(x, d)"),
    ),
    "NVFP4 in blocks of 32": (
        "narrow-blocks",
        model(f"{BF16} x, float s", f"{BF16} y", "y = trt.TRT_FP4DynamicQuantize<block_size=32>(x, s)"),
    ),
    "attention with past keys": (
        "attention-form",
        model(f"{QKV}, bool[1,1,t,48] m", OUT, "y, pk, pv = Attention(q, k, v, m, k, v)"),
    ),
    "attention with softcap": (
        "attention-form",
        model(f"{QKV}, bool[1,1,t,48] m", OUT, "y = Attention<softcap=50.0>(q, k, v, m)"),
    ),
    "attention with softmax_precision": (
        "attention-form",
        model(f"{QKV}, bool[1,1,t,48] m", OUT, "y = Attention<softmax_precision=1>(q, k, v, m)"),
    ),
    "attention of three axes": (
        "attention-form",
        model("bfloat16[1,t,64] q, bool[1,1,t,t] m", "bfloat16[1,t,64] y",
              "y = Attention<q_num_heads=2, kv_num_heads=2>(q, q, q, m)"),
    ),
    "nonpad_kv_seqlen": (
        "attention-lengths",
        model(f"{QKV}, bool[1,1,t,48] m, int64[1] n", OUT, "y = Attention(q, k, v, m, , , n)"),
    ),
    "a window attribute": (
        "attention-window",
        model(f"{QKV}, bool[1,1,t,48] m", OUT, "y = Attention<local_window_size=16>(q, k, v, m)"),
    ),
    "is_causal with a mask": (
        "attention-causal",
        model(f"{QKV}, bool[1,1,t,48] m", OUT, "y = Attention<is_causal=1>(q, k, v, m)"),
    ),
    "is_causal alone": (
        "attention-causal",
        model(f"{SCATTER}, bfloat16[1,4,t,32] q", f"{OUT}, {CACHE}",
              "o = TensorScatter<axis=-2>(c, n, at) y = Attention<is_causal=1>(q, o, o)"),
    ),
    "no mask": (
        "attention-causal",
        model(f"{SCATTER}, bfloat16[1,4,t,32] q", f"{OUT}, {CACHE}",
              "o = TensorScatter<axis=-2>(c, n, at) y = Attention(q, o, o)"),
    ),
    "queries of another dtype": (
        "mixed-types",
        model("float16[1,4,t,32] q, bfloat16[1,2,48,32] k, bool[1,1,t,48] m", "float16[1,4,t,32] y",
              "y = Attention(q, k, k, m)"),
    ),
    "a choice of two dtypes": (
        "mixed-types",
        model(f"bool[1,t,64] c, {BF16} x, {F32} z", f"{BF16} y", "y = Where(c, x, z)"),
    ),
    "activations with a float32 scale": (
        "scale-type",
        model(f"{BF16} x", "float8e4m3fn[1,t,64] y", "y = QuantizeLinear<output_dtype=17>(x, s)",
              s=tensor(TensorProto.FLOAT, value=0.5)),
    ),
    "4-bit floats in blocks of 32": (
        "narrow-blocks",
        model(f"{BF16} x, float4e2m1[64,8] w", "bfloat16[1,t,8] y",
              "d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d)", **SCALE),
    ),
    "a float mask": (
        "attention-mask",
        model(f"{QKV}, float[1,1,t,48] m", OUT, "y = Attention(q, k, v, m)"),
    ),
    "a mask of two axes": ("attention-mask", model(f"{QKV}, bool[t,48] m", OUT, "y = Attention(q, k, v, m)")),
    "a mask for every layer": (
        "shared-mask",
        model(
            f"{QKV}, int64[1,1,t,1] p, int64[1,1,1,48] j", f"{OUT}, bfloat16[1,4,t,32] z",
            "m = Less(j, p) y = Attention(q, k, v, m) n = Less(j, p) z = Attention(q, k, v, n)",
        ),
    ),
    "float32 attention": (
        "attention-kernel",
        model(
            "float[1,4,t,32] q, float[1,2,48,32] k, bool[1,1,t,48] m", "float[1,4,t,32] y", "y = Attention(q, k, k, m)"
        ),
    ),
    "heads over 256": (
        "attention-kernel",
        model("bfloat16[1,4,t,320] q, bfloat16[1,2,48,320] k, bool[1,1,t,48] m", "bfloat16[1,4,t,320] y",
              "y = Attention(q, k, k, m)"),
    ),
    "a static decode of a long cache": (
        "attention-kernel",
        model("bfloat16[1,4,1,32] q, bfloat16[1,2,24576,32] k, bool[1,1,1,24576] m", "bfloat16[1,4,1,32] y",
              "y = Attention(q, k, k, m)"),
    ),
    "circular TensorScatter": (
        "cache-write",
        model(SCATTER, CACHE, 'o = TensorScatter<axis=-2, mode="circular">(c, n, at)'),
    ),
    "TensorScatter along the heads": (
        "cache-write",
        model(SCATTER, CACHE, 'o = TensorScatter<axis=1, mode="linear">(c, n, at)'),
    ),
    "TensorScatter without indices": (
        "cache-write",
        model(SCATTER, CACHE, 'o = TensorScatter<axis=-2, mode="linear">(c, n)'),
    ),
    "a cache that is computed": (
        "cache-place",
        model(SCATTER, CACHE, "d = Identity(c) o = TensorScatter<axis=-2>(d, n, at)"),
    ),
    "a written cache behind an Identity": (
        "cache-place",
        model(SCATTER, CACHE, "d = TensorScatter<axis=-2>(c, n, at) o = Identity(d)"),
    ),
    "a cache that is read as well": (
        "cache-place",
        model(SCATTER, f"{CACHE}, bfloat16[1,2,48,32] z", "o = TensorScatter<axis=-2>(c, n, at) z = Tanh(c)"),
    ),
    "a cache that grows": (
        "cache-capacity",
        model("int64[1] at, bfloat16[1,2,past,32] c, bfloat16[1,2,t,32] n", "bfloat16[1,2,past,32] o",
              "o = TensorScatter<axis=-2>(c, n, at)"),
    ),
    "a cache of three axes": (
        "cache-capacity",
        model("int64[1] at, bfloat16[1,48,32] c, bfloat16[1,t,32] n", "bfloat16[1,48,32] o",
              "o = TensorScatter<axis=-2>(c, n, at)"),
    ),
    "a cache of 8-bit floats": (
        "cache-type",
        model("int64[1] at, float8e4m3fn[1,2,48,32] c, float8e4m3fn[1,2,t,32] n", "float8e4m3fn[1,2,48,32] o",
              "o = TensorScatter<axis=-2>(c, n, at)"),
    ),
    "ScatterND on a cache": (
        "cache-scatter",
        model("bfloat16[48,32] c, int64[t,1] at, bfloat16[t,32] n", "bfloat16[48,32] o", "o = ScatterND(c, at, n)"),
    ),
    "a nonzero zero point": (
        "zero-point",
        model(f"{BF16} x", "bfloat16[1,t,8] y", "d = DequantizeLinear<axis=0, block_size=32>(w, s, z) y = MatMul(x, d)",
              z=tensor(TensorProto.INT4, 2, 8, value=3), **CODES, **SCALE),
    ),
    "a zero point that is computed": (
        "zero-point",
        model(f"{BF16} x, int4[2,8] z", "bfloat16[1,t,8] y",
              "d = DequantizeLinear<axis=0, block_size=32>(w, s, z) y = MatMul(x, d)", **CODES, **SCALE),
    ),
    "a float32 scale of bfloat16 numbers": (
        "scale-type",
        model(f"{BF16} x", "bfloat16[1,t,8] y",
              "d = DequantizeLinear<axis=0, block_size=32, output_dtype=16>(w, s) y = MatMul(x, d)",
              s=tensor(TensorProto.FLOAT, 2, 8, value=0.5), **CODES),
    ),
    "a float32 scale": (
        "scale-type",
        model(f"{F32} x", "float[1,t,8] y", "d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d)",
              s=tensor(TensorProto.FLOAT, 2, 8, value=0.5), **CODES),
    ),
    "a negative scale": (
        "scale-sign",
        model(f"{BF16} x", "bfloat16[1,t,8] y", "d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d)",
              s=tensor(TensorProto.BFLOAT16, 2, 8, value=-0.5), **CODES),
    ),
    "a shared scale": (
        "shared-scale",
        model(f"{BF16} x", "bfloat16[1,t,8] y, bfloat16[1,t,8] z",
              "d = DequantizeLinear<axis=0, block_size=32>(w, s) e = DequantizeLinear<axis=0, block_size=32>(w, s) "
              "y = MatMul(x, d) z = MatMul(x, e)", **CODES, **SCALE),
    ),
    "int4 in blocks of 8": (
        "block",
        model(f"{BF16} x", "bfloat16[1,t,8] y", "d = DequantizeLinear<axis=0, block_size=8>(w, s) y = MatMul(x, d)",
              s=tensor(TensorProto.BFLOAT16, 8, 8, value=0.5), **CODES),
    ),
    "8-bit floats in blocks": (
        "block",
        model(f"{BF16} x, float8e4m3fn[64,8] w", "bfloat16[1,t,8] y",
              "d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d)", **SCALE),
    ),
    "activations by channel": (
        "activation-scale",
        model(f"{BF16} x, bfloat16[64] r", "float8e4m3fn[1,t,64] y",
              "y = QuantizeLinear<axis=2, output_dtype=17>(x, r)"),
    ),
    "Gather of codes": (
        "looked-up-codes",
        model("int64[t] i", "bfloat16[t,32] y",
              "c = Gather<axis=0>(w, i) r = Gather<axis=0>(s, i) y = DequantizeLinear<axis=1, block_size=16>(c, r)",
              w=tensor(TensorProto.INT4, 64, 32, value=1), s=tensor(TensorProto.BFLOAT16, 64, 2, value=0.5)),
    ),
    "W4A8": (
        "mixed-widths",
        model(f"{BF16} x", "bfloat16[1,t,8] y",
              "q = QuantizeLinear<output_dtype=17>(x, a) p = DequantizeLinear(q, b) "
              "d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(p, d)",
              a=tensor(TensorProto.BFLOAT16, value=0.5), b=tensor(TensorProto.BFLOAT16, value=0.5), **CODES, **SCALE),
    ),
}  # fmt: skip
"""A planted violation, and the rule that must object to it."""

TAKEN = {
    "a whole layer": model(
        f"{SCATTER}, bfloat16[1,4,t,32] q, bool[1,1,t,48] m", f"{OUT}, {CACHE}",
        'o = TensorScatter<axis=-2, mode="linear">(c, n, at) y = Attention<scale=0.5>(q, o, o, m)',
    ),
    "int4": model(
        f"{BF16} x", "bfloat16[1,t,8] y", "d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d)",
        **CODES, **SCALE,
    ),
    "a zero point of zero": model(
        f"{BF16} x", "bfloat16[1,t,8] y", "d = DequantizeLinear<axis=0, block_size=32>(w, s, z) y = MatMul(x, d)",
        z=tensor(TensorProto.INT4, 2, 8), **CODES, **SCALE,
    ),
    "8-bit floats by channel": model(
        f"{BF16} x, float8e4m3fn[64,8] w", "bfloat16[1,t,8] y", "d = DequantizeLinear<axis=1>(w, s) y = MatMul(x, d)",
        s=tensor(TensorProto.BFLOAT16, 8, value=0.5),
    ),
    "two masks of one size": model(
        f"{QKV}, int64[1,1,t,1] p, int64[1,1,1,48] j", f"{OUT}, bfloat16[1,4,t,32] z",
        "m = Less(j, p) y = Attention(q, k, v, m) n = LessOrEqual(j, p) z = Attention(q, k, v, n)",
    ),
    "attention without a cache": model("bfloat16[1,4,t,32] q", OUT, "y = Attention<qk_matmul_output_mode=0>(q, q, q)"),
    "a pair that shares a scale": model(
        f"{BF16} x", f"{BF16} y", "q = QuantizeLinear<output_dtype=17>(x, s) y = DequantizeLinear(q, s)",
        s=tensor(TensorProto.BFLOAT16, value=0.5),
    ),
    "MXFP8": model(
        f"{BF16} x", f"{BF16} y", "q, s = trt.TRT_MXFP8DynamicQuantize<block_size=32>(x) "
        "y = trt.TRT_MXFP8DequantizeLinear<block_size=32>(q, s)",
    ),
    "an ordinary network": model(f"{BF16} x", f"{BF16} y", "r = Relu(x) m = Max(r, x) y = Abs(m)"),
    "NVFP4": model(f"{BF16} x, float s", f"{BF16} y", "y = trt.TRT_FP4DynamicQuantize<block_size=16>(x, s)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_planted_violation_is_caught(name: str) -> None:
    rule, broken = BROKEN[name]
    findings = verify(broken)
    assert {finding.rule for finding in findings} >= {rule}, findings
    assert all(finding.where and finding.what for finding in findings)
    with pytest.raises(DialectError, match=rf"\[{rule}\]"):
        require(broken)


ALSO = {
    "uint4": {"block"},
}
"""What else must object to a violation."""


@pytest.mark.parametrize("name", BROKEN)
def test_nothing_else_is_objected_to(name: str) -> None:
    rule, broken = BROKEN[name]
    assert {finding.rule for finding in verify(broken)} == {rule} | ALSO.get(name, set())


@pytest.mark.parametrize("name", TAKEN)
def test_what_tensorrt_takes_passes(name: str) -> None:
    assert verify(TAKEN[name]) == []


def test_every_rule_is_tested() -> None:
    names = [rule.name for rule in RULES]
    assert len(names) == len(set(names))
    assert {rule for rule, _ in BROKEN.values()} == set(names)
    assert all(rule.text for rule in RULES)


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    broken, whole = tmp_path / "broken.onnx", tmp_path / "whole.onnx"
    onnx.save(BROKEN["nonpad_kv_seqlen"][1], broken)
    onnx.save(TAKEN["int4"], whole)
    code, out, _ = cli("verify", broken)
    assert code == 1 and "attention-lengths" in out and "dropped without a word" in out
    code, out, _ = cli("verify", broken, "--json")
    assert code == 1 and '"rule": "attention-lengths"' in out
    code, out, _ = cli("verify", whole)
    assert code == 0 and f"{len(RULES)} rules" in out


def test_the_command_on_an_artifact_checks_the_encoder_too(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "a"
    assert (
        cli("export", "gemma3-vision-tiny", "--target", "tensorrt", "--chunk", 16, "--context", 64, "-o", folder)[0]
        == 0
    )
    code, out, err = cli("verify", folder, "--json")
    assert code == 0, out + err
    data = json.loads(out)
    assert data["files"] == [str(folder / "model.onnx"), str(folder / "encode_image.onnx")] and data["findings"] == []
    onnx.save(BROKEN["nonpad_kv_seqlen"][1], folder / "encode_image.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["encode_image.onnx"]["bytes"] = (folder / "encode_image.onnx").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, out, _ = cli("verify", folder, "--json")
    assert code == 1 and {finding["file"] for finding in json.loads(out)["findings"]} == {
        str(folder / "encode_image.onnx")
    }
    assert cli("export", "gemma3-tiny", "--target", "tvm", "-o", tmp_path / "b")[0] == 0
    code, out, err = cli("verify", tmp_path / "b")
    assert code == 2 and "has no ONNX model" in err


@pytest.mark.parametrize("content", [None, b"", b"no model", "DequantizeLinear with one input"])
def test_the_command_on_what_is_no_model(content: bytes | str | None, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "model.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        onnx.save(model("int8[4] x", "float[4] y", "y = DequantizeLinear(x)"), path)
    code, out, err = cli("verify", path)
    assert (code, out) == (2, "") and str(path) in err.replace("\n", "") and "Traceback" not in err


def test_a_long_chain() -> None:
    """A mask that thousands of nodes make."""
    chain = " ".join(f"m{index + 1} = Not(m{index})" for index in range(3000))
    whole = model(f"{QKV}, bool[1,1,t,48] m0", OUT, f"{chain} y = Attention(q, k, v, m3000)")
    assert verify(whole) == []


def test_weights_may_lie_outside(tmp_path: Path) -> None:
    """Only the model file is read: what a large constant holds is not known, and is not asked for."""
    whole = onnx.ModelProto()
    whole.CopyFrom(TAKEN["int4"])
    for entry in whole.graph.initializer:
        entry.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(entry), entry.name))
        entry.ClearField("raw_data")
        entry.data_location = TensorProto.EXTERNAL
        entry.external_data.add(key="location", value="nowhere")
    assert verify(whole) == []
