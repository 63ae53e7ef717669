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
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_LETTERS = rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+"
"""Words as of cl100k: contractions, and letters with one character before them."""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def missing_bytes(vocabulary: Container[str]) -> list[str]:
    """The bytes of UTF-8, in hexadecimal, that no piece stands for."""
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    return sorted(f"{byte:02x}" for char, byte in BYTES.items() if byte not in never and char not in vocabulary)


def _cut(letters: str, digits: str, line_ends: str = r"\r\n") -> pre_tokenizers.PreTokenizer:
    """Words of letters, some digits, and the rest, to which line ends behind it belong."""
    pattern = rf"{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[{line_ends}]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _cut_by_case(digits: str, behind: str = "") -> pre_tokenizers.PreTokenizer:
    """Words as of o200k: a capital behind a small letter begins one; a slash may end a line as well."""
    letters = f"{_BEFORE}{_UPPER}*{_LOWER}+{behind}|{_BEFORE}{_UPPER}+{_LOWER}*{behind}"
    return _cut(letters, digits, r"\r\n/")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _three_digits() -> pre_tokenizers.PreTokenizer:
    return _cut(_LETTERS, r"\p{N}{1,3}")


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _cut(_LETTERS, r"\p{N}")


WORDS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "exaone4": _gpt2,
    "mpt": _gpt2,
    "olmo": _gpt2,
    "llama-bpe": _three_digits,
    "llama-v3": _three_digits,
    "llama3": _three_digits,
    "smaug-bpe": _three_digits,
    "dbrx": _three_digits,
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "smollm": _single_digits,
    "command-r": _single_digits,
    "tekken": lambda: _cut_by_case(r"\p{N}"),
    "gpt-4o": lambda: _cut_by_case(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),
}
"""`tokenizer.ggml.pre` -> how texts are cut into words: of OLMo 3 (dbrx), SmolLM3 (smaug-bpe), GPT-NeoX (mpt) etc.

Source: llama.cpp, `llama-vocab.cpp`, whose expressions are the published ones as far as its own syntax allows.
"""

BEGUN = ("llama-bpe", "llama-v3", "llama3", "tekken")
"""Those that put a token in front of every text, where a file does not say."""

_WHOLE_WORDS = (*BEGUN, "smaug-bpe")
"""Those in which a word that is a piece is taken whole, whatever the merges say.

SmolLM3's, with Llama 3's vocabulary, does in its tokenizer.json; llama.cpp merges.
"""

_COMPOSED = ("qwen2", "deepseek-r1-qwen", "command-r", "mpt", "olmo")
"""Those that read letters with their accents as one character; llama.cpp does not."""


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
            ignore_merges=words in _WHOLE_WORDS,
        )
    # The library raises plain Exception.
    except Exception as error:
        raise TokenizerError(f"its merges do not fit its pieces ({error}): convert the model again") from error
    backend = tokenizers.Tokenizer(model)
    if words in _COMPOSED:
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = WORDS[words]()
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in special])
    backend.add_tokens([tokenizers.AddedToken(piece, normalized=False, special=False) for piece in own])
    return backend
