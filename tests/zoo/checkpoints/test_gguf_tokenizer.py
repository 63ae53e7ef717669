from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.zoo.gguf_bytes import PIECES, Value, tiny
from transom.errors import TokenizerError
from transom.zoo.architectures import preset
from transom.zoo.model import load
from transom.zoo.tokenizer import Tokenizer

IDS = {piece: index for index, (piece, _, _) in enumerate(PIECES)}


def write(tmp_path: Path, **values: Value | None) -> Path:
    file = tiny()
    for key, value in values.items():
        file.set(f"tokenizer.ggml.{key.replace('__', '.')}", value)
    (path := tmp_path / "tiny.gguf").write_bytes(file.encode())
    return path


def replaced(table: int, index: int, value: object) -> list[object]:
    values: list[object] = [row[table] for row in PIECES]
    values[index] = value
    return values


def test_the_tiny_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(write(tmp_path))
    assert tokenizer.encode("hello heA") == [IDS[piece] for piece in ("<bos>", "hello", "\u2581", "he", "<0x41>")]
    assert tokenizer.vocab_size == len(PIECES) and tokenizer.largest_id == len(PIECES) - 1


def test_ranked_merges(tmp_path: Path) -> None:
    """Gemma 4's: merges stand in the file, and scores, which are all one here, bear on nothing."""
    model: dict[str, Value] = {"model": ("string", "gemma4"), "scores": ("array of f32", [0.0] * len(PIECES))}
    ranked = write(tmp_path, merges=("array of string", ["e l", "l l", "h e"]), **model)
    pieces = ("<bos>", "h", "el", "l", "o", "\u2581", "he", "<0x41>")
    assert Tokenizer.from_gguf(ranked).encode("hello heA") == [IDS[piece] for piece in pieces]
    with pytest.raises(TokenizerError, match="its merges do not fit its pieces"):
        Tokenizer.from_gguf(write(tmp_path, merges=("array of string", ["o h"]), **model))
    with pytest.raises(TokenizerError, match=r"tokenizer.ggml.merges is no list of strings"):
        Tokenizer.from_gguf(write(tmp_path, **model))


def test_whole_scores_and_missing_types(tmp_path: Path) -> None:
    scores: Value = ("array of i32", [score for _, score, _ in PIECES])
    tokenizer = Tokenizer.from_gguf(write(tmp_path, scores=scores, token_type=None))
    assert tokenizer.encode("hello") == [IDS["<bos>"], IDS["hello"]]
    assert tokenizer.encode("<end_of_turn>", bos=False) == [IDS["<end_of_turn>"]]


