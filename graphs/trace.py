"""From a model to a graph, without its weights ever standing in memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export

from transom.errors import TraceError
from transom.graphs.graph import Cache, Graph
from transom.graphs.weight import Weight

Task = Literal["decode", "score"]

MAX_BATCH = 256

LEAST_BOUND = 64
"""The sizes that are traced must lie within their bounds, however short the context."""


class TracedConfig(Protocol):
    """What tracing must know of a decoder."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def context(self) -> int: ...


class _Decode(nn.Module):
    """New tokens against caches; logits only where they are wanted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: torch.Tensor,
        start: torch.Tensor,
        logit_positions: torch.Tensor,
        caches: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> Any:
        logits_BTV, written = self.model(tokens, start, caches)
        return logits_BTV.index_select(1, logit_positions), written


class _Score(nn.Module):
    """A whole text without caches; all logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.model(tokens, torch.zeros((), dtype=torch.int64), None)[0]


def trace(
    build: Callable[[], nn.Module],
    config: TracedConfig,
    weights: Mapping[str, Weight],
    *,
    task: Task = "decode",
    dtype: torch.dtype = torch.float32,
) -> Graph:
    """Trace a decoder.

    The model is built and traced on fake tensors. Batch B, new tokens T, cache slots S and wanted positions P are all
    symbolic, and every layer's cache has the same S: as traced, all caches grow with the context.

    Args:
        build: Makes the module; its `forward` takes (tokens, start, caches) as the model files define it.
        config: The module's configuration.
        weights: Recipe of every parameter, by the module's own names.
        task: "decode": inputs tokens [B, T], start [], logit_positions [P] and caches [B, K, S, H]; outputs logits
            [B, P, V] and the caches. "score": input tokens [B, T]; output logits [B, T, V].
        dtype: Dtype to compute in.

    Raises:
        TraceError: If the module cannot be exported, or a parameter has no weight.
    """
    import torch._dynamo.config  # takes seconds

    # torch's cache of fake results keys them by symbols, which takes longer than computing the results.
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with uncached, FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export warns of its own internals
        with _default_dtype(dtype):
            module = build().eval()
        tokens = torch.zeros(2, 7, dtype=torch.int64)
        # A bound of sizes only: sessions hold to the context itself.
        most = max(config.context, LEAST_BOUND)
        batch, new = Dim("B", min=1, max=MAX_BATCH), Dim("T", min=1, max=most)
        try:
            if task == "score":
                program = export(_Score(module), (tokens,), dynamic_shapes=({0: batch, 1: new},), strict=False)
            else:
                shape = (2, config.num_kv_heads, 40, config.head_dim)
                caches = [
                    (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(config.num_layers)
                ]
                cache_dims = {0: batch, 2: Dim("S", min=1, max=most)}
                program = export(
                    _Decode(module),
                    (tokens, torch.zeros((), dtype=torch.int64), torch.zeros(3, dtype=torch.int64), caches),
                    dynamic_shapes=(
                        {0: batch, 1: new},
                        None,
                        {0: Dim("P", min=0, max=most)},
                        [(cache_dims, cache_dims)] * config.num_layers,
                    ),
                    strict=False,
                )
        except Exception as error:
            raise TraceError(f"torch.export could not trace {type(module).__name__} for {task!r}: {error}") from error
    return _graph(program, weights, task, dtype)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _graph(program: ExportedProgram, weights: Mapping[str, Weight], task: Task, dtype: torch.dtype) -> Graph:
    names = [name.removeprefix("model.") for name in program.state_dict]
    if missing := sorted(set(names) - set(weights)):
        raise TraceError(f"the model has parameters that no weight was given for: {', '.join(missing)}")
    # Parameters lose the wrapper's prefix, so that weights keep the names they have in the checkpoint.
    program.state_dict.update({name: program.state_dict.pop(f"model.{name}") for name in names})
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            spec.target = spec.target.removeprefix("model.")
    graph = Graph(program=program, weights={name: weights[name].to(dtype) for name in names}, task=task)
    if task == "decode":
        _, start, _, *caches = graph.user_inputs()
        graph.start = start.name
        graph.caches = tuple(
            Cache(name=f"cache.{i // 2}.{'value' if i % 2 else 'key'}", layer=i // 2, input=node.name)
            for i, node in enumerate(caches)
        )
    return graph
