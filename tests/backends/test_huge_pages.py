"""Ranges are found and gathered, and what stands in them stays."""

from __future__ import annotations

import mmap
import sys

import pytest

from transom.backends.onnxruntime import huge_pages as module
from transom.backends.onnxruntime.huge_pages import PAGE, _grown, huge_pages

Ranges = list[tuple[int, int]]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [(0, 4)], [(0, 4)]),
        ([(0, 4)], [(0, 4)], []),
        ([(2, 4)], [(0, 9)], [(0, 2), (4, 9)]),
        ([(0, 2), (5, 6)], [(1, 3), (4, 8)], [(2, 3), (4, 5), (6, 8)]),
    ],
)
def test_only_what_was_added(before: Ranges, after: Ranges, expected: Ranges) -> None:
    assert list(_grown(before, after)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
def test_new_memory_is_offered_whole_and_keeps_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: Ranges = []
    collapse = module._collapse

    def recording(start: int, stop: int) -> None:
        offered.append((start, stop))
        collapse(start, stop)

    monkeypatch.setattr(module, "_collapse", recording)
    content = bytes(range(256)) * (6 * PAGE // 256)
    with huge_pages():
        memory = mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = content
    assert sum(stop - start for start, stop in offered) >= len(content)
    assert memory[:] == content


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(module, "_collapse", lambda start, stop: pytest.fail("touched memory"))
    with huge_pages():
        pass
