"""From a model to a graph, without its weights ever standing in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export

from transom.errors import TraceError
from transom.graphs.graph import Graph, dtype_name
from transom.graphs.state import Port, Signature, State, by_layer
from transom.graphs.weight import Weight

DECODE, SCORE = "decode", "score"

MAX_BATCH = 256

LEAST_BOUND = 64
"""The sizes that are traced must lie within their bounds, however short the context."""


_PORTS: Mapping[str, tuple[str, ...]] = {"tokens": ("batch", "tokens"), "start": (), "logit_positions": ("positions",)}
"""What a caller passes to every decoder beside states, and its axes."""


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
        inputs: dict[str, torch.Tensor],
        caches: list[tuple[torch.Tensor, ...]],
    ) -> Any:
        logits_BTV, written = self.model(tokens, start, caches, **inputs)
        return logits_BTV.index_select(1, logit_positions), written


class _Score(nn.Module):
    """A whole text without caches; all logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.model(tokens, torch.zeros((), dtype=torch.int64), None)[0]


class _Encode(nn.Module):
    """Another method of the model, without states."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        return getattr(self.model, self.method)(**inputs)


def trace(
    build: Callable[[], nn.Module],
    weights: Mapping[str, Weight],
    *,
    context: int,
    states: Sequence[State] = (),
    inputs: Mapping[str, Port] | None = None,
    encoders: Mapping[str, Signature] | None = None,
    task: str = DECODE,
    dtype: torch.dtype = torch.float32,
) -> Graph:
    """Trace a decoder, or an encoder beside it.

    The model is built and traced on fake tensors. Batch B, new tokens T, slots S and wanted positions P are all
    symbolic, and all rings that are declared to grow with the context have the same S.

    Args:
        build: Makes the module; its `forward` takes (tokens, start, caches) as the model files define it: one tuple a
            layer that owns states, of these in their order.
        weights: Recipe of every parameter, by the module's own names.
        context: Longest sequence, in tokens.
        states: What the model keeps from call to call; those without a dtype have that of the computation.
        inputs: What the module's `forward` takes besides, by keyword.
        encoders: Other methods of the module that can be traced, by name.
        task: "decode": inputs tokens [B, T], start [], logit_positions [P], `inputs` and the states; outputs logits
            [B, P, V] and the states. "score": input tokens [B, T]; output logits [B, T, V]. Or the name of an encoder,
            whose inputs and outputs are those of its signature.
        dtype: Dtype to compute in.

    Raises:
        TraceError: If the module cannot be exported, a parameter has no weight, or the module returns other states than
            were declared.
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
        most = max(context, LEAST_BOUND)
        batch, new = Dim("B", min=1, max=MAX_BATCH), Dim("T", min=1, max=most)
        layers = by_layer(_with_dtype(state, dtype) for state in states) if task == DECODE else []
        inputs = dict(inputs or {}) if task == DECODE else {}
        chosen = {"batch": batch, "tokens": new, "slots": Dim("S", min=1, max=most)}
        ports: Mapping[str, tuple[str, ...]] = {"tokens": _PORTS["tokens"]}
        outputs: Mapping[str, tuple[str, ...]] = {"logits": ("batch", "tokens", "vocabulary")}
        try:
            if task == SCORE:
                program = _export(_Score(module), (tokens,), ({0: batch, 1: new},))
            elif task == DECODE:
                ports = {**_PORTS, **{name: port.axes for name, port in inputs.items()}}
                outputs = {"logits": ("batch", "positions", "vocabulary")}
                caches = [tuple(map(_zeros, layer)) for layer in layers]
                more = {name: _example(port, {"batch": 2, "tokens": 7}) for name, port in inputs.items()}
                program = _export(
                    _Decode(module),
                    (tokens, torch.zeros((), dtype=torch.int64), torch.zeros(3, dtype=torch.int64), more, caches),
                    (
                        {0: batch, 1: new},
                        None,
                        {0: Dim("P", min=0, max=most)},
                        {name: _open_sizes(port, chosen) for name, port in inputs.items()},
                        [tuple(_open_sizes(state, chosen) for state in layer) for layer in layers],
                    ),
                )
            else:
                signature = (encoders or {})[task]
                ports = {name: port.axes for name, port in signature.inputs.items()}
                outputs = signature.outputs
                examples = {name: _example(port, {}) for name, port in signature.inputs.items()}
                program = _export(_Encode(module, task), (examples,), None)
            _drop_assertions(program, most)
        except Exception as error:
            raise TraceError(f"torch.export could not trace {type(module).__name__} for {task!r}: {error}") from error
    return _graph(program, weights, task, dtype, ports, outputs, [state for layer in layers for state in layer])


