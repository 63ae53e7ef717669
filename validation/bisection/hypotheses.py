"""What may be wrong at a site, as predictions: a cause is believed only if it reproduces the numbers that were seen.

The first hypothesis of a site is that it does what the model says. The others are mistakes that implementations of
this family of models make. Those of projections, rotations and attention stand in files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import gelu, linear, silu

from transom.validation.bisection.attention_hypotheses import of_attention
from transom.validation.bisection.context import rounded
from transom.validation.bisection.evidence import RIGHT, Evidence, Hypothesis, best_factor
from transom.validation.bisection.projection_hypotheses import (
    of_projection,
    other_specs,
    quantised,
    round_activations,
)
from transom.validation.bisection.rope_hypotheses import of_rope


def hypotheses(evidence: Evidence) -> Iterator[Hypothesis]:
    """Everything that may be the case at a site; first that it is right."""
    makers = {
        "embedding": _of_embedding,
        "norm": _of_norm,
        "projection": of_projection,
        "rope": of_rope,
        "attention": of_attention,
        "activation": _of_activation,
        "residual": _of_residual,
        "logits": _of_logits,
    }
    right, *wrong = makers[evidence.site.op](evidence)
    yield right
    yield from wrong
    op = "softmax" if evidence.site.op == "attention" else evidence.site.op
    yield from _of_any(op, right.predict, evidence)


def _of_any(op: str, right: Callable[[], torch.Tensor], evidence: Evidence) -> Iterator[Hypothesis]:
    """Mistakes that any operation can make."""

    def scaled() -> torch.Tensor:
        return right() * best_factor(right(), evidence.output)

    factor = best_factor(right(), evidence.output)
    yield Hypothesis(op=op, cause="the output is rounded to bfloat16", predict=lambda: right().bfloat16().float())
    yield Hypothesis(op=op, cause="the output is rounded to float16", predict=lambda: right().half().float())
    yield Hypothesis(op=op, cause="the output is all zeros", predict=lambda: torch.zeros_like(right()))
    yield Hypothesis(op=op, cause=f"the output is multiplied by {factor:.6g}", predict=scaled)
    for shift, which in ((1, "before"), (-1, "after")):
        yield Hypothesis(
            op=op,
            cause=f"every position has the output of the position {which} it",
            predict=lambda shift=shift: right().roll(shift, 0),  # type: ignore[misc]
        )


def _of_norm(evidence: Evidence) -> Iterator[Hypothesis]:
    context, path = evidence.context, evidence.site.path
    x, weight, eps = evidence.inputs[0], context.weight(f"{path}.weight"), context.config.norm_eps
    x = x.view(evidence.output.shape)

    def normed(scale: torch.Tensor | float, eps: float = eps, centre: bool = False) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True) if centre else x
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * scale

    def guess(cause: str, predict: Callable[[], torch.Tensor]) -> Hypothesis:
        return Hypothesis(op="norm", cause=cause, predict=predict)

    yield guess(RIGHT, lambda: normed(1 + weight))
    yield guess("the norm multiplies by w in place of 1 + w", lambda: normed(weight))
    yield guess("the norm multiplies by 2 + w: the 1 is added twice", lambda: normed(2 + weight))
    yield guess("the norm has no weight", lambda: normed(1.0))
    yield guess("there is no norm: its input comes out", lambda: x)
    yield guess("there is no norm: its input is only multiplied by 1 + w", lambda: x * (1 + weight))
    yield guess("the norm subtracts the mean, as LayerNorm does", lambda: normed(1 + weight, centre=True))
    for wrong in (0.0, 1e-12, 1e-8, 1e-5, 1e-4, 1e-3, 1e-2):
        if wrong != eps:
            cause = f"the norm's epsilon is {wrong:g} in place of {eps:g}"
            yield guess(cause, lambda wrong=wrong: normed(1 + weight, wrong))  # type: ignore[misc]
    for name in sorted(context.weights):
        if name.endswith("norm.weight") and name != f"{path}.weight" and context.weights[name].shape == weight.shape:
            yield guess(
                f"the norm has the weight of {name.removesuffix('.weight')}",
                lambda name=name: normed(1 + context.weight(name)),  # type: ignore[misc]
            )


def _of_embedding(evidence: Evidence) -> Iterator[Hypothesis]:
    context, name = evidence.context, f"{evidence.site.path}.weight"
    weight = context.weights[name]
    ids = torch.tensor(list(context.tokens[: len(evidence.output)]))
    unique, index = torch.unique(ids, return_inverse=True)
    rows = torch.cat([weight.read_rows(int(token), int(token) + 1) for token in unique]).float()
    fmt = context.spec(name)
    right = rows if fmt is None else rounded(rows, fmt)
    exact = context.config.hidden_size**0.5
    # The factor has the dtype of the weights.
    scale = float(torch.tensor(exact, dtype=torch.float32))

    def guess(cause: str, table: torch.Tensor, factor: float) -> Hypothesis:
        return Hypothesis(op="embedding", cause=cause, predict=lambda: table[index] * factor)

    yield guess(RIGHT, right, scale)
    yield guess("the embedding is not multiplied by sqrt(hidden_size)", right, 1.0)
    yield guess("the embedding is multiplied by sqrt(hidden_size) twice", right, scale * scale)
    rounded_scale = float(torch.tensor(exact, dtype=torch.bfloat16))
    yield guess("sqrt(hidden_size) is rounded to bfloat16", right, rounded_scale)
    yield from quantised(context, name, lambda numbers: numbers[index] * scale, rows)


def _of_activation(evidence: Evidence) -> Iterator[Hypothesis]:
    context, parent = evidence.context, evidence.site.path.removesuffix(".activation")
    names = f"{parent}.gate_proj.weight", f"{parent}.up_proj.weight"
    x, (gate_weight, up_weight) = evidence.inputs[0], map(context.weight, names)
    gate, up = linear(x, gate_weight), linear(x, up_weight)

    def guess(cause: str, predict: Callable[[], torch.Tensor]) -> Hypothesis:
        return Hypothesis(op="activation", cause=cause, predict=predict)

    yield guess(RIGHT, lambda: gelu(gate, approximate="tanh") * up)
    yield guess("the activation is the exact gelu in place of its tanh form", lambda: gelu(gate) * up)
    yield guess("the activation is silu in place of gelu", lambda: silu(gate) * up)
    yield guess("the activation is relu in place of gelu", lambda: gate.relu() * up)
    yield guess("there is no activation", lambda: gate * up)
    yield guess("gate and up are swapped", lambda: gelu(up, approximate="tanh") * gate)
    yield guess("gate and up are added in place of multiplied", lambda: gelu(gate, approximate="tanh") + up)
    raw = [context.weights[name].read().float() for name in names]

    def apply(both: torch.Tensor) -> torch.Tensor:
        gate_rows, up_rows = both.chunk(2)
        return gelu(linear(x, gate_rows), approximate="tanh") * linear(x, up_rows)

    yield from quantised(context, names[0], apply, torch.cat(raw))
    for block in (16, 32, 64, 128):
        if x.shape[-1] % block == 0:
            yield Hypothesis(
                op="quantisation",
                cause=f"activations are rounded to 8 bits in blocks of {block}",
                predict=lambda block=block: (  # type: ignore[misc]
                    gelu(linear(round_activations(x, block), gate_weight), approximate="tanh")
                    * linear(round_activations(x, block), up_weight)
                ),
            )


def _of_residual(evidence: Evidence) -> Iterator[Hypothesis]:
    stream, branch = evidence.inputs

    def guess(cause: str, predict: Callable[[], torch.Tensor]) -> Hypothesis:
        return Hypothesis(op="residual", cause=cause, predict=predict)

    yield guess(RIGHT, lambda: stream + branch)
    yield guess("the branch is not added: the stream comes out as it was", lambda: stream)
    yield guess("the stream is lost: only the branch comes out", lambda: branch)
    yield guess("the branch is added twice", lambda: stream + 2 * branch)
    yield guess("the stream is added twice", lambda: 2 * stream + branch)
    yield guess("the branch is subtracted", lambda: stream - branch)


def _of_logits(evidence: Evidence) -> Iterator[Hypothesis]:
    context, x, name = evidence.context, evidence.inputs[0], "embed_tokens.weight"
    cap, fmt = context.config.logit_softcap, context.spec(name)

    def head(change: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows) -> torch.Tensor:
        # The table of a large vocabulary is never in memory at once.
        blocks = [linear(x, change(block.float())) for block in context.weights[name].blocks()]
        return torch.cat(blocks, -1)

    def right_rows(rows: torch.Tensor) -> torch.Tensor:
        return rows if fmt is None else rounded(rows, fmt)

    def capped(logits: torch.Tensor, cap: float | None = cap) -> torch.Tensor:
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def guess(cause: str, predict: Callable[[], torch.Tensor], op: str = "logits") -> Hypothesis:
        return Hypothesis(op=op, cause=cause, predict=predict)

    plain = head(right_rows)
    yield guess(RIGHT, lambda: capped(plain))
    if cap is not None:
        yield guess("the logits are not capped", lambda: plain)
    for wrong in (30.0, 50.0):
        if wrong != cap:
            yield guess(f"the logits are capped at {wrong:g}", lambda wrong=wrong: capped(plain, wrong))  # type: ignore[misc]
    width = context.config.hidden_size**0.5
    yield guess("the head has the embedding's factor", lambda: capped(plain * width))
    for words, other in other_specs(context, name):
        yield guess(
            f"the head is {words}",
            lambda other=other: capped(head(lambda rows: rounded(rows, other))),  # type: ignore[misc]
            "quantisation",
        )
