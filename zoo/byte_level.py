"""Byte-level byte-pair encoding (GPT-2's): every byte has a character, and pieces are words of these characters.

Source: the GPT-2 reference encoder (`bytes_to_unicode`). Texts are cut into words before pairs are merged; how, differs
between tokenizers, and GGUF files name it (`tokenizer.ggml.pre`). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import tokenizers
from tokenizers import Regex, pre_tokenizers

from transom.errors import TokenizerError

_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
# Bytes that are printed stand for themselves; the others take the characters from U+0100 on, in order.
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTED]
BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(0x100 + index): byte for index, byte in enumerate(_HIDDEN)}
"""Character -> the byte that it stands for."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def missing_bytes(vocabulary: Container[str]) -> list[str]:
    """The bytes of UTF-8, in hexadecimal, that no piece stands for."""
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    return sorted(f"{byte:02x}" for char, byte in BYTES.items() if byte not in never and char not in vocabulary)


def _cut(digits: str) -> pre_tokenizers.PreTokenizer:
    """Words as of cl100k: contractions, letters with one character before them, some digits, the rest."""
    pattern = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}{_REST}"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


WORDS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "llama-bpe": lambda: _cut(r"\p{N}{1,3}"),
    "llama-v3": lambda: _cut(r"\p{N}{1,3}"),
    "llama3": lambda: _cut(r"\p{N}{1,3}"),
    "qwen2": lambda: _cut(r"\p{N}"),
    "smollm": _single_digits,
}
"""`tokenizer.ggml.pre` -> how texts are cut into words."""

WHOLE_WORDS = ("llama-bpe", "llama-v3", "llama3")
"""Those in which a word that is a piece is taken whole, whatever the merges say."""


def split_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of pieces that stand with a space between."""
    return [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]


def build(
    pieces: Sequence[str], merges: Sequence[str], words: str, *, special: Sequence[str], own: Sequence[str]
) -> tokenizers.Tokenizer:
    """A tokenizer out of the tables of a GGUF file.

    Args:
        pieces: By id.
        merges: Pairs of pieces with a space between, first the one that is merged first.
        words: A key of `WORDS`.
        special: Pieces that are control tokens, never part of a text.
        own: Pieces that are found in a text before it is cut.

    Raises:
        TokenizerError: If the way to cut texts is unknown, or the tables contradict each other.
    """
    if words not in WORDS:
        raise TokenizerError(
            f"it cuts texts into words by {words!r} (tokenizer.ggml.pre), known are {', '.join(WORDS)}: choose another "
            "model, or give its Hugging Face folder"
        )
    try:
        model = tokenizers.models.BPE(
            vocab={piece: id for id, piece in enumerate(pieces)},
            merges=split_merges(merges),
            ignore_merges=words in WHOLE_WORDS,
        )
    # The library raises plain Exception.
    except Exception as error:
        raise TokenizerError(f"its merges do not fit its pieces ({error}): convert the model again") from error
    backend = tokenizers.Tokenizer(model)
    if words == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = WORDS[words]()
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in special])
    backend.add_tokens([tokenizers.AddedToken(piece, normalized=False, special=False) for piece in own])
    return backend
