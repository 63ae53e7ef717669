"""Compiling for TPUs that are not there, and spreading programs over several of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import transom
from tests.tolerances import FP32_LOGITS
from transom.errors import InvariantError, TargetError
from transom.formats.schemes import scheme
from transom.passes.pipelines import pipeline
from transom.zoo.architectures import preset
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.model import Model, load
from transom.zoo.plan import plan

jax = pytest.importorskip("jax")
jax.config.update("jax_platforms", "cpu")
topology = pytest.importorskip("transom.export.xla.topology")
sharding = pytest.importorskip("transom.export.xla.sharding")

CONTEXT = 64
Shape = jax.ShapeDtypeStruct

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def programs(name: str, quant: str, dtype: str, *, tokens: tuple[int, ...], context: int) -> list[Any]:
    """Programs of a model with random weights, of which only shapes are ever made."""
    from transom.export.xla import weights
    from transom.export.xla.interpreter import step

    traced = load(name, weights="random").trace(dtype=getattr(torch, dtype))
    graph, _ = pipeline("xla", chunk=max(tokens), scheme=scheme(quant)).run(traced)
    caches = [Shape(state.shape(context), jax.numpy.dtype(state.dtype)) for state in graph.states.values()]
    function = step(graph, weights.stored_names(graph))
    parameters = {
        name: Shape(parameter.shape, jax.numpy.dtype(parameter.dtype))
        for name, parameter in weights.parameters(graph).items()
    }
    number, position = Shape((), jax.numpy.int32), Shape((1,), jax.numpy.int32)
    return [
        topology.Program(
            name="decode" if count == 1 else f"prefill_{count}",
            function=function,
            parameters=parameters,
            caches=caches,
            inputs=[Shape((1, count), jax.numpy.int32), number, number, position],
        )
        for count in tokens
    ]


def tiny_programs(quant: str, dtype: str, *, tokens: tuple[int, ...]) -> list[Any]:
    return programs("gemma3-tiny", quant, dtype, tokens=tokens, context=CONTEXT)


@needs_libtpu
@pytest.mark.parametrize(("name", "devices"), [("v5e:1x1", 1), ("v5e:2x2", 4)])
def test_a_tiny_model_compiles_for_a_tpu_and_keeps_its_caches_in_place(name: str, devices: int) -> None:
    done: list[tuple[int, int]] = []
    report = topology.compile_programs(
        tiny_programs("none", "bfloat16", tokens=(1, 24)), name, on_program=lambda *step: done.append(step)
    )
    assert (report["topology"], report["chips"], report["devices"]) == (name, devices, devices)
    assert done == [(1, 2), (2, 2)]
    assert json.loads(json.dumps(report)) == report
    planned = plan(preset("gemma3-tiny"), context=CONTEXT)
    assert set(report["programs"]) == {"decode", "prefill_24"}
    for program in report["programs"].values():
        # Its two kv heads cannot be split in four: each device holds all of them.
        assert program["cache_bytes"] == planned.cache_bytes_bounded
        assert program["alias_bytes"] >= program["cache_bytes"]
        assert program["peak_bytes"] == (
            program["argument_bytes"] + program["output_bytes"] - program["alias_bytes"] + program["temp_bytes"]
        )
        if devices == 1:
            assert program["argument_bytes"] >= planned.weight_bytes + planned.cache_bytes_bounded
    if devices > 1:
        assert report["programs"]["decode"]["argument_bytes"] < planned.weight_bytes


@needs_libtpu
def test_a_program_that_copies_its_caches_is_refused() -> None:
    program = topology.Program(
        name="decode",
        function=lambda parameters, caches, x: (x, [cache[:, :, 1:] for cache in caches]),
        parameters={},
        caches=[Shape((1, 2, 16, 128), jax.numpy.bfloat16)],
        inputs=[Shape((8,), jax.numpy.float32)],
    )
    with pytest.raises(InvariantError, match="decode: 0 of 8192 cache bytes"):
        topology.compile_programs([program], "v5e:1x1")


@needs_libtpu
@pytest.mark.parametrize("name", ["", "h100", "v5e:3x3", "v9:2x2"])
def test_an_unknown_topology_is_named_with_some_that_work(name: str) -> None:
    with pytest.raises(TargetError, match=rf"no TPU topology '{name}' .*v5e:2x2"):
        topology.compile_programs([], name)


@needs_libtpu
def test_what_does_not_fit_is_refused_and_leaves_no_variables_behind() -> None:
    before = dict(os.environ)
    program = topology.Program(
        name="decode",
        function=lambda parameters, caches, x: (parameters["table"] * x, caches),
        parameters={"table": Shape((2**34,), jax.numpy.bfloat16)},
        caches=[Shape((1, 1, 16, 128), jax.numpy.bfloat16)],
        inputs=[Shape((), jax.numpy.bfloat16)],
    )
    with pytest.raises(TargetError, match=r"the TPU's compiler refuses decode .*: take more chips"):
        topology.compile_programs([program], "v5e:1x1")
    assert dict(os.environ) == before


def test_without_libtpu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"pip install 'transom\[tpu\]'"):
        topology.compile_programs([], "v5e:1x1")


@pytest.fixture(scope="module")
def spread() -> dict[str, Any]:
    """What `tests.export.sharded` prints, by (scheme, devices)."""
    results: dict[str, Any] = {}
    for chips, quants in ((2, ("none", "int4")), (4, ("none",))):
        child = subprocess.run(
            [sys.executable, "-m", "tests.export.sharded", str(chips), *quants],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr
        results |= dict(zip([f"{quant}-{chips}" for quant in quants], json.loads(child.stdout), strict=True))
    return results


@pytest.mark.parametrize("case", ["none-2", "int4-2", "none-4"])
def test_a_model_spread_over_devices_gives_the_same_numbers(spread: dict[str, Any], case: str) -> None:
    """Two chunks of a prefill longer than the window, then decode; random weights."""
    result = spread[case]
    assert result["deviation"] > 0.1
    assert result["difference"] < FP32_LOGITS * min(1.0, result["deviation"])
    # With four devices, two kv heads are on each of them.
    assert result["spread_caches"] == (result["caches"] if case.endswith("-2") else 0)


@pytest.mark.parametrize("case", ["none-2", "none-4"])
def test_a_layer_needs_two_all_reduces(spread: dict[str, Any], case: str) -> None:
    for collectives in spread[case]["collectives"].values():
        assert 1 <= collectives["all-reduce"] <= 2 * 6 + 1
        # The logits; and queries, where two kv heads are on each of four devices.
        assert collectives["all-gather"] <= (1 if case == "none-2" else 1 + 2 * 6)
        assert collectives["all-to-all"] == 0


def _shapes(**shapes: tuple[int, ...]) -> dict[str, Any]:
    names = {key.replace("__", "."): shape for key, shape in shapes.items()}
    return {name: Shape(shape, jax.numpy.int8) for name, shape in names.items()}


def test_heads_stay_whole_and_blocks_too() -> None:
    layer = "layers__0__"
    parameters = _shapes(**{
        f"{layer}self_attn__q_proj__weight": (4 * 32, 64),
        f"{layer}self_attn__k_proj__weight": (1 * 32, 64),
        f"{layer}self_attn__o_proj__weight": (64, 4 * 32),
        f"{layer}mlp__down_proj__weight__codes": (6, 16, 64),
        f"{layer}mlp__down_proj__weight__scales": (6, 64),
        f"{layer}mlp__up_proj__weight__codes": (4, 16, 96),
        f"{layer}mlp__up_proj__weight__zero_points": (4, 96),
        f"{layer}input_layernorm__weight": (64,),
        "embed_tokens__weight__codes": (512, 64),
        "embed_tokens__weight__scales": (2, 512),
    })  # fmt: skip
    caches = [Shape((1, 1, 16, 32), jax.numpy.bfloat16)]

    def split(chips: int) -> dict[str, tuple[Any, ...]]:
        specs = sharding.parameter_specs(parameters, caches, chips)
        return {name.removeprefix("layers.0.").replace(".weight", ""): tuple(spec) for name, spec in specs.items()}

    chips = sharding.CHIPS
    assert split(2) == {
        "self_attn.q_proj": (chips,),
        "self_attn.k_proj": (),  # one kv head
        "self_attn.o_proj": (None, chips),
        "mlp.down_proj.codes": (chips,),
        "mlp.down_proj.scales": (chips,),
        "mlp.up_proj.codes": (None, None, chips),
        "mlp.up_proj.zero_points": (None, chips),
        "input_layernorm": (),
        "embed_tokens.codes": (chips,),
        "embed_tokens.scales": (None, chips),
    }
    eight = split(8)
    assert eight["self_attn.q_proj"] == eight["self_attn.o_proj"] == ()  # four query heads
    assert eight["mlp.down_proj.codes"] == eight["mlp.down_proj.scales"] == ()  # six blocks
    assert eight["mlp.up_proj.codes"] == (None, None, chips)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param("gemma3-270m", "v5e:1x1", marks=pytest.mark.slow),
        pytest.param("gemma3-270m", "v5e:2x2", marks=pytest.mark.large),
        pytest.param("gemma3-1b", "v5e:1x1", marks=pytest.mark.large),
        pytest.param("gemma3-1b", "v5e:2x2", marks=pytest.mark.large),
    ],
)
def test_memory_on_a_tpu_is_what_the_plan_says(name: str, where: str) -> None:
    """Decode and a prefill of 2,048 tokens at 32,768 tokens of context, to within a tenth."""
    context = 32_768
    report = topology.compile_programs(programs(name, "none", "bfloat16", tokens=(1, 2_048), context=context), where)
    planned = plan(preset(name), context=context)
    for program in report["programs"].values():
        assert program["alias_bytes"] == program["cache_bytes"] == planned.cache_bytes_bounded
        if report["devices"] == 1:
            peak = planned.weight_bytes + planned.cache_bytes_bounded
            assert peak <= program["peak_bytes"] <= 1.1 * peak


MOST_OF_AN_ENCODER = 160 * 2**20
"""Temporary bytes of an image's encoder of 27 layers; all scores of one layer would be a gigabyte."""


