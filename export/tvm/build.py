"""From a graph to a shared library: a function for one new token and one for any number, or one of an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform

from transom.backends.tvm.artifact import DECODE, PREFILL
from transom.export.tvm.emitter import Emitter
from transom.export.tvm.linking import linker
from transom.export.tvm.lowerings import TABLE
from transom.export.tvm.processor import Processor
from transom.graphs.graph import Graph

# TVM's own list looks for reshapes inside kernels, and rejects those that it cannot read. Here no kernel is one.
PASSES = (
    transform.LegalizeOps(),
    transform.ToNonDataflow(),
    transform.RemovePurityChecking(),
    transform.CallTIRRewrite(),
    transform.StaticPlanBlockMemory(),
    transform.LowerAllocTensor(),
    transform.KillAfterLastUse(),
    transform.LowerRuntimeBuiltin(),
    transform.ComputePrimValue(),
    transform.VMShapeLower(),
    transform.AttachGlobalSymbol(),
)


def module(graph: Graph, processor: Processor, *, chunk: int) -> tvm.IRModule:
    """The graph as Relax functions that call kernels.

    Args:
        graph: A `decode` graph that the target's passes have rewritten, or an encoder's, for a function of its task's
            name.
        processor: What the kernels are for.
        chunk: Most new tokens in one call.

    Raises:
        UnsupportedOpsError: If an operation is used in a way that the kernels do not cover.
    """
    builder = relax.BlockBuilder()
    kernels: dict[Any, Any] = {}
    for name, tokens in ((DECODE, 1), (PREFILL, None)) if graph.task == DECODE else ((graph.task, None),):
        Emitter(graph, TABLE, builder, kernels, processor.tile, tokens).emit(name, chunk)
    return builder.finalize()


def write_library(graph: Graph, processor: Processor, path: Path, *, chunk: int) -> None:
    """Compile and link.

    Args:
        graph: A graph that the target's passes have rewritten; see `module`.
        processor: What to compile for.
        path: Library to write.
        chunk: Most new tokens in one call.

    Raises:
        UnsupportedOpsError: If an operation is used in a way that the kernels do not cover.
        TargetError: If nothing here can link for the processor.
    """
    link = linker(processor)
    lowered = module(graph, processor, chunk=chunk)
    # No default schedule and no fusion: every kernel is ours, or a few numbers large.
    passes = tvm.transform.Sequential(list(PASSES))
    compiled = tvm.compile(lowered, target=processor.target(), relax_pipeline=passes)
    compiled.export_library(str(path), fcompile=link)
