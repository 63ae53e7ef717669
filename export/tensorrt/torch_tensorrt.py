"""The second front door to TensorRT: a graph compiled by Torch-TensorRT, for those who build on it.

Our own dialect is the first: there TensorRT writes caches in place and attends by its own operation. Torch-TensorRT
takes plain operations, so a call gets caches and returns new ones, and sizes are numbers. It comes from NVIDIA's and
PyTorch's own package indices, needs a GPU even to be imported, and is no extra of this project.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from transom.errors import TargetError
from transom.graphs.graph import Graph
from transom.graphs.inline import inline


def lower(graph: Graph, *, tokens: int, slots: int, positions: int = 1, **options: Any) -> Any:
    """A module that runs one call with sizes that are numbers.

    Args:
        graph: A `decode` graph; the passes of the target "tensorrt" give it bounded caches.
        tokens: T, new tokens in a call.
        slots: S of caches that grow.
        positions: P, positions whose logits are wanted.
        options: For `torch_tensorrt.dynamo.compile`.

    Returns:
        Torch-TensorRT's graph module: callable on a GPU with (tokens [1, T], start [], logit_positions [P], caches...).

    Raises:
        TargetError: If Torch-TensorRT is not installed, or finds no GPU.
        TraceError: If the graph is no `decode` graph.
    """
    try:
        compile_program = importlib.import_module("torch_tensorrt").dynamo.compile
    except (ImportError, OSError, AssertionError, RuntimeError) as error:  # without a GPU it fails in any of these ways
        raise TargetError(
            f"Torch-TensorRT cannot be imported ({str(error).partition(chr(10))[0]}): on a machine with an NVIDIA GPU, "
            "pip install torch-tensorrt beside the torch that it names"
        ) from error
    program = inline(graph, tokens=tokens, slots=slots, positions=positions)
    inputs = [
        torch.zeros(value.meta["val"].shape, dtype=value.meta["val"].dtype)
        for value in program.graph.nodes
        if value.op == "placeholder" and value.name in program.graph_signature.user_inputs
    ]
    # Numbers are 64-bit positions, and types are what the graph says.
    return compile_program(
        program, arg_inputs=inputs, **{"truncate_double": False, "use_explicit_typing": True, **options}
    )
