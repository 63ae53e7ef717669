"""Prompts of text and images: how they are put together, cut into calls, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

import transom
from transom.backends.prompt import SOFT, Prompt, split_at
from transom.backends.runtime import Call
from transom.backends.session import Session
from transom.errors import ImageError, SessionError, TokenizerError
from transom.images.pan_and_scan import SETTINGS
from transom.zoo.model import load

Cli = Callable[..., tuple[int, str, str]]
BEGIN, END, COUNT = 508, 509, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a"
    transom.compile(load("gemma3-vision-tiny", images=True), out=path, chunk=20, context=256)
    return path


@pytest.fixture
def session(folder: Path) -> Session:
    return transom.open(folder, threads=1)


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    PIL.Image.fromarray(picture(300, 700)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_an_image_stands_between_its_tokens_and_line_ends(session: Session) -> None:
    prompt = session.prompt(["What is ", picture(50, 60), "?"])
    encode = session.encode
    middle = [BEGIN, *[SOFT] * COUNT, END]
    assert prompt.tokens.tolist() == [*encode("What is \n\n"), *middle, *encode("\n\n?")[1:]]
    assert prompt.soft is not None and prompt.soft.shape == (COUNT, 64)
    assert session.prompt([picture(50, 60)]).tokens.tolist() == [*encode("\n\n"), *middle, *encode("\n\n")[1:]]


def test_the_parts_of_a_long_image_are_introduced(session: Session) -> None:
    prompt = session.prompt([picture(300, 700), "x"], pan_and_scan=SETTINGS["hf"])
    assert prompt.soft is not None and len(prompt.soft) == 3 * COUNT
    text = session.tokenizer.decode([token for token in prompt.tokens if token >= 0])  # type: ignore[union-attr]
    assert text == (
        "Here is the original image \n\n\n\n and here are some crops to help you see better \n\n\n\n \n\n\n\nx"
    )
    assert len(session.prompt([picture(300, 700)]).soft) == COUNT  # type: ignore[arg-type]


def test_an_image_is_encoded_once_a_session(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    encode = session.runtime.encode_image

    def noted(pixels: Any) -> Any:
        encoded.append(pixels)
        return encode(pixels)

    monkeypatch.setattr(session.runtime, "encode_image", noted)
    first, other = picture(50, 60), picture(50, 60, seed=1)
    once = session.prompt([first, "a", other, first])
    again = session.prompt([first])
    assert len(encoded) == 2
    assert once.soft is not None and again.soft is not None
    assert np.array_equal(once.soft[:COUNT], again.soft) and np.array_equal(once.soft[2 * COUNT :], again.soft)
    assert not np.array_equal(once.soft[COUNT : 2 * COUNT], again.soft)


def test_generate_takes_what_prompt_makes(session: Session, file: Path) -> None:
    parts = ["What is ", file, "?"]
    tokens = list(session.generate(parts, max_new_tokens=5))
    assert tokens == list(session.generate(session.prompt(parts), max_new_tokens=5))
    blind = list(session.generate("What is \n\n\n\n?", max_new_tokens=5))
    assert tokens != blind
    # The image is what makes the difference, not the order in which it was asked.
    assert list(session.generate(["What is ", picture(300, 700), "?"], max_new_tokens=5)) == tokens


def test_no_call_cuts_an_image(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    run = session.runtime.run

    def noted(call: Call) -> Any:
        calls.append(call)
        return run(call)

    monkeypatch.setattr(session.runtime, "run", noted)
    prompt = session.prompt(["abcdefgh", picture(9, 9), picture(9, 9, 1), "z" * 30])
    list(session.feed(prompt))
    assert sum(call.tokens.size for call in calls) == len(prompt)
    for call in calls:
        assert call.tokens.size <= 20
        soft = int((call.tokens < 0).sum())
        assert soft in (0, COUNT) and (call.until is not None) == bool(soft)
    assert [int((call.tokens < 0).sum()) for call in calls].count(COUNT) == 2


def test_soft_tokens_of_other_lengths() -> None:
    prompt = Prompt(
        tokens=np.array([5, -1, -1, 6, -1, -1, -1, 7]), soft=np.arange(10.0, dtype=np.float32).reshape(5, 2)
    )
    assert prompt.blocks() == [(1, 3), (4, 7)]
    call = prompt.part(3, 8, 100)
    assert call.until is not None and call.until.tolist() == [100, 103, 103, 103, 104]
    assert call.soft is not None and call.soft[0].tolist() == [[0, 0], [4, 5], [6, 7], [8, 9], [0, 0]]
    assert prompt.part(7, 8, 9).soft is None
    assert prompt.after(3).soft.tolist() == [[4, 5], [6, 7], [8, 9]]  # type: ignore[union-attr]


def test_a_block_longer_than_a_call_is_refused(session: Session) -> None:
    prompt = Prompt(tokens=np.full(21, SOFT), soft=np.zeros((21, 64), np.float32))
    with pytest.raises(SessionError, match=r"21 tokens does not fit into a call of 20.*--chunk 21"):
        session.prefill(prompt)
    with pytest.raises(TokenizerError, match="token ids must lie in"):
        session.prefill([-1, 5])


def test_a_text_model_takes_no_images(tmp_path: Path) -> None:
    transom.compile(load("gemma3-tiny"), out=tmp_path / "a")
    session = transom.open(tmp_path / "a")
    with pytest.raises(ImageError, match="takes no images"):
        session.prompt(["a", picture(9, 9)])
    with pytest.raises(SessionError, match="has no encoder of images"):
        session.runtime.encode_image(np.zeros((1, 3, 64, 64), np.float32))
    with pytest.raises(SessionError, match="was given an image"):
        session.prefill(Prompt(tokens=np.array([-1]), soft=np.zeros((1, 64), np.float32)))


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_image(session: Session, image: NDArray[Any]) -> None:
    with pytest.raises(ImageError, match=r"expected uint8 \[height, width, 3\]"):
        session.prompt([image])


def test_markers() -> None:
    assert split_at("a <i> b<i>", "<i>", [1, 2]) == ["a ", 1, " b", 2, ""]
    assert split_at("a", "<i>", [1, 2]) == [1, 2, "a"]
    with pytest.raises(ImageError, match="1 marker <i> and 0 images"):
        split_at("a <i>", "<i>", [])
    with pytest.raises(ImageError, match="2 markers <i> and 1 images"):
        split_at("<i><i>", "<i>", [1])


def test_run(cli: Cli, folder: Path, file: Path) -> None:
    code, out, err = cli("run", folder, "--image", file, "--prompt", "hi", "--max-new-tokens", 3, "--json")
    assert code == 0 and '"prompt_tokens": 25' in out, err
    code, out, err = cli(
        "run", folder, "--image", file, "--prompt", "a <image> b", "--pan-and-scan", "google", "--max-new-tokens", 3
    )
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a <image>"), "1 marker <image> and 0 images"),
        (("--prompt", "a", "--image", "nothing.png"), "nothing.png cannot be read"),
        (("--prompt", "a", "--image", "{text}"), "expected"),
        (("--prompt", "a <image><image>", "--image", "{file}"), "2 markers <image> and 1 images"),
    ],
)
def test_errors_of_run(
    cli: Cli, folder: Path, file: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    (tmp_path / "t.txt").write_text("no image")
    named = {"{text}": tmp_path / "t.txt", "{file}": file}
    code, _, err = cli("run", folder, *(named.get(option, option) for option in options))
    assert code == 2 and (words in err or words == "expected") and len(err.strip().splitlines()) == 1, err


def test_chat(cli: Cli, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[Prompt] = []
    prompt = Session.prompt

    def noted(self: Session, parts: Any, **options: Any) -> Prompt:
        prompts.append(prompt(self, parts, **options))
        return prompts[-1]

    monkeypatch.setattr(Session, "prompt", noted)
    lines = iter(["hi", f"/image {file}", "/image nowhere.png", "what?", "and?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, _, err = cli("chat", folder, "--max-new-tokens", 4, "--temperature", 0)
    assert code == 0 and "nowhere.png cannot be read" in err, err
    turns = [int((turn.tokens < 0).sum()) for turn in prompts if turn.tokens[0] == 2]
    # Every turn is asked for as a whole, and what follows what the caches hold is run.
    assert [count for count in turns if count] == [COUNT] * sum(1 for count in turns if count) and 0 in turns


def test_export_with_its_encoder_and_without(cli: Cli, tmp_path: Path) -> None:
    common = ("export", "gemma3-vision-tiny", "--chunk", 20, "--overwrite", "-o", tmp_path / "a")
    code, _, err = cli(*common)
    assert code == 0, err
    assert "64 x 64 pixels become 16 tokens" in cli("inspect", tmp_path / "a")[1]
    assert (tmp_path / "a" / "encode_image.onnx").is_file()
    code, _, err = cli(*common, "--no-vision")
    assert code == 0 and not (tmp_path / "a" / "encode_image.onnx").exists(), err
    assert "pixels become" not in cli("inspect", tmp_path / "a")[1]
    code, _, err = cli("run", tmp_path / "a", "--prompt", "a", "--image", tmp_path / "a.png")
    assert code == 2 and "takes no images" in err
    code, _, err = cli(*common, "--chunk", 8)
    assert code == 2 and "--chunk 16 or more" in err