def _export(module: nn.Module, inputs: tuple[Any, ...], sizes: tuple[Any, ...] | None) -> ExportedProgram:
    # As guards, torch 2.11 and 2.12 refuse what holds for all sizes: `min(32 * S, 64 * S) == 32 * S`.
    return export(module, inputs, dynamic_shapes=sizes, strict=False, prefer_deferred_runtime_asserts_over_guards=True)


def _drop_assertions(program: ExportedProgram, most: int) -> None:
    """Erase the assertions about sizes that torch.export leaves in a program, once they are seen to hold.

    Args:
        program: What was exported.
        most: The largest size.

    Raises:
        ValueError: If one does not hold: then the model is right for some sizes only.
    """
    edges = {2**power + step for power in range(most.bit_length()) for step in (-1, 0, 1)}
    probes = sorted(size for size in {*range(1, 17), *edges, most} if 1 <= size <= most)
    proved: set[Any] = {True}
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_scalar.default:
            claim = node.args[0].meta["val"].node.expr if isinstance(node.args[0], torch.fx.Node) else node.args[0]
            if claim not in proved:
                symbols = sorted(claim.free_symbols, key=str)
                for index, step in itertools.product(range(len(probes)), (0, 1, 5)):  # equal sizes, and unequal ones
                    sizes = {symbol: probes[(index + step * i) % len(probes)] for i, symbol in enumerate(symbols)}
                    if claim.subs(sizes) != True:  # noqa: E712 (sympy's own truth)
                        raise ValueError(f"the model works only where {claim}, so not at {sizes}")
                proved.add(claim)
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _with_dtype(state: State, dtype: torch.dtype) -> State:
    return dataclasses.replace(state, dtype=state.dtype or dtype_name(dtype))


def _zeros(state: State) -> torch.Tensor:
    return torch.zeros(state.shape(40, batch=2), dtype=getattr(torch, state.dtype))


def _example(port: Port, chosen: Mapping[str, int]) -> torch.Tensor:
    sizes = [chosen[axis] if size is None else size for axis, size in zip(port.axes, port.sizes, strict=True)]
    return torch.zeros(sizes, dtype=getattr(torch, port.dtype))


def _open_sizes(state: State | Port, chosen: Mapping[str, Any]) -> dict[int, Any]:
    """What torch.export must know of the sizes that callers choose, by axis."""
    sizes = zip(state.axes, state.sizes, strict=True)
    return {index: chosen[axis] for index, (axis, size) in enumerate(sizes) if size is None}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _graph(
    program: ExportedProgram,
    weights: Mapping[str, Weight],
    task: str,
    dtype: torch.dtype,
    ports: Mapping[str, tuple[str, ...]],
    outputs: Mapping[str, tuple[str, ...]],
    states: Sequence[State],
) -> Graph:
    # An encoder reads a part of the module's parameters.
    used = {spec.target for spec in program.graph_signature.input_specs}
    for name in program.state_dict.keys() - used:
        del program.state_dict[name]
    names = [name.removeprefix("model.") for name in program.state_dict]
    if missing := sorted(set(names) - set(weights)):
        raise TraceError(f"the model has parameters that no weight was given for: {', '.join(missing)}")
    # Parameters lose the wrapper's prefix, so that weights keep the names they have in the checkpoint.
    program.state_dict.update({name: program.state_dict.pop(f"model.{name}") for name in names})
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            spec.target = spec.target.removeprefix("model.")
    kept = tuple(state.name for state in states)
    returned_names = (*outputs, *kept)
    if (count := len(program.graph_signature.output_specs)) != len(returned_names):
        raise TraceError(f"the model returns {count - 1} states where {len(kept)} are declared: {', '.join(kept)}")
    graph = Graph(
        program=program,
        weights={name: weights[name].to(dtype) for name in names},
        task=task,
        input_names=(*ports, *kept),
        output_names=returned_names,
        axes={**ports, **outputs},
        states={state.name: state for state in states},
    )
    given, values = graph.inputs, graph.outputs
    for name in kept:
        taken, returned = given[name].meta["val"], values[name].meta["val"]
        if [str(size) for size in taken.shape] != [str(size) for size in returned.shape]:
            raise TraceError(f"the model returns {name} as {tuple(returned.shape)}, it is {tuple(taken.shape)}")
    return graph
