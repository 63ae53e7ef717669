"""What holds for every family of the zoo, shown on its tiny model: the tests of a new model are one list entry too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

import transom
from tests.case import Case
from tests.tolerances import FP32_LOGITS
from tests.zoo.tiny_gguf import STORABLE, write_gguf
from transom.backends.reference.session import ReferenceSession
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.passes.base import Pipeline
from transom.passes.pipelines import PIPELINES, pipeline
from transom.zoo.architecture import Architecture
from transom.zoo.architectures import architecture, architectures, build_empty
from transom.zoo.checkpoints.layout import HEAD, in_file
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.huggingface import read_config, write_config
from transom.zoo.model import Model, load
from transom.zoo.plan import parameters, plan

Cli = Callable[..., tuple[int, str, str]]

WITHOUT_WINDOW = 16
"""Stands for the window of a family without one, where lengths are chosen."""


TEXT = [family for family in architectures() if family.text is None]
"""Those that see images are shown in `test_gemma3_vision.py`, beside what is their own."""


OURS = ("adaptive", "longnet", "rwkv7")
"""Families that transformers does not have."""


@pytest.fixture(scope="module", params=TEXT, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Architecture:
    record: Architecture = request.param
    return record


@pytest.fixture(scope="module")
def model(family: Architecture) -> Model:
    """The family's tiny model, which was never trained."""
    tiny = next(preset for preset in family.presets if preset.hub is None)
    return load(tiny.config.name)


def window(model: Model) -> int:
    return model.config.longest_window or WITHOUT_WINDOW


@pytest.fixture(scope="module")
def words(model: Model) -> list[int]:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (8 * window(model),), generator=draw).tolist()


@pytest.fixture(scope="module")
def logits(model: Model, words: list[int]) -> NDArray[np.float32]:
    """What the plain module says of every position, [T, V]."""
    with torch.no_grad():
        rows: NDArray[np.float32] = model.eager()(torch.tensor([words]), torch.tensor(0), None)[0][0].numpy()
    return rows


def test_the_record_and_its_presets_agree(family: Architecture) -> None:
    assert architecture(family.name) is family
    for preset in family.presets:
        assert isinstance(preset.config, family.config) and preset.config.architecture == family.name
        assert len(preset.config.layers) == preset.config.num_layers
    assert {type(build_empty(preset.config)) for preset in family.presets} == {family.build}


def test_what_we_write_we_read(family: Architecture, tmp_path: Path) -> None:
    for preset in family.presets:
        write_config(preset.config, tmp_path)
        assert dataclasses.replace(read_config(tmp_path), name=preset.config.name) == preset.config


