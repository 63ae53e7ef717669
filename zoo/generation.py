"""How a source says that its model writes: which tokens end a text, and how the next one is drawn. Needs no torch.

Hugging Face keeps it in `generation_config.json`, and tokens that end a text in `config.json` and the tokenizer's
files too; GGUF in its metadata. A source that says nothing of sampling is sampled as the
makers of its family do; see `Architecture.sampling`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transom.errors import ConfigError
from transom.json_object import read_object
from transom.wording import shortened

GENERATION = "generation_config.json"

GREEDY = {"do_sample": False}
"""Always the likeliest token: how transformers generates where nothing says otherwise."""

# transformers' defaults for what a generation_config.json leaves out or sets to null.
_DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}
_GGUF_NOT_APPLIED = (
    "tokenizer.ggml.suppress_tokens",
    "general.sampling.sequence",
    "general.sampling.penalty_repeat",
    "general.sampling.xtc_probability",
    "general.sampling.mirostat",
)
_GGUF_KEYS = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
# Settings that change a text and that no session applies, with the values that change nothing.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "watermarking_config": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How text is generated.

    Attributes:
        stop_ids: Tokens of which each ends a text, in order.
        sampling: "do_sample" and, where that is true, "temperature", "top_k", "top_p" and perhaps "min_p".
        left_out: In plain words, settings of the source that are not applied.
    """

    stop_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(GREEDY))
    left_out: tuple[str, ...] = ()

    @staticmethod
    def from_folder(folder: Path, sampling: Mapping[str, Any]) -> Generation:
        """Read a checkpoint's folder.

        Args:
            folder: Of the checkpoint.
            sampling: For one that does not say how to sample.

        Raises:
            ConfigError: If a file is malformed, or a value cannot be what it is for.
        """
        stops: set[int] = set()
        config, generation = read_object(folder / "config.json"), read_object(folder / GENERATION)
        text = (config or {}).get("text_config")
        for path, values in (
            (folder / "config.json", config),
            (folder / "config.json", text if isinstance(text, dict) else None),
            (folder / GENERATION, generation),
        ):
            stops.update(_token_ids(f"{path}: eos_token_id", (values or {}).get("eos_token_id")))
        if generation is None:
            return Generation(stop_ids=tuple(sorted(stops)), sampling=sampling)
        return Generation(
            stop_ids=tuple(sorted(stops)),
            sampling=_sampling(folder / GENERATION, generation),
            left_out=tuple(
                f"{GENERATION}: {key} = {generation[key]!r} is not applied"
                for key, neutral in _NOT_APPLIED.items()
                if generation.get(key) is not None and generation[key] not in neutral
            ),
        )

    @staticmethod
    def from_gguf(path: Path, metadata: Mapping[str, object], sampling: Mapping[str, Any]) -> Generation:
        """Read the metadata of a GGUF file.

        Args:
            path: Of the file.
            metadata: Of the file.
            sampling: For what the file does not say.

        Raises:
            ConfigError: If a value cannot be what it is for.
        """
        stops: set[int] = set()
        for role in ("eos", "eot", "eom"):
            key = f"tokenizer.ggml.{role}_token_id"
            stops.update(_token_ids(f"{path}: {key}", metadata.get(key)))
        own = {
            name: value
            for name, key in _GGUF_KEYS.items()
            if (value := metadata.get(f"general.sampling.{key}")) is not None
        }
        return Generation(
            stop_ids=tuple(sorted(stops)),
            sampling=_sampling(path, {**sampling, **own}),
            left_out=tuple(f"{key} is not applied" for key in _GGUF_NOT_APPLIED if key in metadata),
        )

    def to_json(self, bos_id: int | None) -> dict[str, Any]:
        """What an artifact's `generation_config.json` holds."""
        tokens = {"bos_token_id": bos_id, "eos_token_id": list(self.stop_ids)}
        return {**self.sampling, **{key: value for key, value in tokens.items() if value not in (None, [])}}


def read_sampling(folder: Path) -> Mapping[str, Any]:
    """Sampling as an artifact's `generation_config.json` says; none if there is no such file.

    Raises:
        ConfigError: If the file is malformed, or a value cannot be what it is for.
    """
    values = read_object(folder / GENERATION)
    return GREEDY if values is None else _sampling(folder / GENERATION, values)


def _token_ids(what: str, value: object) -> list[int]:
    """Token ids of a value that is one of them, a list, or null."""
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise ConfigError(f"{what} is {value!r}, expected a token id or a list of them")
    return ids


# What each setting may be.
_VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _is_number(value) and 0 <= value <= sys.float_info.max, "a number from 0 on"),
    "top_k": (lambda value: type(value) is int and 0 <= value < 2**31, "a whole number from 0 to 2**31"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and up to 1"),
    "min_p": (lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "a number from 0 to 1"),
}


def _sampling(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of sampling, those that are missing or null by transformers' defaults."""
    settings = {name: default if values.get(name) is None else values[name] for name, default in _DEFAULTS.items()}
    for name, value in settings.items():
        valid, expected = _VALID[name]
        if not valid(value):
            raise ConfigError(f"{path}: {name} is {shortened(repr(value))}, expected {expected}: mend it")
    if not settings["do_sample"]:
        return {"do_sample": False}
    return {name: value for name, value in settings.items() if value is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
