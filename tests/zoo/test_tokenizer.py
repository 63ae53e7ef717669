from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import sentencepiece.sentencepiece_model_pb2 as model_pb2
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.zoo.tiny_gguf import TINY
from transom.errors import CheckpointError, TokenizerError
from transom.zoo.checkpoints.gguf_header import read_header
from transom.zoo.tokenizer import Tokenizer

BYTES = Tokenizer.of_bytes(512)

# What does not survive: U+2581, which stands for a space inside the tokenizer, and special tokens such as <eos>. Lone
# surrogates are no text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581<"))
# Texts in which merges, runs of spaces and newlines, digits and unknown characters meet.
PROSE = st.lists(
    st.sampled_from(
        ["the", " quick", "  ", "\n", "\n\n\n", "\t", "2026", " 3.1", "naïve", "你好", "🙂", "<table>", "x"]
    )
    | st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"], exclude_characters="\u2581<"), max_size=4)
).map("".join)

GOLDEN = {
    "Hello world": [2, 9259, 1902],
    "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n":
        [2, 105, 2364, 107, 15938, 659, 611, 236881, 106, 107, 105, 4368, 107],
    "What is 2+2? 12345":
        [2, 3689, 563, 236743, 236778, 236862, 236778, 236881, 236743, 236770, 236778, 236800, 236812, 236810],
    "  two spaces\n\n\ttab": [2, 138, 13498, 9952, 108, 255968, 4823],
    "héllo 你好 🙂": [2, 236754, 7869, 844, 43758, 237389, 57235],
    " leading": [2, 5830],
    "def f(x):\n    return x": [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123],
    "The capital of France is": [2, 818, 5279, 529, 7001, 563],
}  # fmt: skip


def test_bytes() -> None:
    assert (BYTES.bos_id, BYTES.stop_ids, BYTES.vocab_size) == (2, (1, 262), 512)
    assert BYTES.encode("A<end_of_turn>") == [2, 4 + 65, 262]
    assert BYTES.encode("é", bos=False) == [4 + 0xC3, 4 + 0xA9]
    with pytest.raises(TokenizerError, match="262"):
        Tokenizer.of_bytes(262)


def test_exactly_one_bos() -> None:
    assert BYTES.encode("<bos>A") == BYTES.encode("A") == [2, 69]
    assert BYTES.encode("A", bos=False) == [69]


@given(TEXTS)
def test_text_survives(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text


@given(st.lists(st.integers(0, 520)))
@example([4 + 0xF0, 4 + 0x9F, 4 + 0x99, 4 + 0x82, 4 + 0xF0, 4 + 0x9F, 69])
def test_streaming_gives_what_decoding_gives(ids: list[int]) -> None:
    stream = BYTES.stream()
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.finish() == BYTES.decode(ids)


@given(TEXTS)
def test_streaming_never_shows_half_a_character(text: str) -> None:
    stream, shown = BYTES.stream(), ""
    for token in BYTES.encode(text):
        shown += stream.add(token)
        assert text.startswith(shown)
    assert shown == text and stream.finish() == ""


def test_half_a_character_at_the_end() -> None:
    stream = BYTES.stream()
    assert [stream.add(4 + byte) for byte in b"\xf0\x9f\x99"] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_from_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny_gguf)
    assert tokenizer.vocab_size == TINY.vocab_size
    pieces = read_header(tiny_gguf).metadata["tokenizer.ggml.tokens"]
    assert isinstance(pieces, list)
    ids = {piece: index for index, piece in enumerate(pieces)}
    # "  " is the user's own piece; the merges h+e, ll+o, he+llo, and the space in front build one piece.
    expected = ["<bos>", "  ", "hello", "\u2581hello", "<0x21>", "\n\n", "<end_of_turn>"]
    text = "  hello hello!\n\n<end_of_turn>"
    assert tokenizer.encode(text) == [ids[piece] for piece in expected]
    assert tokenizer.decode(tokenizer.encode(text)) == "  hello hello!\n\n"
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.bos_id, again.stop_ids) == (tokenizer.bos_id, tokenizer.stop_ids)


def test_turn_tokens_are_special_whatever_the_file_says(tmp_path: Path) -> None:
    model = model_pb2.ModelProto()
    for piece, kind in (("<unk>", 2), ("<eos>", 3), ("<bos>", 3), ("<start_of_turn>", 1), ("<end_of_turn>", 1)):
        model.pieces.add(piece=piece, score=0, type=kind)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    assert Tokenizer.from_folder(tmp_path).encode("<end_of_turn>") == [2, 4]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small `tokenizer.model`, trained by SentencePiece with Gemma's settings."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = folder / "corpus.txt"
    corpus.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=700,
        byte_fallback=True, split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", allow_whitespace_only_pieces=True, minloglevel=2,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=["\n", "\n\n", "\t", "\u2581\u2581", "\u2581\u2581\u2581", "<table>"],
    )  # fmt: skip
    return folder


@given(text=PROSE)
def test_tokenizer_model_is_what_sentencepiece_says(trained: Path, text: str) -> None:
    ours, theirs = _both(trained)
    assert ours.encode(text, bos=False) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text