@needs_libtpu
def test_attention_of_an_encoder_holds_few_scores() -> None:
    """4,096 patches in 16 heads of 72: SigLIP's."""
    from transom.export.xla import attention

    q_BTNH = Shape((1, 4096, 16, 72), jax.numpy.bfloat16)

    def attend(parameters: Any, caches: Any, *given: Any) -> Any:
        heads_first = (value.swapaxes(1, 2) for value in given)
        return attention.attend_fully(*heads_first, scale=0.1).swapaxes(1, 2), caches

    program = topology.Program(name="attend", function=attend, parameters={}, caches=(), inputs=[q_BTNH] * 3)
    (report,) = topology.compile_programs([program], "v5e:1x1")["programs"].values()
    assert report["temp_bytes"] < MOST_OF_AN_ENCODER / 4


@needs_libtpu
def test_an_encoder_is_compiled_beside_its_decoder(tmp_path: Path) -> None:
    model = load("gemma3-vision-tiny", images=True)
    manifest = transom.compile(model, target="xla", topology="v5e:2x2", out=tmp_path / "a", chunk=16).manifest
    assert manifest.tpu is not None and set(manifest.tpu["programs"]) == {"decode", "prefill_16", "encode_image"}
    report = manifest.tpu["programs"]["encode_image"]
    encoder, _ = pipeline("xla", chunk=16, scheme=scheme("none")).run(model.trace(task="encode_image"))
    assert report["argument_bytes"] >= encoder.weight_bytes() and report["cache_bytes"] == 0


