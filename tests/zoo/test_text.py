"""Text from outside is UTF-8, or an error that says what it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from transom.errors import TokenizerError
from transom.zoo.text import argument_text, check_text, decode_text, read_text
from transom.zoo.tokenizer import Tokenizer

TEXT = "grüße, 日本 🙂\n"


@pytest.mark.parametrize(
    "data",
    [TEXT.encode(), TEXT.encode("utf-8-sig"), TEXT.replace("\n", "\r\n").encode(), TEXT.replace("\n", "\r").encode()],
)
def test_utf8_is_read(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(data)
    assert read_text(tmp_path / "text") == decode_text(data, "it") == TEXT


@pytest.mark.parametrize("text", ["", "a", "a\0b", "\0\0\0\0", "\ufeff\ufeffa", "a\ufeff"])
def test_odd_text_is_text(text: str) -> None:
    assert decode_text(text.encode(), "it") == text.removeprefix("\ufeff")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"caf\xe9", r"it is not UTF-8 \(byte 0xe9 at 3\): save it as UTF-8"),
        (b"\xef\xbb\xbfcaf\xe9", "byte 0xe9"),
        (TEXT.encode("utf-16"), "it is UTF-16, not UTF-8"),
        (TEXT.encode("utf-32"), "it is UTF-32, not UTF-8"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "it is UTF-16, not UTF-8"),
        (b"hello".decode().encode("utf-16-le"), "it is UTF-16 without a mark"),
        ("hello".encode("utf-16-be"), "it is UTF-16 without a mark"),
        (b"\xed\xa0\x80", "byte 0xed"),
        (b"\xef", "byte 0xef at 0"),
        (TEXT.encode()[:-2], "byte 0xf0"),
    ],
)
def test_anything_else_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        decode_text(data, "it")


@pytest.mark.parametrize("name", ["none", "."])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"cannot read the text from .*: name a file"):
        read_text(tmp_path / name)


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert argument_text(TEXT, "--prompt") == check_text(TEXT, "it") == TEXT
    # What Python makes of UTF-8 where the system says that all is ASCII.
    kept = TEXT.encode().decode("ascii", "surrogateescape")
    assert argument_text(kept, "--prompt") == TEXT
    for bad in ("caf\udce9", "\ud800"):
        with pytest.raises(TokenizerError, match="--prompt is not UTF-8"):
            argument_text(bad, "--prompt")
    with pytest.raises(TokenizerError, match="the line is not UTF-8"):
        check_text(kept, "the line")


def test_a_tokenizer_takes_no_half_characters() -> None:
    with pytest.raises(TokenizerError, match="the text is not UTF-8"):
        Tokenizer.of_bytes(512).encode(os.fsdecode(b"caf\xe9"))
