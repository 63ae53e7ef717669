"""Text to token ids and back. Needs no torch: artifacts are run with this file.

Two kinds are known. SentencePiece's is byte-pair encoding over characters, in which a space is written U+2581, and a
character without a piece becomes its UTF-8 bytes; of this kind only Gemma's is. The other is byte-level; see
`byte_level`. Encoding is the `tokenizers` library's; decoding is ours, byte by byte, so that a text that is streamed
and a text that is decoded at once cannot differ.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from transom.errors import TokenizerError
from transom.json_object import is_file
from transom.wording import listed
from transom.zoo import byte_level
from transom.zoo.byte_level import BYTES, missing_bytes, split_merges
from transom.zoo.chat import Message, compile_template, render_template
from transom.zoo.checkpoints.gguf_header import Header, header_of
from transom.zoo.checkpoints.gguf_tokenizer import read_tables
from transom.zoo.checkpoints.sentencepiece import added_tokens, sentencepiece_tables
from transom.zoo.text import check_text
from transom.zoo.tokenizer_config import CONFIG, TokenizerConfig

# Kinds of pieces, as SentencePiece and GGUF number them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

TOKENIZER = "tokenizer.json"

_SPACE = "\u2581"
_PROBE = "hello  world\n\u00e9 \u65e5"
"""Words, runs of spaces, and characters that few vocabularies hold whole."""

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_BOS, _EOS, _UNK, _END_OF_TURN = "<bos>", "<eos>", "<unk>", "<end_of_turn>"
# Some published files call these ordinary text, which would make a chat unreadable to the model.
_ALWAYS_CONTROL = {"<pad>", _EOS, _BOS, _UNK, "<start_of_turn>", _END_OF_TURN}
_ENDS = (_EOS, _END_OF_TURN, "<turn|>", "<|eot_id|>", "<|im_end|>")
"""Tokens that end a text or a turn in every vocabulary that has them, whatever its files call the end."""


class Tokenizer:
    """A tokenizer of either kind.

    Attributes:
        bos_id: Goes in front of every text, unless the config says that none does; None if there is none.
        eos_id: Ends a text, by the config's name; None if there is none.
        stop_ids: Any of them ends a generated text: end of sequence by the config's name, and what usually ends a
            sequence or a turn.
        config: What stands beside the vocabulary, such as the chat template.
        left_out: In plain words, what of it is not applied.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig | None = None) -> None:
        """Wrap a tokenizer of the `tokenizers` library.

        Raises:
            TokenizerError: If it lacks the token that begins a text, or is of SentencePiece's kind and lacks <eos>.
        """
        # What a library saved for its own batches would cut or fill up every prompt.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.config = config or TokenizerConfig()
        self._byte_level = "ByteLevel" in str(backend.decoder)
        bos_name = self.config.tokens.get("bos_token", None if self._byte_level else _BOS)
        eos_name = self.config.tokens.get("eos_token", _EOS)
        self.bos_id: int | None = None if bos_name is None else backend.token_to_id(bos_name)
        self.eos_id: int | None = backend.token_to_id(eos_name)
        ends = {token for name in (eos_name, *_ENDS) if (token := backend.token_to_id(name)) is not None}
        if bos_name is not None and self.bos_id is None:
            raise TokenizerError(f"the tokenizer has no {bos_name}, which begins a text")
        if not self._byte_level and backend.token_to_id(_EOS) is None:
            raise TokenizerError(f"the tokenizer has no {_EOS}: it is not Gemma's")
        self.stop_ids: tuple[int, ...] = tuple(sorted(ends))
        self.left_out = self.config.left_out
        if "eos_token" in self.config.tokens and backend.token_to_id(eos_name) is None:
            self.left_out += (f"the tokenizer has no {eos_name}, which its config calls the end of a text",)
        if self._byte_level and (missing := missing_bytes(backend.get_vocab())):
            self.left_out += (
                f"the vocabulary lacks the bytes {listed(missing)}: characters with them are passed over",
            )
        self.config = dataclasses.replace(self.config, adds_bos=self._adds_bos())
        self._added = backend.get_added_tokens_decoder()
        self._silent = {id for id, token in self._added.items() if token.special}

    def _adds_bos(self) -> bool:
        """Whether texts begin with `bos_id`: as transformers, which goes by tokenizer.json if that says anything.

        Only its classes of SentencePiece's kind go by the config first, and add the token if nothing says anything.
        """
        flag = self.config.adds_bos
        if self._backend.post_processor is None or not (self._byte_level or flag is None):
            return flag if flag is not None else self.bos_id is not None and not self._byte_level
        encoding = self._backend.encode("a", add_special_tokens=True)
        own = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        first, last = (encoding.ids[: own[0]], encoding.tokens[own[-1] + 1 :]) if own else ([], [])
        if first not in ([], [self.bos_id]):
            names = " ".join(encoding.tokens[: len(first)])
            bos = self.config.tokens.get("bos_token", "none")
            raise TokenizerError(f"the tokenizer begins texts with {names}, and the bos_token of its config is {bos}")
        self.left_out += tuple(f"{token} is not put behind a text: a prompt is there to be continued" for token in last)
        return bool(first)

    @staticmethod
    def from_folder(folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, or else SentencePiece's `tokenizer.model`.

        Raises:
            TokenizerError: If neither is there, or it is malformed.
        """
        path = folder / TOKENIZER
        if is_file(path, TokenizerError):
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            # The library raises plain Exception.
            except Exception as error:
                raise TokenizerError(f"{path}: malformed ({error}): fetch it again") from error
            tokenizer = _in_folder(backend, folder)
            if tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
                raise TokenizerError(
                    f"{path}: a text does not come back from its ids: only byte-pair encoding with SentencePiece's "
                    "spaces and bytes, or over bytes as GPT-2's, is supported, so choose another model"
                )
            return tokenizer
        path = folder / "tokenizer.model"
        if not is_file(path, TokenizerError):
            raise TokenizerError(f"{folder}: has neither tokenizer.json nor tokenizer.model: copy one into it")
        try:
            backend = _build(*sentencepiece_tables(path.read_bytes()))
        except (ValueError, IndexError, struct.error) as error:
            raise TokenizerError(f"{path}: not a SentencePiece model ({error}): fetch it again") from error
        for token, id, special in added_tokens(folder):
            _add(backend, token, id, special, folder)
        return _in_folder(backend, folder)

    @staticmethod
    def from_gguf(source: Path | Header) -> Tokenizer:
        """Build the tokenizer from the tables of a GGUF file, or of the set that the file is part of.

        Args:
            source: The file, or what `read_header` made of it.

        Raises:
            CheckpointError: If the file is damaged.
            TokenizerError: If it holds no tokenizer of a kind that we know.
        """
        header = header_of(source)
        tables = read_tables(header)
        config = TokenizerConfig.from_gguf(header.path, header.metadata, tables.pieces)
        try:
            if tables.words is None:
                return Tokenizer(_build(tables.pieces, tables.scores, tables.kinds, tables.merges), config)
            special, own = (
                [piece for piece, kind in zip(tables.pieces, tables.kinds, strict=True) if kind in kinds]
                for kinds in ((_CONTROL, _UNKNOWN), (_USER_DEFINED,))
            )
            backend = byte_level.build(tables.pieces, tables.merges or [], tables.words, special=special, own=own)
            # llama.cpp's own default for this way to cut.
            adds = config.adds_bos if config.adds_bos is not None else tables.words in byte_level.BEGUN
            return Tokenizer(backend, dataclasses.replace(config, adds_bos=adds and "bos_token" in config.tokens))
        except TokenizerError as error:
            raise TokenizerError(f"{header.path}: {error}") from error

    @staticmethod
    def of_bytes(vocab_size: int) -> Tokenizer:
        """A tokenizer without merges, for models with random weights: 256 bytes, the space and Gemma's special tokens.

        Ids: 0 pad, 1 eos, 2 bos, 3 unk, 4 to 259 the bytes, 260 the space, 261 and 262 the turn tokens,
        the rest unused.

        Raises:
            TokenizerError: If the vocabulary is smaller than 263.
        """
        if vocab_size < 263:
            raise TokenizerError(f"256 bytes, the space and 6 special tokens do not fit a vocabulary of {vocab_size}")
        specials = ["<pad>", _EOS, _BOS, _UNK]
        turns = ["<start_of_turn>", _END_OF_TURN]
        unused = [f"<unused{index}>" for index in range(vocab_size - 263)]
        pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), _SPACE, *turns, *unused]
        kinds = [_CONTROL] * 4 + [_BYTE] * 256 + [_NORMAL] + [_CONTROL] * (vocab_size - 261)
        return Tokenizer(_build(pieces, [0.0] * vocab_size, kinds))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included; a model may have more rows than that."""
        return int(self._backend.get_vocab_size())

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens by their names, special ones included."""
        return dict(self._backend.get_vocab())

    @property
    def largest_id(self) -> int:
        """The last id; `vocab_size - 1` unless ids were left out."""
        return max(self.vocab_size - 1, *self._backend.get_added_tokens_decoder(), 0)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and what stands beside it, which `from_folder` and Hugging Face's libraries read."""
        if self._backend.post_processor is None and self.first_id is not None:
            # transformers goes by this, and not by the config's add_bos_token.
            first = {"id": "bos", "ids": [self.first_id], "tokens": [self._backend.id_to_token(self.first_id)]}
            self._backend.post_processor = tokenizers.processors.TemplateProcessing("bos $A", special_tokens=[first])
        self._backend.save(str(folder / TOKENIZER), pretty=False)
        self.config.save(folder)

    @property
    def first_id(self) -> int | None:
        """What every text begins with; None if nothing."""
        return self.bos_id if self.config.adds_bos else None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised.

        Args:
            text: What UTF-8 can write.
            bos: Start with `bos_id`, unless the text itself does, or the tokenizer's config says that none does.

        Raises:
            TokenizerError: If the text holds half a character, or a byte that was not UTF-8.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            check_text(text, "the text")
            raise
        first = self.first_id if bos else None
        return ids if first is None or ids[:1] == [first] else [first, *ids]

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation; see `chat_text`."""
        return self.encode(self.chat_text(messages, add_generation_prompt), bos=False)

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as text: by the checkpoint's own template, or its family's if it has none.

        A template writes the beginning-of-sequence token itself, if there is to be one.

        Args:
            messages: The conversation.
            add_generation_prompt: Open the model's next turn at the end.

        Raises:
            TokenizerError: If the template is not valid, or the conversation breaks its rules.
        """
        if self.config.template is None:
            raise TokenizerError("the model has no chat template: it was not tuned for conversations, so use run")
        return render_template(self.config.template, self._special_tokens(), messages, add_generation_prompt)

    def check_template(self) -> None:
        """Raise `TokenizerError` if the checkpoint's own chat template is not valid."""
        if self.config.template is not None:
            compile_template(self.config.template)

    def _special_tokens(self) -> dict[str, str]:
        """Tokens by role, for templates."""
        known = {"bos_token": "", "eos_token": ""} if self._byte_level else {"bos_token": _BOS, "eos_token": _EOS}
        return {**known, **self.config.tokens}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids. Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([stream.add(token) for token in ids]) + stream.finish()

    def stream(self) -> TokenStream:
        """A decoder that takes one id at a time."""
        return TokenStream(self)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._backend.id_to_token(token)
        # A model has more rows than its tokenizer has pieces; such an id says nothing.
        if piece is None or token in self._silent:
            return b""
        if self._byte_level:
            if token in self._added:
                return str(piece).encode()
            # A character that stands for no byte is itself, as in the library.
            return b"".join(
                bytes([BYTES[character]]) if character in BYTES else character.encode() for character in piece
            )
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return str(piece).replace(_SPACE, " ").encode()


class TokenStream:
    """Decodes ids as they come, and holds back bytes until they make whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Text that is certain after one more id; may be empty."""
        return self._decoder.decode(self._tokenizer._bytes_of(token))

    def finish(self) -> str:
        """What was held back; U+FFFD if the last character never became whole."""
        return self._decoder.decode(b"", final=True)


def _build(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], ranked: Sequence[str] | None = None
) -> tokenizers.Tokenizer:
    """Byte-pair encoding with byte fallback out of SentencePiece's tables, by id.

    Its merges may be `ranked`, with a space between two pieces; otherwise they follow from the scores.

    Raises:
        TokenizerError: If they are, and do not fit the pieces.
    """
    ids = {piece: id for id, piece in enumerate(pieces)}
    normal = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _NORMAL} - _ALWAYS_CONTROL
    merges = _merges_of_scores(normal, scores, ids) if ranked is None else split_merges(ranked)
    try:
        model = tokenizers.models.BPE(vocab=ids, merges=merges, unk_token=_UNK, fuse_unk=True, byte_fallback=True)
    # The library raises plain Exception.
    except Exception as error:
        raise TokenizerError(f"its merges do not fit its pieces ({error}): convert the model again") from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", _SPACE)
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace(_SPACE, " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    added: dict[bool, list[tokenizers.AddedToken]] = {True: [], False: []}
    for piece, kind in zip(pieces, kinds, strict=True):
        special = kind in (_CONTROL, _UNKNOWN) or piece in _ALWAYS_CONTROL
        if special or kind == _USER_DEFINED:
            added[special].append(tokenizers.AddedToken(piece, normalized=False, special=special))
    backend.add_special_tokens(added[True])
    backend.add_tokens(added[False])
    return backend


def _merges_of_scores(normal: set[str], scores: Sequence[float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose joint piece scores best.

    As ranked pairs: every way to split a piece into two, best piece first.
    """
    merges = [
        (-scores[ids[piece]], ids[left], ids[right], left, right)
        for piece in normal
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in normal and (right := piece[cut:]) in normal
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _in_folder(backend: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    config = TokenizerConfig.from_folder(folder)
    try:
        return Tokenizer(backend, config)
    except TokenizerError as error:
        raise TokenizerError(f"{folder}: {error}: choose another model, or mend its {CONFIG}") from error


def _add(backend: tokenizers.Tokenizer, token: str, id: int, special: bool, folder: Path) -> None:
    """Give a tokenizer one token more, unless it has it."""
    if id == backend.get_vocab_size():
        (backend.add_special_tokens if special else backend.add_tokens)(
            [tokenizers.AddedToken(token, normalized=False, special=special)]
        )
    # Runs of spaces are written either way.
    if str(backend.id_to_token(id)).replace(_SPACE, " ") != token.replace(_SPACE, " "):
        raise TokenizerError(
            f"{folder}: the token {token[:40]!r} is said to be {id}, and tokenizer.model says otherwise: save the "
            "tokenizer as tokenizer.json (transformers: AutoTokenizer, save_pretrained)"
        )
