"""The tables of a tokenizer in a GGUF file's metadata, by the rules of llama.cpp. Needs no torch.

llama.cpp takes a score of 0 and the type "normal" where a table is missing, and names an empty piece after its id.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from transom.errors import TokenizerError
from transom.zoo.checkpoints.gguf_header import Header
from transom.zoo.checkpoints.gguf_metadata import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """A tokenizer as a file holds it.

    Attributes:
        pieces: By id.
        scores: By id.
        kinds: By id, as SentencePiece numbers them.
        words: How a byte-level one cuts texts; None for SentencePiece's.
        merges: Of a byte-level one, and of Gemma 4's, with a space between two pieces; None where scores rank
            them.
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    words: str | None = None
    merges: list[str] | None = None


_PREFIX = "tokenizer.ggml."
_NORMAL, _UNUSED, _BYTE = 1, 5, 6
_KINDS = range(1, 7)

# What bears on ids, and the only value that Gemma's tokenizer has.
_FLAGS = (
    "add_space_prefix",
    "remove_extra_whitespaces",
    "normalizer.lowercase",
    "normalizer.strip_accents",
)
# Ids that must stand for a piece, and the piece where Gemma's tokenizer fixes it.
_IDS = {"bos_token_id": "<bos>", "unknown_token_id": "<unk>", "eos_token_id": None, "eot_token_id": None}


def unread_lines(header: Header) -> tuple[str, ...]:
    """In plain words, that a file's tokenizer is of a kind that is not read, so that its model has none."""
    model = header.metadata.get(f"{_PREFIX}model")
    if not isinstance(model, str) or model != "rwkv":
        return ()
    return (f"{_PREFIX}model is 'rwkv', a kind of tokenizer that is not read: give token ids in place of texts",)


def read_tables(header: Header) -> Tables:
    """The tables of a tokenizer.

    Raises:
        TokenizerError: If there is none, it is of a kind that we do not know, or its tables contradict each other.
    """
    path, metadata = header.path, header.metadata
    model = metadata.get(f"{_PREFIX}model")
    # An array is compared by element, so that the value must be a string first.
    if not isinstance(model, str) or model not in ("llama", "gpt2", "gemma4"):
        raise TokenizerError(
            f"{path}: its tokenizer is {shown(model)}, expected 'llama' or 'gemma4' (SentencePiece's) or 'gpt2' "
            f"(byte-level) as {_PREFIX}model: convert the model again"
        )
    pieces = metadata.get(f"{_PREFIX}tokens")
    if not isinstance(pieces, list) or not pieces:
        raise TokenizerError(f"{path}: {_PREFIX}tokens is no list of strings: fetch the file again")
    pieces = [piece or f"[EMPTY_{index}]" for index, piece in enumerate(pieces)]
    if len(set(pieces)) != len(pieces):
        seen: dict[str, int] = {}
        twice = next((index, piece) for index, piece in enumerate(pieces) if seen.setdefault(piece, index) != index)
        raise TokenizerError(
            f"{path}: {_PREFIX}tokens holds {twice[1][:60]!r} as {seen[twice[1]]} and as {twice[0]}: "
            "convert the model again"
        )
    scores = _table(header, "scores", len(pieces), 0.0, "if")
    kinds = _table(header, "token_type", len(pieces), _NORMAL, "iu")
    if not np.isfinite(scores).all():
        index = int(np.argmin(np.isfinite(scores)))
        raise TokenizerError(f"{path}: {_PREFIX}scores of {index} is {scores[index]}: convert the model again")
    if not np.isin(kinds, _KINDS).all():
        index = int(np.argmin(np.isin(kinds, _KINDS)))
        raise TokenizerError(
            f"{path}: {_PREFIX}token_type of {index} is {kinds[index]}, known are 1 to 6: convert the model again"
        )
    _check_flags(header)
    _check_ids(header, pieces, named=model != "gpt2")
    if model == "llama":
        _check_order(header, pieces, scores, kinds)
        _check_unused(header, pieces, kinds)
        return Tables(pieces=pieces, scores=scores.tolist(), kinds=kinds.tolist())
    merges, words = (metadata.get(f"{_PREFIX}{name}") for name in ("merges", "pre"))
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise TokenizerError(f"{path}: {_PREFIX}merges is no list of strings: convert the model again")
    tables = Tables(pieces=pieces, scores=scores.tolist(), kinds=kinds.tolist(), merges=merges)
    # llama.cpp cuts texts for Gemma 4's as it always does, whatever the file says.
    if model == "gemma4":
        return tables
    if not isinstance(words, str):
        raise TokenizerError(
            f"{path}: {_PREFIX}pre is {shown(words)}, so how texts are cut is unknown: convert the model again"
        )
    return dataclasses.replace(tables, words=words)


