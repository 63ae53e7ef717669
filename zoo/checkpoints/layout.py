"""Which tensor of a checkpoint is which: every name is accounted for, or refused.

A tensor is read; or is a copy of one that is read; or is redundant, such as a bias of zeros; or belongs to a part that
is left out, such as a vision tower. Nothing is passed over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from transom.errors import CheckpointError
from transom.wording import listed
from transom.zoo.checkpoints.containers import MERGE

TABLE, HEAD = "embed_tokens.weight", "lm_head.weight"
"""What modules call the table of tokens, and the head where it is a weight of its own."""

# The text part's prefix: text-only checkpoints, the first multimodal ones, those since transformers 4.52, multimodal
# ones saved without the head, a bare trunk.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing put into names.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
# First parts of names, a leading "model." aside -> what they belong to.
_OTHER_PARTS = {
    "vision_tower": "the vision tower",
    "vision_model": "the vision tower",
    "multi_modal_projector": "the projector of images",
    "embed_vision": "the projector of images",
    "audio_tower": "the audio tower",
    "embed_audio": "the projector of sounds",
    "vision_embedder": "the embedding of images",
    "mtp": "a part that predicts tokens further ahead",
}
UNREAD = "what no layer reads"
_ADAPTED = re.compile(r"(^|\.)(lora_\w+|base_layer|base_model|modules_to_save|ia3_\w+|oft_\w+|hada_\w+)(\.|$)")
_PACKED = re.compile(
    r"\.(weight_packed|weight_scale(_inv|_2)?|weight_zero_point|weight_g_idx|qweight|qzeros|scales|biases|g_idx|absmax"
    r"|quant_map|quant_state\..*|nested_\w+|SCB|input_scale|\w*_blocks|\w*_scales)$"
)
_LAYER = re.compile(r"layers\.(\d+)\.")
_ROTARY = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb(_local)?\.\w*inv_freq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Roles of a checkpoint's tensors, by their names in the files.

    Attributes:
        sources: The module's name -> the tensor that is read.
        copies: The module's name -> tensors that must equal it.
        redundant: Tensor -> its name in the module's terms, of those whose values the configuration determines: biases
            that must be zero, and buffers.
        parts: What is left out -> its tensors.
    """

    sources: Mapping[str, str]
    copies: Mapping[str, tuple[str, ...]]
    redundant: Mapping[str, str]
    parts: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(
        folder: Path,
        names: Iterable[str],
        wanted: Mapping[str, Any],
        renames: Mapping[str, str] | None = None,
        unread: Callable[[str], bool] = lambda name: False,
    ) -> Layout:
        """Give every tensor its role.

        Args:
            folder: The checkpoint, for errors.
            names: Tensors, as the files call them.
            wanted: Names of the module's state dict.
            renames: What the family calls otherwise; see `HuggingFaceFormat`.
            unread: Whether the family's checkpoints hold tensors of a name, in the module's terms, that its models have
                no use for.

        Raises:
            CheckpointError: If a tensor is missing, or one has no role.
        """
        files = _without_wrappers(folder, names, renames or {})
        _refuse_foreign(folder, files)
        heads = [name for name in _HEADS if name in files]
        prefix = _prefix(folder, files, heads)
        sources = {name: files[prefix + name] for name in wanted if prefix + name in files}
        parts_wanted = {_part(name) for name in wanted} - {None}
        for name in files:
            if _part(name) in parts_wanted and (inner := _in_part(name)) in wanted:
                if inner in sources:
                    raise CheckpointError(f"{folder}: {sources[inner]} and {files[name]} are one tensor: remove one")
                sources[inner] = files[name]
        copies: dict[str, tuple[str, ...]] = {}
        if HEAD in wanted and heads:
            sources[HEAD] = files[heads.pop(0)]
            if heads:
                copies[HEAD] = tuple(files[head] for head in heads)
                heads = []
        if TABLE not in sources and heads:
            sources[TABLE] = files[heads.pop(0)]
        if heads:
            copies[TABLE] = tuple(files[head] for head in heads)
        if missing := [name for name in wanted if name not in sources]:
            _refuse_missing(folder, prefix, missing, files, len(wanted))
        redundant: dict[str, str] = {}
        parts: dict[str, list[str]] = {}
        unknown = []
        used = {*sources.values(), *(name for group in copies.values() for name in group)}
        for name, in_file in files.items():
            if in_file in used:
                continue
            inner = name.removeprefix(prefix)
            if (part := _part(name)) is not None and part not in parts_wanted:
                parts.setdefault(part, []).append(in_file)
            elif name.startswith(prefix) and unread(inner):
                parts.setdefault(UNREAD, []).append(in_file)
            elif name.startswith(prefix) and _is_redundant(inner, wanted):
                redundant[in_file] = inner
            else:
                unknown.append(in_file)
        if unknown:
            _refuse_unknown(folder, unknown, wanted)
        return Layout(
            sources={name: sources[name] for name in wanted},
            copies=copies,
            redundant=redundant,
            parts={part: tuple(group) for part, group in parts.items()},
        )


def in_file(name: str, *, images: bool = False, renames: Mapping[str, str] | None = None) -> str:
    """What a checkpoint calls a tensor of the module.

    Args:
        name: In the module.
        images: Whether its model sees them.
        renames: What the family calls otherwise; see `HuggingFaceFormat`.
    """
    if _part(name) is not None:
        return "model." + name.replace("vision_tower.", "vision_tower.vision_model.")
    whole = name if name == HEAD else ("model.language_model." if images else _PREFIXES[0]) + name
    return _renamed(whole, {ours: theirs for theirs, ours in (renames or {}).items()})