_LOADED: dict[Path, tuple[Tokenizer, sentencepiece.SentencePieceProcessor]] = {}


def _both(folder: Path) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    if folder not in _LOADED:
        model = folder / "tokenizer.model"
        _LOADED[folder] = Tokenizer.from_folder(folder), sentencepiece.SentencePieceProcessor(model_file=str(model))
    return _LOADED[folder]


def test_damaged_files(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
    whole = (trained / "tokenizer.model").read_bytes()
    for content in (b"", whole[:1000], b"\xff" * 100, b"hello"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(TokenizerError, match="not a SentencePiece model"):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="malformed"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not a GGUF"):
        Tokenizer.from_gguf(tmp_path / "tokenizer.model")


def test_what_a_library_saved_for_its_batches_is_not_applied(tmp_path: Path) -> None:
    backend = Tokenizer.of_bytes(512)._backend
    backend.enable_truncation(8)
    backend.enable_padding(length=60, pad_id=0, pad_token="<pad>")
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a prompt of more than eight bytes"
    assert Tokenizer.from_folder(tmp_path).encode(text) == BYTES.encode(text)


SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}


def word_piece() -> tokenizers.Tokenizer:
    vocab = SPECIAL | {"hello": 4, "##lo": 5, "wor": 6}
    return tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=vocab, unk_token="<unk>"))


def with_a_space_in_front() -> tokenizers.Tokenizer:
    backend = Tokenizer.of_bytes(512)._backend
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    return backend


@pytest.mark.parametrize("make", [word_piece, with_a_space_in_front])
def test_a_tokenizer_of_another_family(make: Callable[[], tokenizers.Tokenizer], tmp_path: Path) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="does not come back from its ids"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
)
def test_companions_that_are_no_files(name: str, tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(TokenizerError, match=f"{name}: a link that leads nowhere"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(TokenizerError, match=f"{name}: no file"):
        Tokenizer.from_folder(tmp_path)


def test_tokens_that_were_added_to_a_tokenizer_model(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "tokenizer.model", tmp_path)
    size = Tokenizer.from_folder(tmp_path).vocab_size
    config = {str(size): {"content": "<|im_start|>", "special": True}, "2": {"content": "<bos>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": config}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<|word|>": size + 1}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|im_start|><|word|>", bos=False) == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<|word|>"
    for malformed, message in (
        ({"<|far|>": size + 7}, "'<|far|>' is said to be"),
        ({"<bos>": 5}, "'<bos>' is said to be 5"),
        ({"<|x|>": "many"}, "added tokens are malformed"),
        ({"<|x|>": -1}, "'<|x|>' is out of range"),
        ({"<|x|>": 2**40}, "'<|x|>' is out of range"),
        ([], "must hold a JSON object"),
    ):
        (tmp_path / "added_tokens.json").write_text(json.dumps(malformed))
        with pytest.raises(TokenizerError, match=re.escape(message)):
            Tokenizer.from_folder(tmp_path)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    model = model_pb2.ModelProto()
    for piece in ("<unk>", "<s>", "</s>"):
        model.pieces.add(piece=piece, score=0, type=3)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(TokenizerError, match="has no <bos>"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("module", ["transom.zoo.tokenizer", "transom.zoo.chat"])
def test_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.real
@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(real_tokenizer: Tokenizer, text: str) -> None:
    assert real_tokenizer.encode(text) == GOLDEN[text]
    plain = text.replace("<start_of_turn>", "").replace("<end_of_turn>", "")
    assert real_tokenizer.decode(GOLDEN[text]) == plain


@pytest.mark.real
def test_real_ids(real_tokenizer: Tokenizer) -> None:
    assert real_tokenizer.bos_id == 2
    assert real_tokenizer.stop_ids == (1, 106)
    assert real_tokenizer.vocab_size == 262_144
    assert real_tokenizer.encode(" " * 31 + "\n" * 31, bos=False) == [167, 137]
    assert real_tokenizer.encode(" " * 40, bos=False) == [167, 145]


@pytest.fixture(scope="module")
def real_folder(real_gguf: Path, real_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real tables as SentencePiece's own file, so that its own code can be asked."""
    folder = tmp_path_factory.mktemp("real")
    metadata = read_header(real_gguf).metadata
    model = model_pb2.ModelProto()
    tables: list[Any] = [metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    for piece, score, kind in zip(*tables, strict=True):
        piece = piece.replace(" ", "\u2581") if kind == 4 else piece
        model.pieces.add(piece=piece, score=score, type=2 if piece == "<unk>" else int(kind))
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder


@pytest.mark.real
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=PROSE)
@example("".join(map(chr, range(32, 0x2000, 7))))
@example(Path(__file__).read_text(encoding="utf-8").replace("<", "(").replace("\u2581", ""))
def test_real_ids_are_what_sentencepiece_says(real_folder: Path, text: str) -> None:
    ours, theirs = _both(real_folder)
    assert ours.encode(text, bos=False) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
