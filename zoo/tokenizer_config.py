"""What stands beside a tokenizer's vocabulary: its special tokens by role, and the template of conversations.

Hugging Face keeps it in `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` (earlier
`chat_template.json`), GGUF in its metadata. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transom.errors import TokenizerError
from transom.json_object import is_file, read_object

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"

_OLDER_TEMPLATE, _TOKENS = "chat_template.json", "special_tokens_map.json"
# Roles that templates may name, and their keys in GGUF.
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_GGUF = "tokenizer.ggml."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer's companions.

    Attributes:
        tokens: Role, such as "bos_token", -> the token's text.
        adds_bos: Whether every text begins with the beginning-of-sequence token; None if the source does not say.
        template: Jinja source of the chat template; None if the source has none.
        left_out: In plain words, what is not applied.
    """

    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adds_bos: bool | None = None
    template: str | None = None
    left_out: tuple[str, ...] = ()

    @staticmethod
    def from_folder(folder: Path) -> TokenizerConfig:
        """Read a folder's files; each may be missing.

        Raises:
            TokenizerError: If one is malformed, or a template is no text.
        """
        config, older = _read(folder / CONFIG), _read(folder / _TOKENS)
        tokens = {}
        for role in _ROLES:
            value = config.get(role)
            value = older.get(role) if value is None else value
            # A token with options is an object, whose content is its text.
            text = value.get("content") if isinstance(value, dict) else value
            if text is not None and not isinstance(text, str):
                where = folder / (_TOKENS if config.get(role) is None else CONFIG)
                raise TokenizerError(f"{where}: {role} is {value!r}, expected the token's text: fetch it again")
            if text is not None:
                tokens[role] = text
        left_out = []
        if config.get("add_eos_token"):
            left_out.append(f"{CONFIG}: add_eos_token is not applied: a prompt is there to be continued")
        template, others = _template(folder, config)
        if others:
            left_out.append(f"{CONFIG}: of the chat templates, {', '.join(others)} are not kept, only the default")
        return TokenizerConfig(
            tokens=tokens,
            adds_bos=_flag(f"{folder / CONFIG}: add_bos_token", config.get("add_bos_token"), default=None),
            template=template,
            left_out=tuple(left_out),
        )

    @staticmethod
    def from_gguf(path: Path, metadata: Mapping[str, object], pieces: Sequence[str]) -> TokenizerConfig:
        """Read the metadata of a GGUF file.

        Args:
            path: The file, for errors.
            metadata: Its metadata. Ids that are none are passed over: `gguf_tokenizer.read_tables` checks those that
                bear on texts.
            pieces: Text of every token, by id.

        Raises:
            TokenizerError: If a value is of the wrong type.
        """
        tokens = {}
        for role, key in _ROLES.items():
            token = metadata.get(_GGUF + key)
            # 4294967295 means that there is no such token.
            if type(token) is int and 0 <= token < len(pieces):
                tokens[role] = pieces[token]
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise TokenizerError(f"{path}: tokenizer.chat_template is no text: convert the model again")
        eos = _flag(f"{path}: {_GGUF}add_eos_token", metadata.get(_GGUF + "add_eos_token"), default=False)
        return TokenizerConfig(
            tokens=tokens,
            adds_bos=_flag(f"{path}: {_GGUF}add_bos_token", metadata.get(_GGUF + "add_bos_token"), default=None),
            template=template,
            left_out=(f"{_GGUF}add_eos_token is not applied: a prompt is there to be continued",) if eos else (),
        )

    def save(self, folder: Path) -> None:
        """Write the files that `from_folder` and Hugging Face's libraries read."""
        config: dict[str, Any] = {**self.tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
        if self.adds_bos is not None:
            config["add_bos_token"] = self.adds_bos
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if self.template is not None:
            (folder / TEMPLATE).write_text(self.template, encoding="utf-8", newline="")


def _template(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The default chat template, and the names of others that stand beside it."""
    path = folder / TEMPLATE
    if is_file(path, TokenizerError):
        try:
            # Line ends are part of a template.
            return path.read_bytes().decode("utf-8-sig"), []
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read the chat template {path}: {error}: fetch it again") from error
    where, value = folder / CONFIG, config.get("chat_template")
    if value is None:
        where = folder / _OLDER_TEMPLATE
        value = _read(where).get("chat_template")
    if value is None or isinstance(value, str):
        return value, []
    try:
        named = {entry["name"]: entry["template"] for entry in value}
        template = named.pop("default")
    except (TypeError, KeyError):
        template, named = None, {}
    if not isinstance(template, str):
        raise TokenizerError(
            f"{where}: chat_template is neither text nor a list of named ones with a 'default': fetch it again"
        )
    return template, sorted(map(str, named))


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, TokenizerError) or {}


def _flag(what: str, value: object, *, default: bool | None) -> bool | None:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TokenizerError(f"{what} is {value!r}, expected true or false")
    return value