def test_logits_are_those_of_transformers(model: Model, words: list[int], tmp_path: Path) -> None:
    if model.config.architecture in OURS:
        pytest.skip("transformers has no such family: a test of its own shows its logits")
    write_checkpoint(tmp_path, model.config, model.weights, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    renames = architecture(model.config.architecture).huggingface.renames
    assert set(theirs.state_dict()) - {HEAD} == {in_file(name, renames=renames) for name in model.weights} - {HEAD}
    ours, W = load(tmp_path).eager(), window(model)
    for length in (W - 1, W, W + 1, 2 * W, 3 * W + 5):
        ids_BT = torch.tensor([words[:length]])
        with torch.no_grad():
            expected_BTV, (actual_BTV, _) = theirs(ids_BT).logits, ours(ids_BT, torch.tensor(0), None)
        assert (expected_BTV - actual_BTV).abs().max() < FP32_LOGITS, length


def test_a_checkpoint_comes_back(model: Model, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, model.config, model.weights, dtype=torch.float32, shard_bytes=50_000)
    again = load(tmp_path)
    assert dataclasses.replace(again.config, name=model.config.name) == model.config and again.left_out[1:] == ()
    for name, weight in model.weights.items():
        assert torch.equal(again.weights[name].read(), weight.read()), name


_CODED = ("attn_q.weight", "attn_k.weight", "ffn_up.weight", "ssm_in.weight", "time_mix_key.weight")


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_comes_back(model: Model, tmp_path: Path, kind: str) -> None:
    """Rows that the format stores in another order come back in ours, and so do the codes behind them."""
    if architecture(model.config.architecture).gguf is None:
        pytest.skip("GGUF files of the family are not read as its own")
    config = dataclasses.replace(STORABLE[model.config.architecture], name="again")
    weights = random_weights(config, 5)
    types = {} if kind == "F32" else dict.fromkeys(_CODED, kind)
    again = load(write_gguf(tmp_path / "again.gguf", config, weights, types=types))
    assert again.config == config
    for name, weight in weights.items():
        codes = again.weights[name].encoded
        coded = name.endswith(("q_proj.weight", "k_proj.weight", "up_proj.weight", "in_proj.weight")) and types != {}
        assert (codes is not None) == coded
        rows = again.weights[name].read()
        if codes is None:
            # The format adds one to some norms, and holds exponentials of some rates, which rounds.
            assert torch.allclose(rows, weight.read(), atol=1e-6), name
            continue
        assert (rows - weight.read()).abs().max() < weight.read().abs().max() / 127
        assert torch.equal(codes.decode(codes.read_rows(3, rows.shape[0] - 5)), rows[3:-5]), name


def test_the_plan_is_the_module(family: Architecture) -> None:
    for preset in family.presets:
        config = preset.config
        assert parameters(config) == sum(math.prod(weight.shape) for weight in random_weights(config, 0).values())
        layers = plan(config, context=100, cache_dtype="fp32").layers
        for index, (planned, layer) in enumerate(zip(layers, config.layers, strict=True)):
            slots = min(100, layer.window or 100)
            assert planned.bytes == sum(
                4 * state.numbers * (slots if state.is_ring else 1) for state in layer.states(index)
            )


@pytest.fixture(scope="module")
def stages(model: Model) -> dict[tuple[str, ...], Graph]:
    """The graph by the passes that it went through. Lists begin alike, and what two of them share is run once."""
    return {(): model.trace()}


@pytest.mark.parametrize("target", PIPELINES)
def test_every_pass_of_every_list_keeps_the_logits(
    model: Model, words: list[int], logits: NDArray[np.float32], stages: dict[tuple[str, ...], Graph], target: str
) -> None:
    """After each pass: chunks longer than a window, then decoding over the wrap; at the end, the caches' bytes."""
    case, W = Case.of(model), window(model)
    chunk = W + 5

    def prefilled(graph: Graph, name: str) -> ReferenceSession:
        session = dataclasses.replace(case, graph=graph).session(chunk=chunk)
        actual = session.logits(words[: 3 * W + 5])
        assert np.abs(actual - logits[: 3 * W + 5]).max() < FP32_LOGITS, f"prefill after {name}"
        return session

    passed: tuple[str, ...] = ()
    for current in pipeline(target, chunk=chunk, scheme=scheme("none")).passes:
        before, passed = stages[passed], (*passed, f"{current.name} {vars(current)}")
        if passed in stages:
            continue
        graph, (record,) = Pipeline([current]).run(before)
        # Without changes the graph is the same, node for node.
        stages[passed] = graph if record.changes else before
        if record.changes:
            prefilled(graph, current.name)
    rewritten = stages[passed]
    if rewritten.calls(ops.ATTEND) and not rewritten.calls(ops.ATTENTION):
        # Attention takes heads behind tokens then, and TVM can turn no value around.
        assert not rewritten.calls(aten.transpose.int)
    session = prefilled(rewritten, "all passes")
    for position in range(3 * W + 5, 8 * W):
        actual = session.decode(words[position])
        assert np.abs(actual - logits[position]).max() < FP32_LOGITS, f"decode at {position} after all passes"
    sizes = session.cache_bytes()
    bytes_of = [sum(4 * state.numbers for state in layer.states(0)) for layer in model.config.layers]
    layers = list(zip(model.config.layers, bytes_of, strict=True))
    assert sizes.get("summary", 0) == sum(size for layer, size in layers if layer.kind == "summary")
    spare = {state.slots - state.window for state in session.states if state.slots is not None and state.window}
    assert spare <= {0, chunk - 1} and len(spare) == (1 if model.config.longest_window else 0)
    assert sizes["local"] == sum(size * (layer.window + max(spare)) for layer, size in layers if layer.window)
    # Global layers have grown to the text and no further than a growth step.
    grown = sum(size for layer, size in layers if layer.kind == "global")
    assert grown * 8 * W <= sizes["global"] <= grown * 512


def test_one_artifact(model: Model, words: list[int], logits: NDArray[np.float32], tmp_path: Path, cli: Cli) -> None:
    """ONNX Runtime runs the family; what the other targets add is shown by operation, not by model."""
    W = window(model)
    transom.compile(model, target="onnxruntime", context=512, chunk=W + 5, out=tmp_path / "artifact")
    session = transom.open(tmp_path / "artifact")
    actual = session.logits(words[: 3 * W + 5])
    assert np.abs(actual - logits[: 3 * W + 5]).max() < FP32_LOGITS
    for position in range(3 * W + 5, 5 * W):
        assert np.abs(session.decode(words[position]) - logits[position]).max() < FP32_LOGITS, position
    code, out, _ = cli("inspect", tmp_path / "artifact", "--json")
    assert code == 0 and f'"{model.config.architecture}"' in out
