"""The oracle: the model file in eager float32 PyTorch, all positions at once, without caches and without passes.

Of a quantised model, it has the numbers that the codes mean. Logits are causal, so one pass over the longest prompt
serves every shorter one. Only hidden states are kept: logits of 262,144 tokens are computed for a few positions
at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from transom.backends.prompt import Prompt
from transom.backends.runtime import Float
from transom.errors import InvariantError
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.passes.base import Pipeline
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.fuse_experts import FuseExperts
from transom.passes.share_embedding import ShareEmbedding
from transom.zoo.layers import Decoder
from transom.zoo.model import Model


class Reading:
    """What the oracle says of one text; logits on demand."""

    def __init__(self, module: Decoder, tokens: Sequence[int], **inputs: torch.Tensor) -> None:
        self._module = module
        with torch.no_grad():
            self._hidden_TD = module.hidden(torch.tensor([list(tokens)]), torch.tensor(0), None, **inputs)[0][0]

    def logits(self, first: int, stop: int) -> torch.Tensor:
        """Logits float32 [stop - first, V] of some positions."""
        with torch.no_grad():
            return self._module.head(self._hidden_TD[first:stop])


class Oracle:
    """The eager module, with the numbers that a scheme's codes mean, and its reading of the text of all targets."""

    def __init__(self, model: Model, quant: str, tokens: Sequence[int]) -> None:
        self.quant = quant
        self._module = model.eager()
        if quant != "none":
            round_weights(self._module, model.trace(), quant)
            for name in model.config.encoders:
                round_weights(self._module, model.trace(task=name), quant)
        self.text = Reading(self._module, tokens)
        self._known: dict[tuple[int, ...], Reading] = {}

    def read(self, tokens: Sequence[int]) -> Reading:
        """Another text; the last one is remembered, as targets that agree all ask for the same."""
        key = tuple(tokens)
        if key not in self._known:
            self._known = {key: Reading(self._module, tokens)}
        return self._known[key]

    def encode_image(self, pixels: Float) -> Float:
        """Soft tokens float32 [Q, D] of an image's pixels [1, 3, S, S]."""
        module: Any = self._module
        with torch.no_grad():
            soft: Float = module.encode_image(torch.from_numpy(pixels))[0].numpy()
        return soft

    def read_images(self, prompt: Prompt, until: Sequence[int]) -> Reading:
        """A text with images, whose soft tokens stand in the prompt; `until` is the last position that each sees."""
        assert prompt.soft is not None
        soft = torch.zeros(1, len(prompt), prompt.soft.shape[1])
        soft[0, torch.from_numpy(prompt.tokens < 0)] = torch.from_numpy(prompt.soft)
        return Reading(self._module, prompt.tokens.tolist(), until=torch.tensor(until), soft=soft)


def quantized(traced: Graph, quant: str) -> Graph:
    """A graph as traced whose weights are the numbers that a scheme's codes mean."""
    return Pipeline([Canonicalize(), ShareEmbedding(), FuseExperts(), ConvertQuantized(scheme(quant))]).run(traced)[0]


def round_weights(module: Decoder, graph: Graph, quant: str) -> None:
    """Give a module the numbers that the codes of a scheme mean, computed by the pass that makes the codes."""
    rounded, graph = {}, quantized(graph, quant)
    codes = [node.args[1] for node in graph.calls(ops.LINEAR_QUANTIZED, ops.EMBEDDING_QUANTIZED)]
    codes += [node.args[index] for node in graph.calls(ops.EXPERTS_QUANTIZED) for index in (3, 7)]
    for node in codes:
        named_codes = graph.weight_of(node)
        if named_codes is None or named_codes[1].part_of is None:
            raise InvariantError(f"{node.name}: the codes of a quantised weight are computed, not stored")
        rounded[named_codes[0].removesuffix(".codes")] = named_codes[1].part_of.dequantized()
    # Assigned, not copied: a checkpoint's tensors may share memory with the module's.
    load_result = module.load_state_dict(rounded, assign=True, strict=False)
    if load_result.unexpected_keys:
        raise InvariantError(
            f"quantised weights that the module does not have: {', '.join(load_result.unexpected_keys)}"
        )
    module.requires_grad_(False)
