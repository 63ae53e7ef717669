"""Files of pairs are read in their order, and what is no pair is one error that names its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transom.errors import PairsError
from transom.images.pairs import Pair, read_pairs

PAIR = {"image": "a.png", "prompt": "What?", "answer": "a dog"}


def write(folder: Path, *lines: object) -> Path:
    (folder / "a.png").touch()
    path = folder / "pairs.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_pairs_are_read_in_order_with_paths_from_the_files_folder(tmp_path: Path) -> None:
    whole = str(tmp_path / "a.png")
    path = write(tmp_path, PAIR, b"", {"image": whole, "prompt": "", "answer": "schön\u2028", "source": "x"}, b" \r")
    assert read_pairs(path) == [
        Pair(image=tmp_path / "a.png", prompt="What?", answer="a dog"),
        Pair(image=Path(whole), prompt="", answer="schön\u2028"),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "line 2: not readable as JSON"),
        (b'["a.png"]', "line 2: must hold a JSON object, got list"),
        (b'{"image": "\xff"}', "line 2: not UTF-8"),
        ({"image": "a.png"}, "line 2: prompt, answer missing"),
        ({**PAIR, "prompt": 3}, "line 2: prompt must be text"),
        ({**PAIR, "answer": ""}, "line 2: answer is empty"),
        ({**PAIR, "image": "b.png"}, "line 2: there is no image"),
        ({**PAIR, "image": "."}, "line 2: there is no image"),
        ({**PAIR, "image": "a\0"}, "line 2: there is no image"),
        ({**PAIR, "image": "a" * 5000}, "line 2: there is no image"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: object, complaint: str) -> None:
    with pytest.raises(PairsError, match=complaint):
        read_pairs(write(tmp_path, PAIR, line))


def test_a_file_without_pairs_or_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="has no pairs"):
        read_pairs(write(tmp_path, b"", b" "))
    with pytest.raises(PairsError, match="cannot be read"):
        read_pairs(tmp_path / "nothing.jsonl")
    with pytest.raises(PairsError, match="cannot be read"):
        read_pairs(tmp_path)
