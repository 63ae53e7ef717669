"""Layers that keep states of different sizes: heads, widths of keys and of values, and a summary without slots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.export.toys import export_toy
from tests.tolerances import FP32_LOGITS
from transom.backends.artifact import DECODE, Entry, Manifest, read_manifest
from transom.backends.folder import MANIFEST
from transom.backends.opening import open_session
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.cli.export import inspect
from transom.errors import ArtifactError, TargetError, TraceError, UnsupportedOpsError
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.state import State, ring
from transom.graphs.trace import trace
from transom.graphs.weight import Weight
from transom.passes.pipelines import PIPELINES, pipeline
from transom.zoo.layers import LayerCache, attend

WINDOW, CHUNK, CONTEXT, D, N, VOCABULARY = 8, 12, 128, 32, 4, 64

Layers = tuple[tuple[int | None, int, int, int], ...]
"""Window, kv heads, width of a key, width of a value."""

EVEN: Layers = ((WINDOW, 2, 16, 16), (2 * WINDOW, 1, 32, 32), (None, 4, 8, 8))
UNEVEN: Layers = ((WINDOW, 2, 16, 8), (2 * WINDOW, 1, 8, 16), (None, 4, 16, 8))


class Block(nn.Module):
    def __init__(self, window: int | None, heads: int, key_width: int, value_width: int) -> None:
        super().__init__()
        self.window, self.widths = window, (key_width, value_width)
        self.q = nn.Linear(D, N * key_width, bias=False)
        self.k, self.v = (nn.Linear(D, heads * width, bias=False) for width in self.widths)
        self.out = nn.Linear(N * value_width, D, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, cache: LayerCache
    ) -> tuple[torch.Tensor, LayerCache]:
        key_width, value_width = self.widths
        q, k, v = (
            layer(x_BTD).view(*x_BTD.shape[:2], -1, width).transpose(1, 2)
            for layer, width in ((self.q, key_width), (self.k, key_width), (self.v, value_width))
        )
        attended, written = attend(q, k, v, cache, positions_T, scale=key_width**-0.5, window=self.window)
        return x_BTD + self.out(attended), written


class Uneven(nn.Module):
    """Attention layers, and behind them the mean of all embeddings so far if there is a summary."""

    def __init__(self, layers: Layers, *, summary: bool) -> None:
        super().__init__()
        self.summary = summary
        self.embed = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(Block(*layer) for layer in layers)

    def forward(self, tokens: torch.Tensor, start: torch.Tensor, caches: list[Any]) -> tuple[torch.Tensor, Any]:
        positions = start + torch.arange(tokens.shape[1])
        x, written = self.embed(tokens), []
        totals = x.cumsum(1)
        for layer, cache in zip(self.layers, caches, strict=False):
            x, after = layer(x, positions, cache)
            written.append(after)
        if self.summary:
            # A model zeroes its summary itself, as no runtime does.
            before = torch.where(start == 0, torch.zeros_like(caches[-1][0]), caches[-1][0])
            x = x + (before[:, None] + totals) / (positions + 1)[:, None]
            written.append((before + totals[:, -1],))
        return nn.functional.linear(x, self.embed.weight), written


def states_of(layers: Layers, *, summary: bool = False) -> list[State]:
    states = [
        ring(f"cache.{index}.{kind}", layer=index, heads=heads, width=width)
        for index, (_, heads, key_width, value_width) in enumerate(layers)
        for kind, width in (("key", key_width), ("value", value_width))
    ]
    if summary:
        total = State(name="total", layer=len(layers), axes=("batch", "width"), sizes=(None, D), dtype="float32")
        states.append(total)
    return states


def traced(layers: Layers, *, summary: bool = False) -> tuple[nn.Module, Graph]:
    """A module with random weights, and its decode graph."""
    torch.manual_seed(0)
    module = Uneven(layers, summary=summary).eval()
    weights = {name: Weight.of(tensor.detach(), name) for name, tensor in module.state_dict().items()}
    states = states_of(layers, summary=summary)
    return module, trace(lambda: Uneven(layers, summary=summary), weights, states=states, context=CONTEXT)


def compare(session: Session, module: nn.Module, layers: Layers, *, summary: bool = False) -> None:
    """Chunks, then single steps, past every ring's wrap."""
    tokens = torch.randint(0, VOCABULARY, (7 * WINDOW + 4,), generator=torch.Generator().manual_seed(1))
    caches: list[Any] = [
        (torch.zeros(1, heads, CONTEXT, key_width), torch.zeros(1, heads, CONTEXT, value_width))
        for _, heads, key_width, value_width in layers
    ]
    if summary:
        caches.append((torch.full((1, D), 7.0),))
    with torch.no_grad():
        expected = module(tokens[None], torch.tensor(0), caches)[0][0].numpy()
    for _ in range(2):  # the second time after reset()
        assert np.abs(session.logits(tokens[:33].tolist()) - expected[:33]).max() < FP32_LOGITS
        for position in range(33, len(tokens)):
            assert np.abs(session.decode(int(tokens[position])) - expected[position]).max() < FP32_LOGITS


