"""Attention: what TensorRT rejects, and what it would drop without a word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from transom.backends.tensorrt.widening import HALF
from transom.export.tensorrt.verify.view import Rule, View, attribute, given, type_name

HEAD = 256
"""Longest head of the fused kernels."""

STATIC_KEYS = 16384
"""Most keys that a kernel for exactly one query takes; at 24,576 none was found."""

_MASK, _PAST_KEY, _PAST_VALUE, _LENGTHS = 3, 4, 5, 6
_ATTRIBUTES = frozenset(
    {"scale", "is_causal", "q_num_heads", "kv_num_heads", "softcap", "softmax_precision", "qk_matmul_output_mode"}
)


def _forms(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("Attention"):
        if sum(bool(name) for name in node.output) > 1:
            yield node.name, "Attention with more than one output: keep caches by TensorScatter"
        if given(node, _PAST_KEY) or given(node, _PAST_VALUE):
            yield node.name, "Attention with past_key or past_value: keep caches by TensorScatter"
        for name in ("softcap", "softmax_precision"):
            if attribute(node, name):
                yield node.name, f"Attention with {name} is rejected: leave it out, or write the product out"
        shape = view.shape(node.input[0])
        if shape is not None and len(shape) != 4:
            yield node.name, f"Attention of {len(shape)} axes: give queries, keys and values as [B, N, T, H]"


def _lengths(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("Attention"):
        if given(node, _LENGTHS):
            yield (
                node.name,
                "nonpad_kv_seqlen is dropped without a word, so that every slot would be seen: say it in the mask",
            )


def _window(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("Attention"):
        for name in sorted({entry.name for entry in node.attribute} - _ATTRIBUTES):
            yield node.name, f"TensorRT's Attention has no {name}: a window must be said in the mask"


def _causal(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("Attention"):
        causal, masked = attribute(node, "is_causal", 0), given(node, _MASK)
        if causal and masked:
            yield node.name, "is_causal with a mask is rejected: the mask says all"
        elif not _over_a_cache(view, node):
            continue
        elif causal:
            yield (
                node.name,
                "is_causal counts queries from the first key, so that decoding sees one key only: give a mask",
            )
        elif not masked:
            yield node.name, "Attention without a mask sees every slot, empty ones too: give a mask"


def _over_a_cache(view: View, node: NodeProto) -> bool:
    maker = view.maker(given(node, 1))
    return maker is not None and maker.op_type == "TensorScatter"


def _mask_type(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("Attention"):
        name = given(node, _MASK)
        kind, shape = view.type(name), view.shape(name)
        if name and kind and kind != TensorProto.BOOL:
            yield node.name, f"a mask of {type_name(kind)}: give bool, as a float mask must have the queries' dtype"
        if name and shape is not None and len(shape) != 4:
            yield node.name, f"a mask of {len(shape)} axes: give [B, 1, T, S]"


def _shared_masks(view: View) -> Iterator[tuple[str, str]]:
    """Masks that are computed in the same way from the same values."""
    names_by_recipe: dict[str, set[str]] = defaultdict(set)
    for name in {given(node, _MASK) for node in view.of("Attention")} - {""}:
        names_by_recipe[view.recipe(name)].add(name)
    for names in names_by_recipe.values():
        if len(names) > 1:
            yield min(names), f"the same mask is made {len(names)} times: make it once and let all layers share it"


def _kernel(view: View) -> Iterator[tuple[str, str]]:
    for node in view.of("Attention"):
        kind, shape, keys = view.type(node.input[0]), view.shape(node.input[0]), view.shape(node.input[1])
        if kind and kind not in HALF:
            yield node.name, f"Attention of {type_name(kind)} has no kernel: compute in float16 or bfloat16"
        if shape is None or len(shape) != 4:
            continue
        if shape[3] is not None and shape[3] > HEAD:
            yield node.name, f"heads of {shape[3]} have no kernel, {HEAD} is the longest: write the product out"
        if shape[2] == 1 and keys is not None and (keys[2] or 0) > STATIC_KEYS:
            yield (
                node.name,
                f"exactly one query over {keys[2]} keys has no kernel, {STATIC_KEYS} is the most: leave the number of "
                "tokens open",
            )


RULES = (
    Rule(name="attention-form", text="Attention of four axes and one output, without past or softcap", check=_forms),
    Rule(name="attention-lengths", text="no nonpad_kv_seqlen, which is dropped without a word", check=_lengths),
    Rule(name="attention-window", text="no attribute that TensorRT does not know", check=_window),
    Rule(name="attention-causal", text="a mask, and no is_causal, over a cache", check=_causal),
    Rule(name="attention-mask", text="bool masks of four axes", check=_mask_type),
    Rule(name="shared-mask", text="one mask for all layers of a kind", check=_shared_masks),
    Rule(
        name="attention-kernel", text="half precision, heads up to 256, no static decode of long caches", check=_kernel
    ),
)
