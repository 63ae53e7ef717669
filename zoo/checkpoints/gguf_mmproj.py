"""An encoder of images in a GGUF file of its own, which llama.cpp calls mmproj, beside that of its text decoder.

What its metadata and tensors are to a family stands in that model's file. Every key under "clip." and every tensor is
read, or refused by its name; an encoder of sound is left out.
"""

from __future__ import annotations

import dataclasses
import functools

from transom.errors import CheckpointError, ConfigError
from transom.wording import listed
from transom.zoo.architecture import Architecture, MmprojFormat
from transom.zoo.architectures import architecture, architectures, tensor_shapes
from transom.zoo.checkpoints.checkpoint import Checkpoint, left_out_line
from transom.zoo.checkpoints.gguf import open_gguf, open_weights
from transom.zoo.checkpoints.gguf_config import judge, read_metadata
from transom.zoo.checkpoints.gguf_header import Header
from transom.zoo.checkpoints.gguf_metadata import Metadata, shown
from transom.zoo.checkpoints.gguf_weight import gguf_package
from transom.zoo.config import DecoderConfig, read_decoder

_ARCHITECTURE = "clip"
_PROJECTORS = ("projector_type", "vision.projector_type")
"""Keys of the projector's type; the second is that of files with an encoder of sound."""

_SOUND_KEYS, _SOUND_TENSORS = "audio.", ("a.", "mm.a.")


def read_mmproj(header: Header, text: Header) -> tuple[DecoderConfig, tuple[str, ...]]:
    """The configuration of both files, and in plain words what in the encoder's metadata it does not reflect.

    Args:
        header: Of the encoder's file.
        text: Of the text decoder's.

    Raises:
        ConfigError: If the metadata of a file are incomplete or describe a model that the zoo does not hold, or the
            files do not belong together.
        CheckpointError: If the text decoder's embedding is missing or contradicts its metadata.
    """
    decoder, _ = read_metadata(text)
    kind = header.metadata.get("general.architecture")
    # Arrays are compared by element, so that a kind must be a string first.
    if not isinstance(kind, str) or kind != _ARCHITECTURE:
        raise ConfigError(
            f"{header.path}: general.architecture is {shown(kind)}, expected {_ARCHITECTURE!r}: give the mmproj file, "
            "which holds the encoder of images"
        )
    keys = Metadata(header, _ARCHITECTURE)
    family, form = _family(keys, text, decoder)
    keys.only("has_vision_encoder", (True,), required=True)
    keys.only("has_text_encoder", (False,))
    keys.only("has_llava_projector", (False, True))
    keys.only("has_audio_encoder", (False, True))
    tokens = text.metadata.get("tokenizer.ggml.tokens")
    fields = {field.name: getattr(decoder, field.name) for field in dataclasses.fields(decoder)}
    fields |= {"architecture": family.name}
    fields |= form.read(header, keys, decoder, tokens if isinstance(tokens, list) else [])
    config = read_decoder(header.path, family.config, **fields)
    sound = sorted(key for key in keys.unread if key.startswith(_SOUND_KEYS))
    return config, tuple(judge(header, keys, sound, sorted(keys.unread - set(sound))))


def open_mmproj(header: Header, text: Header) -> tuple[DecoderConfig, Checkpoint]:
    """The model of both files; see `gguf.open_gguf`.

    Raises:
        ConfigError: As `read_mmproj` does.
        CheckpointError: If a tensor is missing, has the wrong shape or a type that we do not read, or has no known use,
            or the `gguf` package is not installed.
    """
    config, lines = read_mmproj(header, text)
    _, checkpoint = open_gguf(text)
    form = architecture(config.architecture).mmproj
    assert form is not None
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if name not in checkpoint.weights}
    names = {name: (in_file,) for name, in_file in form.tensors(config, header).items()}
    weights = open_weights(gguf_package(), header, names, shapes, functools.partial(form.rows, config))
    others = header.tensors.keys() - {names[name][0] for name in shapes}
    sound = [name for name in header.tensors if name in others and name.startswith(_SOUND_TENSORS)]
    if unknown := sorted(others - set(sound)):
        raise CheckpointError(
            f"{header.path}: {len(unknown)} tensors have no place in the model: {listed(unknown)}: "
            "they may change its numbers, choose another model"
        )
    if sound:
        lines = (left_out_line("an encoder of sound", sound), *lines)
    return config, dataclasses.replace(
        checkpoint, weights={**checkpoint.weights, **weights}, left_out=(*checkpoint.left_out, *lines)
    )


def _family(keys: Metadata, text: Header, decoder: DecoderConfig) -> tuple[Architecture, MmprojFormat]:
    key, *others = [key for key in _PROJECTORS if key in keys] or _PROJECTORS[:1]
    projector = keys.string(key, "")
    for other in others:
        if keys.string(other, "") != projector:
            raise keys.refuse(other, f"but {keys.prefix}{key} is {projector!r}: they must agree, convert it again")
    families = {family.mmproj.projector: family for family in architectures() if family.mmproj is not None}
    if projector not in families:
        raise keys.refuse(key, f"known are {', '.join(families)}: choose another model")
    family = families[projector]
    if family.text != decoder.architecture:
        raise ConfigError(
            f"{keys.path}: its encoder is one for {family.text}, but {text.path} is of the family "
            f"{decoder.architecture}: give files of one model"
        )
    assert family.mmproj is not None
    return family, family.mmproj