@needs_libtpu
@pytest.mark.parametrize(
    ("layers", "quant"),
    [(4, "none"), *(pytest.param(27, quant, marks=pytest.mark.large) for quant in ("none", "int8"))],
)
def test_layers_of_an_encoder_leave_no_results_behind(layers: int, quant: str) -> None:
    """SigLIP at its true width and 4,096 patches; a layer may add no more than its share of the bound."""
    from transom.export.xla.export import encoder_program

    config: Any = preset("gemma3-4b")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_layers=layers))
    model = Model(config=config, weights=random_weights(config, 0), tokenizer=None, source="random", revision="")
    traced = model.trace(task="encode_image", dtype=torch.bfloat16)
    graph, _ = pipeline("xla", chunk=256, scheme=scheme(quant)).run(traced)
    (report,) = topology.compile_programs([encoder_program(graph)[0]], "v5e:1x1")["programs"].values()
    assert report["temp_bytes"] <= MOST_OF_AN_ENCODER * layers / 27


@needs_libtpu
@pytest.mark.large
def test_27b_in_4_bits_fits_four_chips_of_16_gb() -> None:
    """Only shapes exist: the 15 GB of weights are never made."""
    report = topology.compile_programs(
        programs("gemma3-27b", "int4", "bfloat16", tokens=(1, 2_048), context=32_768), "v5e:2x2"
    )
    planned = plan(preset("gemma3-27b").text, context=32_768, quant="int4")
    for program in report["programs"].values():
        assert program["alias_bytes"] == program["cache_bytes"] == planned.cache_bytes_bounded // 4
        assert program["peak_bytes"] < 16e9