def _table(header: Header, name: str, count: int, default: float, kinds: str) -> np.ndarray:
    values = header.metadata.get(f"{_PREFIX}{name}")
    if values is None:
        return np.full(count, default, np.float32 if "f" in kinds else np.int32)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds:
        raise TokenizerError(f"{header.path}: {_PREFIX}{name} is no list of numbers: convert the model again")
    if len(values) != count:
        raise TokenizerError(
            f"{header.path}: {count} tokens, but {len(values)} values of {_PREFIX}{name}: fetch the file again"
        )
    return values


def _check_flags(header: Header) -> None:
    for name in _FLAGS:
        if (value := header.metadata.get(f"{_PREFIX}{name}", False)) is not False:
            raise TokenizerError(
                f"{header.path}: {_PREFIX}{name} is {shown(value)}, only False is supported, which is Gemma's: "
                "convert the model again with tokenizer.model beside it"
            )
    charsmap = header.metadata.get(f"{_PREFIX}precompiled_charsmap")
    if charsmap is not None and not (isinstance(charsmap, np.ndarray | list) and len(charsmap) == 0):
        raise TokenizerError(
            f"{header.path}: {_PREFIX}precompiled_charsmap rewrites texts before they are split, which is not "
            "supported: choose another model"
        )


def _check_ids(header: Header, pieces: list[str], *, named: bool) -> None:
    for name, piece in _IDS.items():
        if (value := header.metadata.get(f"{_PREFIX}{name}")) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(pieces):
            raise TokenizerError(
                f"{header.path}: {_PREFIX}{name} is {shown(value)}, expected one of {len(pieces)} ids: "
                "convert the model again"
            )
        if named and piece is not None and piece in pieces and pieces[value] != piece:
            raise TokenizerError(
                f"{header.path}: {_PREFIX}{name} is {value}, that is {pieces[value][:60]!r}, but {piece} is "
                f"{pieces.index(piece)}: convert the model again"
            )


def _check_order(header: Header, pieces: list[str], scores: np.ndarray, kinds: np.ndarray) -> None:
    """Of two pieces that can be merged the better score goes first; for equal scores llama.cpp takes the left one.

    Ranked merges, which is what we build, cannot express that.
    """
    is_normal = kinds == _NORMAL
    values, counts = np.unique(scores[is_normal], return_counts=True)
    tied = is_normal & np.isin(scores, values[counts > 1])
    if not tied.any():
        return
    normal = {pieces[index] for index in np.flatnonzero(is_normal).tolist()}
    firsts: dict[float, str] = {}
    for index in np.flatnonzero(tied).tolist():
        piece, score = pieces[index], float(scores[index])
        if not _splits(piece, normal):
            continue
        if score in firsts:
            raise TokenizerError(
                f"{header.path}: {_PREFIX}scores gives {firsts[score][:40]!r} and {piece[:40]!r} the same score "
                f"{score:g}, so the order of merges is unknown: convert the model again with tokenizer.model beside it"
            )
        firsts[score] = piece


def _check_unused(header: Header, pieces: list[str], kinds: np.ndarray) -> None:
    """llama.cpp merges any neighbours into any piece, whatever their kinds; we only normal ones."""
    known = set(pieces)
    other = {pieces[index]: index for index in np.flatnonzero((kinds == _UNUSED) | (kinds == _BYTE)).tolist()}
    lengths = sorted({len(piece) for piece in other})
    for piece in pieces:
        if piece in other and _splits(piece, known):
            source = piece
        else:
            halves = [
                half
                for length in lengths
                if length < len(piece)
                for half, rest in ((piece[:length], piece[length:]), (piece[-length:], piece[:-length]))
                if half in other and rest in known
            ]
            if not halves:
                continue
            source = halves[0]
        index = other[source]
        raise TokenizerError(
            f"{header.path}: {_PREFIX}token_type of {index} is {kinds[index]}, but its piece {source[:40]!r} takes "
            f"part in the merge of {piece[:40]!r}: convert the model again"
        )


def _splits(piece: str, pieces: set[str]) -> bool:
    return any(piece[:cut] in pieces and piece[cut:] in pieces for cut in range(1, len(piece)))
