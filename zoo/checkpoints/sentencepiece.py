"""SentencePiece's `tokenizer.model`, and the tokens that Hugging Face's files add to it. Needs no torch."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from transom.errors import TokenizerError
from transom.json_object import read_object

_NORMAL, _USER_DEFINED = 1, 4
_SPACE = "\u2581"


def added_tokens(folder: Path) -> list[tuple[str, int, bool]]:
    """Tokens that were added to a folder's `tokenizer.model`, in order of ids: (token, id, whether special).

    Raises:
        TokenizerError: If a file that names them is malformed.
    """
    older, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    tokens: list[tuple[str, int, bool]] = []
    try:
        for id, entry in ((read_object(config, TokenizerError) or {}).get("added_tokens_decoder") or {}).items():
            tokens.append((str(entry["content"]), int(id), bool(entry.get("special"))))
        for token, id in (read_object(older, TokenizerError) or {}).items():
            tokens.append((token, int(id), False))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TokenizerError(f"{folder}: its added tokens are malformed ({error!r}): fetch it again") from error
    if wrong := [token for token, id, _ in tokens if not 0 <= id < 2**31]:
        raise TokenizerError(f"{folder}: the id of the added token {wrong[0]!r} is out of range: fetch it again")
    return sorted(tokens, key=lambda token: token[1])


def sentencepiece_tables(data: bytes) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and kinds of a SentencePiece model, a protobuf message: field 1 repeats {piece, score, type}.

    Raises:
        ValueError, IndexError, struct.error: If the bytes are no such message.
    """
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    for number, value in _fields(data):
        if number != 1 or not isinstance(value, bytes):
            continue
        piece, score, kind = "", 0.0, _NORMAL
        for inner, content in _fields(value):
            if inner == 1 and isinstance(content, bytes):
                piece = content.decode("utf-8")
            elif inner == 2 and isinstance(content, bytes):
                (score,) = struct.unpack("<f", content)
            elif inner == 3 and isinstance(content, int):
                kind = content
        # Pieces that users define are matched against the text as it comes, before spaces are rewritten.
        pieces.append(piece.replace(_SPACE, " ") if kind == _USER_DEFINED else piece)
        scores.append(score)
        kinds.append(kind)
    if not pieces:
        raise ValueError("it holds no pieces")
    return pieces, scores, kinds


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Walk a protobuf message: field number and value, of wire types 0, 1, 2 and 5."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        if (wire := tag & 7) == 0:
            yield tag >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"unknown wire type {wire}")
        length = {1: 8, 5: 4}.get(wire) or varint()
        if at + length > len(data):
            raise IndexError("it is cut off")
        at += length
        yield tag >> 3, data[at - length : at]
