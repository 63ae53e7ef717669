"""`Architecture`: all that the rest of the project reads of a family of models, one record per model file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from transom.zoo.checkpoints.stacked import Stacked
from transom.zoo.config import DecoderConfig
from transom.zoo.layers import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A configuration that goes by a name.

    Attributes:
        config: With that name.
        hub: Where its weights are published, a hub id; None for a model that was never trained, whose weights are
            always random.
        packaged: Puts the weights of a package into a GGUF file and returns its path; None if no package holds them.
    """

    config: DecoderConfig
    hub: str | None = None
    packaged: Callable[[], Path] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceFormat:
    """What a family's `config.json` and tensors look like.

    Attributes:
        model_types: Values of `model_type` -> key of the object that describes the text decoder; None where the whole
            config does.
        classes: Values that `architectures` may list.
        sizes: Keys of whole numbers -> class defaults.
        supported: Keys with one value that the model file computes, first in the list -> all values that mean it.
        not_applied: Keys that transformers stores and never applies.
        not_applied_inside: The same, where the decoder is described by an inner object.
        keys: Other keys that `read` reads.
        ignored: Keys that bear on no number, beside those that every family has.
        packed: Ways to pack weights, by the `quant_method` of `quantization_config`, that are read as they are.
        stacked: A configuration and the name of a weight in the module -> how files hold it, if they hold it by expert.
        read: Keys that describe the text decoder, and the whole config's, which may be the same -> fields of the
            configuration, less its name.
        write: A configuration -> a `config.json` that `read` and transformers read alike.
        buffer: A configuration and the name of a buffer that checkpoints may hold, in the module's terms -> what it
            must hold, float64; None for a name that is none.
        renames: Heads of tensors' names in checkpoints -> what most families call them; the first that fits counts.
        unread: A configuration and the name of a tensor, in the module's terms -> whether checkpoints may hold it
            although the model has no use for it.
    """

    model_types: Mapping[str, str | None]
    classes: tuple[str, ...]
    sizes: Mapping[str, int]
    supported: Mapping[str, tuple[Any, ...]]
    not_applied: tuple[str, ...] = ()
    not_applied_inside: tuple[str, ...] = ()
    keys: frozenset[str]
    ignored: frozenset[str] = frozenset()
    packed: tuple[str, ...] = ()
    stacked: Callable[[Any, str], Stacked | None] = lambda config, name: None
    read: Callable[[Any, Any], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    buffer: Callable[[Any, str], torch.Tensor | None]
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unread: Callable[[Any, str], bool] = lambda config, name: False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFormat:
    """What a family's GGUF files look like.

    Attributes:
        name: `general.architecture`, which is also the prefix of its keys.
        neutral: Keys of computations that the family does not have, beside those that no family has, and the values
            that say so.
        read: Sizes and keys -> fields of the configuration beside the sizes; see `gguf_config`.
        tensors: Names in the module -> in the file; `layers.N.` is left out of the first, `blk.N.` of the second, and
            `N.` alone where a layer's part is called what another one of the module is. What files hold as two tensors
            on an axis of experts, gates and ups, has two names; what they hold as one tensor, one below the other in
            the module's order, shares a name. A layer's part that files count to no layer goes by its whole name here.
        apart: The same, of what some files hold as two tensors, and others as the one that `tensors` says.
        rows: A configuration and a name in the module -> what becomes of the stored rows; None if nothing.
        frequencies: The file may hold `rope_freqs.weight`, which `read` understands.
        uneven: Keys of sizes that may differ from layer to layer; `read` reads them. The first layer's stand in what it
            is given.
        heads: Keys -> the sizes of heads that do not attend, and the width of all of them, as `Sizes` calls them; None
            where heads go by the keys of attention.
        shapes: A configuration and a name in the module -> the shape in the file, of as many numbers in the same order;
            None if it is the module's.
    """

    name: str
    neutral: Mapping[str, tuple[Any, ...]]
    read: Callable[..., dict[str, Any]]
    tensors: Mapping[str, str | tuple[str, str]]
    rows: Callable[[Any, str], Callable[[Any], Any] | None]
    apart: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    frequencies: bool = False
    uneven: tuple[str, ...] = ()
    heads: Callable[[Any], dict[str, int]] | None = None
    shapes: Callable[[Any, str], tuple[int, ...] | None] = lambda config, name: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmprojFormat:
    """What a family's mmproj files look like: GGUF files of the encoder of images, beside one of the text decoder.

    Attributes:
        projector: `clip.projector_type`.
        read: The file's header and keys, the text decoder's configuration and its tokens -> fields of the configuration
            beside the text decoder's.
        tensors: A configuration and the file's header -> names in the module -> in the file.
        rows: As in `GGUFFormat`.
    """

    projector: str
    read: Callable[..., dict[str, Any]]
    tensors: Callable[..., Mapping[str, str]]
    rows: Callable[[Any, str], Callable[[Any], Any] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of models.

    Attributes:
        name: Of its file, and what configurations call it.
        config: Class of its configurations.
        build: A configuration -> the module.
        huggingface: Its checkpoints' format.
        gguf: Its GGUF files' format; None if they are not read.
        presets: Configurations that go by a name.
        sampling: How text is sampled where the checkpoint does not say.
        chat: Chat template, in Jinja, of checkpoints that bring none; None if the family has no form of its own.
        text: Family of its text decoder, which the same checkpoints hold; None if it is a text decoder itself.
        mmproj: Format of what stands beside a GGUF file of its text decoder; None if nothing does.
        image_parts: What makes soft tokens of images, part by part -> the head of its parameters' names.
        with_windows: A configuration and a window for each layer, or None for a global one -> a configuration that has
            them, of the same tensors; None if the windows of its layers depend on each other.
    """

    name: str
    config: type[DecoderConfig]
    build: Callable[[Any], Decoder]
    huggingface: HuggingFaceFormat
    gguf: GGUFFormat | None = None
    presets: tuple[Preset, ...]
    sampling: Mapping[str, Any]
    chat: str | None = None
    text: str | None = None
    mmproj: MmprojFormat | None = None
    image_parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    with_windows: Callable[[Any, tuple[int | None, ...]], DecoderConfig] | None = None