def _renamed(name: str, heads: Mapping[str, str]) -> str:
    """A name with another head, if it has one of these."""
    old = next((head for head in heads if name.startswith(head)), None)
    return name if old is None else heads[old] + name.removeprefix(old)


def in_class(name: str) -> str:
    """What transformers, from version 5 on, calls a tensor of the module in its class of models that see images."""
    return f"model.{name}" if _part(name) is not None else in_file(name, images=True)


def own_names(name: str) -> tuple[str, ...]:
    """What modules may call a tensor that has a name in a class of transformers, of any generation."""
    if _part(name) is not None:
        return (_in_part(name),)
    return tuple(dict.fromkeys(name.removeprefix(prefix) for prefix in _PREFIXES))


def holds_encoder(names: Iterable[str]) -> bool:
    """Whether tensors of an encoder of images are among those of a checkpoint."""
    return any(_part(name) == _OTHER_PARTS["vision_tower"] for name in names)


def _part(name: str) -> str | None:
    """The part beside the language model that a tensor belongs to, in words; None if it is of the language model."""
    return _OTHER_PARTS.get(name.removeprefix("model.").split(".")[0])


def _in_part(name: str) -> str:
    """What modules call a tensor of such a part: files of three generations differ in what stands before it."""
    return name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")


def _without_wrappers(folder: Path, names: Iterable[str], renames: Mapping[str, str]) -> dict[str, str]:
    """Name without the parts that wrappers of modules add, as most families call it -> name in the files."""
    files: dict[str, str] = {}
    for in_file in names:
        name = _renamed(".".join(part for part in in_file.split(".") if part not in _WRAPPERS), renames)
        if name in files:
            raise CheckpointError(f"{folder}: {files[name]} and {in_file} are one tensor's names: remove one")
        files[name] = in_file
    return files


def _refuse_foreign(folder: Path, files: Mapping[str, str]) -> None:
    if adapted := [in_file for name, in_file in files.items() if _ADAPTED.search(name)]:
        raise CheckpointError(f"{folder}: its tensors are those of an adapter ({listed(adapted, 2)}): {MERGE}")
    if packed := [in_file for name, in_file in files.items() if _PACKED.search(name)]:
        raise CheckpointError(
            f"{folder}: its weights were packed by a quantiser ({listed(packed, 2)}): give the checkpoint that is not "
            "quantised, or dequantise it first"
        )


def _prefix(folder: Path, files: Mapping[str, str], heads: list[str]) -> str:
    tables = [name for name in files if name.endswith(TABLE)]
    if len(tables) > 1:
        raise CheckpointError(
            f"{folder}: has {len(tables)} tables of tokens, {listed(tables)}: keep one language model"
        )
    # A tied model may be saved with its head alone.
    anchors = tables or [name for name in files if name.endswith("layers.0.input_layernorm.weight")]
    prefixes = [name[: name.rindex(TABLE if tables else "layers.0.")] for name in anchors]
    if len(prefixes) == 1 and prefixes[0] in _PREFIXES:
        return prefixes[0]
    if prefixes:
        known = ", ".join(repr(prefix) for prefix in _PREFIXES if prefix)
        raise CheckpointError(
            f"{folder}: its tensors' names begin with {prefixes[0]!r}, expected {known} or nothing before "
            f"{TABLE!r}: rename them"
        )
    return _PREFIXES[0]


def _is_redundant(name: str, wanted: Mapping[str, Any]) -> bool:
    stem, _, last = name.rpartition(".")
    if last == "bias":
        return f"{stem}.weight" in wanted
    if match := _LAYER.match(name):
        return _ROTARY.fullmatch(name) is not None and f"{match[0]}input_layernorm.weight" in wanted
    return name == "embed_tokens.embed_scale" or _ROTARY.fullmatch(name) is not None


def _refuse_missing(folder: Path, prefix: str, missing: list[str], files: Mapping[str, str], wanted: int) -> NoReturn:
    layers = {int(match[1]) for name in files if (match := _LAYER.match(name.removeprefix(prefix)))}
    lacking = {int(match[1]) for name in missing if (match := _LAYER.match(name))}
    if layers and lacking and min(lacking) == max(layers) + 1:
        advice = f"the checkpoint holds {max(layers) + 1} layers and config.json says {max(lacking) + 1}"
    elif not files:
        advice = "it holds no tensors: fetch it again"
    elif len(missing) == wanted:
        advice = f"its tensors are called {listed(list(files.values()), 3)}: config.json belongs to another model"
    else:
        advice = "the checkpoint is incomplete, or config.json belongs to another one"
    names = listed([prefix + name for name in missing])
    raise CheckpointError(f"{folder}: {len(missing)} of {wanted} tensors are missing: {names}: {advice}")


def _refuse_unknown(folder: Path, unknown: list[str], wanted: Mapping[str, Any]) -> NoReturn:
    layers = 1 + max((int(match[1]) for name in wanted if (match := _LAYER.match(name))), default=-1)
    beyond = [name for name in unknown if (match := _LAYER.search(name)) and int(match[1]) >= layers]
    if beyond:
        reason = f"config.json says that there are {layers} layers"
    elif any(re.search(r"(^|\.)(score|classifier|classification_head|v_head|value_head)\.", name) for name in unknown):
        reason = "a head of another task; only language models are supported"
    else:
        reason = "the model has no such part, and leaving it out could change its numbers"
    raise CheckpointError(
        f"{folder}: {len(unknown)} tensors are not part of the model: {listed(beyond or unknown)}: {reason}"
    )