def test_an_empty_piece_is_named_after_its_id(tmp_path: Path) -> None:
    path = write(tmp_path, tokens=("array of string", replaced(0, 14, "")))
    assert Tokenizer.from_gguf(path).encode("[EMPTY_14]", bos=False) != []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": ("string", "bert")}, "'bert', expected 'llama' or 'gemma4' (SentencePiece's)"),
        ({"model": ("string", "none")}, "as tokenizer.ggml.model: convert the model again"),
        ({"model": None}, "None, expected 'llama'"),
        ({"tokens": None}, "tokenizer.ggml.tokens is no list"),
        ({"tokens": ("array of u32", [1, 2])}, "tokenizer.ggml.tokens is no list"),
        ({"tokens": ("array of string", replaced(0, 8, "h"))}, "tokens holds 'h' as 5 and as 8"),
        ({"scores": ("array of f32", [0.0])}, "16 tokens, but 1 values of tokenizer.ggml.scores"),
        ({"scores": ("array of string", ["0"] * 16)}, "tokenizer.ggml.scores is no list of numbers"),
        ({"scores": ("f32", 0.0)}, "tokenizer.ggml.scores is no list of numbers"),
        ({"scores": ("array of f32", replaced(1, 6, float("nan")))}, "tokenizer.ggml.scores of 6 is nan"),
        ({"scores": ("array of f32", replaced(1, 6, float("inf")))}, "tokenizer.ggml.scores of 6 is inf"),
        ({"scores": ("array of f32", replaced(1, 10, -6.0))}, "'he' and 'll' the same score -6"),
        ({"scores": None}, "the same score 0, so the order of merges is unknown"),
        ({"token_type": ("array of i32", replaced(2, 7, 9))}, "token_type of 7 is 9"),
        ({"token_type": ("array of i32", replaced(2, 7, 0))}, "token_type of 7 is 0"),
        ({"token_type": ("array of i32", replaced(2, 9, 5))}, "token_type of 9 is 5, but its piece 'he' takes part"),
        ({"token_type": ("array of i32", replaced(2, 5, 6))}, "piece 'h' takes part in the merge of 'he'"),
        ({"token_type": ("array of f32", [1.0] * 16)}, "token_type is no list of numbers"),
        ({"token_type": ("array of i32", [1] * 17)}, "17 values of tokenizer.ggml.token_type"),
        ({"bos_token_id": ("u32", 16)}, "bos_token_id is 16, expected one of 16 ids"),
        ({"bos_token_id": ("u32", 5)}, "bos_token_id is 5, that is 'h', but <bos> is 2"),
        ({"bos_token_id": ("string", "2")}, "bos_token_id is '2'"),
        ({"eos_token_id": ("u32", 999)}, "eos_token_id is 999"),
        ({"eot_token_id": ("i32", -1)}, "eot_token_id is -1"),
        ({"unknown_token_id": ("u32", 0)}, "unknown_token_id is 0"),
        ({"add_space_prefix": ("bool", True)}, "tokenizer.ggml.add_space_prefix is True"),
        ({"add_space_prefix": ("u32", 0)}, "tokenizer.ggml.add_space_prefix is 0"),
        ({"remove_extra_whitespaces": ("bool", True)}, "tokenizer.ggml.remove_extra_whitespaces is True"),
        ({"normalizer__lowercase": ("bool", True)}, "tokenizer.ggml.normalizer.lowercase is True"),
        ({"precompiled_charsmap": ("array of u8", [1, 2])}, "tokenizer.ggml.precompiled_charsmap"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, values: dict[str, Value | None], words: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_gguf(path := write(tmp_path, **values))
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"pre": ("string", "gemma")},
        {"remove_extra_whitespaces": ("bool", False)},
        {"precompiled_charsmap": ("array of u8", [])},
        {"padding_token_id": ("u32", 2**32 - 1)},
        {"add_space_prefix": None},
    ],
)
def test_what_changes_no_id(tmp_path: Path, values: dict[str, Value | None]) -> None:
    path = write(tmp_path, **values)
    assert Tokenizer.from_gguf(path).encode("hello") == [IDS["<bos>"], IDS["hello"]]
    assert load(path).left_out == ()


def test_what_is_not_done_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path, add_eos_token=("bool", True), suppress_tokens=("array of i32", [5]))
    assert load(path).left_out == (
        "tokenizer.ggml.suppress_tokens is not applied",
        "tokenizer.ggml.add_eos_token is not applied: a prompt is there to be continued",
    )


def test_texts_without_a_first_token(tmp_path: Path) -> None:
    assert Tokenizer.from_gguf(write(tmp_path, add_bos_token=("bool", False))).encode("hello") == [IDS["hello"]]


def test_a_tokenizer_smaller_than_the_embedding(tmp_path: Path) -> None:
    tables: dict[str, Value | None] = {
        "tokens": ("array of string", [row[0] for row in PIECES[:14]]),
        "scores": ("array of f32", [float(row[1]) for row in PIECES[:14]]),
        "token_type": ("array of i32", [row[2] for row in PIECES[:14]]),
    }
    model = load(write(tmp_path, **tables))
    assert model.left_out == ("the tokenizer names 14 of 16 rows of the embedding: the others have no text",)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    tables: dict[str, Value | None] = {
        "tokens": ("array of string", [*(row[0] for row in PIECES), "<extra>"]),
        "scores": ("array of f32", [*(float(row[1]) for row in PIECES), -99.0]),
        "token_type": ("array of i32", [*(row[2] for row in PIECES), 4]),
    }
    (line,) = load(path := write(tmp_path, **tables)).left_out
    assert line.startswith("the tokenizer has ids up to 16, the embedding 16 rows")
    assert load(path, weights="random").left_out == (line,)


def test_folders_say_it_too(tiny_folder: Path, tmp_path: Path) -> None:
    for name in tiny_folder.iterdir():
        (tmp_path / name.name).symlink_to(name)
    Tokenizer.of_bytes(300).save(tmp_path)
    assert load(tmp_path).left_out == ("the tokenizer names 300 of 512 rows of the embedding: the others have no text",)
    Tokenizer.of_bytes(600).save(tmp_path)
    (line,) = load(tmp_path).left_out
    assert "ids up to 599" in line
    assert dataclasses.replace(preset("gemma3-tiny"), name=tmp_path.name) == load(tmp_path).config
