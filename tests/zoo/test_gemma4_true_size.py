"""Gemma 4 at its true sizes, from random weights."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from tests.case import Case, export
from tests.passes.test_huggingface import Scorer
from tests.tolerances import FP32_LOGITS
from transom.graphs.ops import ATTENTION
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention
from transom.zoo.architectures import build_empty, preset
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.gemma4 import ARCHITECTURE
from transom.zoo.gemma4_config import Gemma4Config
from transom.zoo.huggingface import write_config

pytestmark = pytest.mark.large

MEMORY = 4e9
"""Bytes that an export may take at most."""


def config_of(name: str) -> Gemma4Config:
    config = preset(name)
    assert isinstance(config, Gemma4Config)
    return config


def theirs_of(config: Gemma4Config, folder: Path) -> Any:
    """Their configuration of it."""
    write_config(config, folder)
    return transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize(
    ("name", "changes", "beyond"),
    [
        # A local layer, a global one, and one of each that reads the keys and values of these.
        ("gemma4-e2b", {"layer_kinds": ("local", "global") * 2, "shared_layers": 2}, 40),
        ("gemma4-12b", {"layer_kinds": ("local", "global")}, 40),
        # One layer, of 128 experts; the textbook computes all of them, so that a few tokens are enough.
        ("gemma4-26b-a4b", {"layer_kinds": ("global",)}, -1000),
    ],
)
def test_layers_of_every_kind_are_those_of_transformers(
    name: str, changes: dict[str, Any], beyond: int, tmp_path: Path
) -> None:
    """So many tokens past the window; of the tables of tokens, some rows are enough."""
    config = dataclasses.replace(config_of(name), vocab_size=512, **changes)
    state = {key: weight.read() for key, weight in random_weights(config, 1).items()}
    ours = build_empty(config)
    ours.load_state_dict(state, assign=True)
    their_config = theirs_of(config, tmp_path)
    with torch.device("meta"):
        theirs: Any = transformers.AutoModelForCausalLM.from_config(their_config)
    stacked = {key: ARCHITECTURE.huggingface.stacked(config, key) for key in state}
    theirs.model.load_state_dict(
        {
            key: value if (how := stacked[key]) is None else value.view(how.shape(value.shape))
            for key, value in state.items()
        },
        assign=True,
    )
    theirs.lm_head.weight = theirs.model.embed_tokens.weight
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(their_config)
    for module in theirs.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    assert config.window is not None
    ids_BT = torch.randint(0, 512, (1, config.window + beyond), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = theirs.eval()(ids_BT, use_cache=False).logits - ours(ids_BT, torch.tensor(0), None)[0]
    assert difference.abs().max() < FP32_LOGITS


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-31b"])
def test_windows_of_hugging_faces_graph(name: str, tmp_path: Path) -> None:
    """Read from the masks of their module, traced at its true size without memory."""
    config = config_of(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = Scorer(transformers.AutoModelForCausalLM.from_config(theirs_of(config, tmp_path)))
        sizes = ({0: Dim("B", max=8), 1: Dim("T", max=4096)},)
        graph = export(module, torch.zeros(2, 67, dtype=torch.int64), dynamic_shapes=sizes)
    case = Case(graph=graph).run(Canonicalize(), FuseAttention()).expect_skipped()
    calls = case.graph.calls(ATTENTION)
    assert [node.kwargs["window"] for node in calls] == [layer.window or 0 for layer in config.layers]
    assert [node.args[1].meta["val"].shape[3] for node in calls] == [layer.key_width for layer in config.layers]
    for index, node in enumerate(calls):
        assert node.args[1] is calls[config.source(index)].args[1]


def test_int4_of_e2b_needs_little_memory(tmp_path: Path) -> None:
    """Both tables are streamed; the artifact has a cache for every layer that keeps keys and values, and no more."""
    config, folder = config_of("gemma4-e2b"), tmp_path / "e2b"
    options = ("--weights", "random", "--quant", "int4", "--context", "4096", "-o", folder)
    process = subprocess.Popen([sys.executable, "-m", "transom", "export", "gemma4-e2b", *map(str, options)])
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0 and used.ru_maxrss * 1024 < MEMORY
    manifest = json.loads((folder / "manifest.json").read_text())
    states = manifest["entries"]["decode"]["states"]
    owners = [layer for layer in config.layers if layer.kv_heads]
    assert [state["layer"] for state in states] == [index for index in range(len(owners)) for _ in range(2)]
    assert [state["window"] for state in states] == [layer.window for layer in owners for _ in range(2)]
    assert [state["sizes"][3] for state in states] == [layer.key_width for layer in owners for _ in range(2)]
    for file in folder.iterdir():
        file.unlink()
