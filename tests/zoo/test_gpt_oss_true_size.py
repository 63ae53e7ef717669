"""gpt-oss at its true sizes, from random weights, and what an export of experts may take."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

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
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.gpt_oss import GptOssConfig
from transom.zoo.huggingface import write_config

MEMORY = 4e9
"""Bytes that an export may take at most."""


def released() -> GptOssConfig:
    config = preset("gpt-oss-20b")
    assert isinstance(config, GptOssConfig)
    return config


@pytest.mark.large
@pytest.mark.parametrize("kind", ["local", "global"])
def test_a_layer_is_that_of_transformers(kind: Literal["local", "global"], tmp_path: Path) -> None:
    """Past the window and through a checkpoint; of the table of tokens, some rows are enough."""
    config = dataclasses.replace(released(), vocab_size=512, layer_kinds=(kind,))
    weights = random_weights(config, 1)
    ours = build_empty(config)
    ours.load_state_dict({name: weight.read() for name, weight in weights.items()}, assign=True)
    assert config.window is not None
    ids_BT = torch.randint(0, 512, (1, config.window + 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = ours(ids_BT, torch.tensor(0), None)[0]
    del ours
    write_checkpoint(tmp_path, config, weights, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        difference = theirs.eval()(ids_BT, use_cache=False).logits - logits
    assert difference.abs().max() < FP32_LOGITS
    for file in tmp_path.iterdir():
        file.unlink()


@pytest.mark.large
def test_windows_of_hugging_faces_graph(tmp_path: Path) -> None:
    """Read from the masks of their module, traced at its true size without memory."""
    config = released()
    write_config(config, tmp_path)
    # Their usual experts look at what was chosen, which has no graph.
    their_config = transformers.AutoConfig.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="batched_mm"
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = Scorer(transformers.AutoModelForCausalLM.from_config(their_config))
        sizes = ({0: Dim("B", max=8), 1: Dim("T", max=4096)},)
        graph = export(module, torch.zeros(2, 67, dtype=torch.int64), dynamic_shapes=sizes)
    calls = Case(graph=graph).run(Canonicalize(), FuseAttention()).expect_skipped().graph.calls(ATTENTION)
    assert [node.kwargs["window"] for node in calls] == [128, 0] * 12
    assert all(node.args[5] is not None for node in calls), "every head has a sink"


@pytest.mark.large
def test_int4_needs_little_memory(tmp_path: Path) -> None:
    """20.9 billion numbers become 14.1 GB; only global layers' caches grow."""
    config, folder = released(), tmp_path / "20b"
    options = ("--weights", "random", "--quant", "int4", "--context", "4096", "--chunk", "128", "-o", folder)
    process = subprocess.Popen([sys.executable, "-m", "transom", "export", "gpt-oss-20b", *map(str, options)])
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0 and used.ru_maxrss * 1024 < MEMORY
    manifest = json.loads((folder / "manifest.json").read_text())
    assert 14e9 < sum(entry["bytes"] for entry in manifest["files"].values()) < 14.2e9
    states = manifest["entries"]["decode"]["states"]
    assert [state["layer"] for state in states] == [index for index in range(24) for _ in range(2)]
    assert [state["window"] for state in states] == [128, 128, None, None] * 12
    # Keys of a window and of all of a chunk but its first token.
    assert [state["sizes"] for state in states] == ([[None, 8, 128 + 127, 64]] * 2 + [[None, 8, None, 64]] * 2) * 12
    assert config.num_layers == 24
    for file in folder.iterdir():
        file.unlink()


STREAMED = """
import dataclasses, resource, sys
from pathlib import Path
from transom.compiler import compile_model
from transom.export.options import Options
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.model import load

tiny = load("gpt-oss-tiny")
config = dataclasses.replace(
    tiny.config, hidden_size=1024, intermediate_size=1024, experts=24, layer_kinds=("local",), name="gpt-oss-streamed"
)
model = dataclasses.replace(tiny, config=config, weights=random_weights(config, 0))
options = Options.of(model, target="onnxruntime", quant="int4", context=64)
tiny_options = Options.of(tiny, target="onnxruntime", quant="int4", context=64)
# What is loaded and traced once stays out of the difference.
compile_model(tiny, tiny_options, out=Path(sys.argv[1]) / "tiny")
model.trace()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compile_model(model, options, out=Path(sys.argv[1]) / "streamed")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown, sum(weight.bytes for weight in model.weights.values()))
"""


def test_experts_are_streamed(tmp_path: Path) -> None:
    """An export takes less memory than half of one of its matrices, which is two thirds of all."""
    done = subprocess.run([sys.executable, "-c", STREAMED, tmp_path], capture_output=True, text=True, check=True)
    grown, whole = map(int, done.stdout.split())
    assert whole > 3e8 and grown * 1024 < whole / 3