def expected_bytes(layers: Layers, *, slack: int, slots: int) -> dict[str, int]:
    sizes = {"local": 0, "global": 0}
    for window, heads, key_width, value_width in layers:
        length = slots if window is None else window + slack
        sizes["global" if window is None else "local"] += 4 * heads * (key_width + value_width) * length
    return sizes


def export(graph: Graph, target: str, folder: Path) -> Manifest:
    return export_toy(graph, target, folder, context=CONTEXT, chunk=CHUNK)


@pytest.mark.parametrize("summary", [False, True], ids=["rings", "rings and a summary"])
@pytest.mark.parametrize("target", PIPELINES)
def test_every_pass_list_bounds_them(target: str, summary: bool) -> None:
    module, graph = traced(UNEVEN, summary=summary)
    rewritten, _ = pipeline(target, chunk=CHUNK, scheme=scheme("none")).run(graph)
    assert [state.window for state in rewritten.states.values()] == [8, 8, 16, 16, None, None, *[None] * summary]
    slack = {rewritten.states[f"cache.{layer}.key"].slots - window for layer, window in ((0, 8), (1, 16))}  # type: ignore[operator]
    assert slack <= {0, CHUNK - 1} and len(slack) == 1
    session = ReferenceSession(rewritten, context=CONTEXT, chunk=CHUNK)
    compare(session, module, UNEVEN, summary=summary)
    sizes = expected_bytes(UNEVEN, slack=slack.pop(), slots=CONTEXT)
    assert session.cache_bytes() == sizes | ({"summary": 4 * D} if summary else {})


@pytest.mark.parametrize(
    ("target", "layers", "slack"),
    [
        ("onnxruntime", EVEN, CHUNK - 1),
        ("tvm", EVEN, 0),
        ("xla", EVEN, 0),
        ("onnx", UNEVEN, CHUNK - 1),
        ("xla", UNEVEN, 0),
    ],
)  # fmt: skip
def test_targets_run_them(
    target: str, layers: Layers, slack: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, graph = traced(layers)
    export(graph, target, tmp_path / "model")
    entry: Entry = read_manifest(tmp_path / "model").decode
    assert [state.name for state in entry.states] == list(graph.states)
    assert {"tokens", "start", "logit_positions"} <= entry.inputs.keys() and list(entry.outputs) == ["logits"]
    assert entry.outputs["logits"].axes == ("batch", "positions", "vocabulary")
    session = open_session(tmp_path / "model", threads=1)
    compare(session, module, layers)
    assert session.cache_bytes() == expected_bytes(layers, slack=slack, slots=CONTEXT)
    inspect(tmp_path / "model", json=True)
    shown = json.loads(capsys.readouterr().out)
    assert [(cache["heads"], cache["width"]) for cache in shown["caches"]] == [
        (heads, width) for _, heads, *widths in layers for width in widths
    ]
    inspect(tmp_path / "model")
    rows = [line for line in capsys.readouterr().out.splitlines() if " x slots x " in line]
    assert len(rows) == (3 if layers is EVEN else 6)


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ("onnxruntime", TargetError, "takes values as wide as keys, not 8 where keys have 16: choose 'onnx'"),
        ("tvm", UnsupportedOpsError, "values are 8 wide, keys 16"),
    ],
)
def test_kernels_that_want_values_as_wide_as_keys(
    target: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    _, graph = traced(UNEVEN)
    with pytest.raises(error, match=words):
        export(graph, target, tmp_path / "model")


def test_a_folder_of_other_sizes(tmp_path: Path) -> None:
    """What a layer keeps is held against the model, layer by layer."""
    _, graph = traced(UNEVEN)
    export(graph, "onnx", tmp_path / "model")
    data = json.loads((tmp_path / "model" / MANIFEST).read_text())
    states = data["entries"][DECODE]["states"]
    states[0]["sizes"], states[1]["sizes"] = states[1]["sizes"], states[0]["sizes"]
    (tmp_path / "model" / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"cache\.0\.key is \[None, 2, 19, 8\], the model's \['batch', 2, 19, 16\]"):
        open_session(tmp_path / "model")


def test_declarations_that_are_not_the_models() -> None:
    weights = {name: Weight.of(tensor.detach()) for name, tensor in Uneven(EVEN, summary=False).state_dict().items()}
    with pytest.raises(TraceError, match="returns 4 states where 6 are declared: cache"):
        trace(lambda: Uneven(EVEN[:2], summary=False), weights, states=states_of(EVEN), context=CONTEXT)
    with pytest.raises(TraceError, match="could not trace Uneven for 'decode'"):
        trace(lambda: Uneven(EVEN, summary=False), weights, states=states_of(UNEVEN), context=CONTEXT)
