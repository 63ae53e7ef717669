"""The README is short, and what it and the pages of docs/ name exists: files, headings, commands, options."""

from __future__ import annotations

import collections
import functools
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from transom.cli import app
from transom.formats.schemes import SCHEMES
from transom.passes.targets import TARGETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
INDEX = DOCS / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

README_LINES = 150
PLACEHOLDERS = {"NAME", "VERB_PHRASE"}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_OPTION = re.compile(r"--?[a-z]")

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Typer shares click's class or brings its own, by its version."""


class Command(NamedTuple):
    """A command as a page shows it.

    Attributes:
        words: What follows the program's name.
        complete: Whether it stands in a block of code, to be copied; else in a sentence.
    """

    words: list[str]
    complete: bool


@functools.cache
def command_line() -> Any:
    """The group of all commands."""
    return typer.main.get_command(app)


def options_of(command: Any) -> set[str]:
    """Every option of a command or group, in all its spellings."""
    return {"--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))}


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """Code in the sentences of a page; a span may go over the end of a line."""
    return [" ".join(span.split()) for span in _SPAN.findall(prose(text))]


def shell_lines(text: str) -> Iterator[str]:
    """Lines of the blocks that are not Python or a picture, without comments; continued lines are one."""
    for language, block in _FENCE.findall(text):
        if language in ("", "sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                yield re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")


def commands(text: str) -> Iterator[Command]:
    """Every `transom` command of a page."""
    for line in shell_lines(text):
        if line.startswith("transom "):
            yield Command(shlex.split(re.split(r"\s[|<>]", line)[0])[1:], complete=True)
    for span in spans(text):
        if span.startswith("transom "):
            yield Command(span.split()[1:], complete=False)


def make_targets(text: str) -> set[str]:
    """Every target of a `make` command on a page."""
    lines = {*shell_lines(text), *spans(text)}
    return {word for line in lines if line.startswith("make ") for word in line.split()[1:] if "=" not in word}


def command_fault(command: Command) -> str | None:
    """Why the command line would not take a command; None if it would."""
    group = command_line()
    name, *rest = command.words
    if name.startswith("-") or name == "COMMAND":
        unknown = {word for word in (*rest, name) if word.startswith("-")} - options_of(group)
        return f"transom has no option {', '.join(sorted(unknown))}" if unknown else None
    if (known := group.commands.get(name)) is None:
        return f"there is no command {name!r}"
    shown = {word.partition("=")[0] for word in rest if _OPTION.match(word)}
    if unknown := shown - options_of(known):
        return f"transom {name} has no option {', '.join(sorted(unknown))}"
    if command.complete:
        try:
            known.make_context(name, list(rest))
        except _UsageError as error:
            return f"transom {name}: {getattr(error, 'format_message', error.__str__)()}"
    return None


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    count: collections.Counter[str] = collections.Counter()
    slugs = set()
    for heading in _HEADING.findall(prose_without_markup(text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        slugs.add(slug if not count[slug] else f"{slug}-{count[slug]}")
        count[slug] += 1
    return slugs


def prose_without_markup(text: str) -> str:
    """A page's prose, links as their words."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose(text))


def links(text: str) -> list[str]:
    """Targets of the links of a page that lead into the repository."""
    return [link for link in _LINK.findall(prose(text)) if not re.match(r"[a-z]+:", link)]


def link_fault(page: Path, link: str) -> str | None:
    """Why a link leads nowhere; None if it does not."""
    name, _, anchor = link.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not file.is_relative_to(ROOT) or not file.exists():
        return f"{link}: there is no such file in the repository"
    if anchor and anchor not in anchors(file.read_text()):
        return f"{link}: there is no such heading"
    return None


def makefile_targets() -> set[str]:
    """Targets that a person may name."""
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def paths(text: str) -> set[str]:
    """Paths of the repository that a page names in its sentences, except those with a placeholder."""
    tops = {path.name for path in ROOT.iterdir()}
    named = {span for span in spans(text) if re.fullmatch(r"[\w./*-]+", span)}
    return {
        name
        for name in named
        if (name.split("/")[0] in tops or re.search(r"/.*\.(py|md|json|toml)$", name))
        and not PLACEHOLDERS & set(re.split(r"[/.]", name))
    }


def cells(page: str) -> str:
    """The table rows of a page of docs/."""
    return "\n".join(line for line in (DOCS / page).read_text().splitlines() if line.startswith("|"))


def expect_no_faults(page: Path, faults: Iterable[str | None]) -> None:
    """Fail with every fault of a page."""
    lines = [f"{page.relative_to(ROOT)}: {fault}" for fault in faults if fault]
    assert not lines, "\n".join(lines)


def test_readme_is_short() -> None:
    lines = len((ROOT / "README.md").read_text().splitlines())
    assert lines <= README_LINES, f"README.md has {lines} lines: move depth to docs/"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
class TestPage:
    """What one page names."""

    def test_links(self, page: Path) -> None:
        expect_no_faults(page, (link_fault(page, link) for link in links(page.read_text())))

    def test_commands(self, page: Path) -> None:
        expect_no_faults(page, map(command_fault, commands(page.read_text())))

    def test_options_in_sentences(self, page: Path) -> None:
        known = options_of(command_line()).union(*map(options_of, command_line().commands.values()))
        named = {span.split()[0] for span in spans(page.read_text()) if span.startswith("--")}
        assert named <= known, f"{page}: no command has {named - known}"

    def test_make_targets(self, page: Path) -> None:
        named = make_targets(page.read_text())
        assert named <= makefile_targets(), f"{page}: the Makefile has no {named - makefile_targets()}"

    def test_paths(self, page: Path) -> None:
        missing = {name for name in paths(page.read_text()) if not list(ROOT.glob(name))}
        assert not missing, f"{page}: there is no {missing}"


def test_every_page_is_listed() -> None:
    names = {path.name for path in DOCS.glob("*.md")}
    listed = {link.partition("#")[0] for link in links(INDEX.read_text())}
    linked = {link.partition("#")[0] for link in links((ROOT / "README.md").read_text())}
    assert names - {INDEX.name} <= listed
    assert {f"docs/{name}" for name in names} <= linked


def test_every_page_opens_with_what_it_tells() -> None:
    for path in DOCS.glob("*.md"):
        title, empty, opening, *_ = path.read_text().splitlines()
        assert title.startswith("# ") and not empty and opening.startswith("This page "), path


def test_every_command_scheme_and_target_is_described() -> None:
    described = {one.words[0] for one in commands(cells("command-line.md"))}
    assert set(command_line().commands) <= described
    for names, page in ((SCHEMES, "quantization.md"), (TARGETS, "targets.md")):
        assert not [name for name in names if f"`{name}`" not in cells(page)]


def test_code_blocks_are_read() -> None:
    """The checks above see what they are for: commands and make targets in blocks, links, and options."""
    readme = (ROOT / "README.md").read_text()
    assert {"export", "validate"} <= {one.words[0] for one in commands(readme) if one.complete}
    assert {"demo", "test"} <= make_targets(readme)
    assert len(links(readme)) > 10


@pytest.mark.parametrize(
    "line",
    [
        "transom exprot gemma -o DIR",
        "transom export gemma --no-such-option -o DIR",
        "transom export gemma",
        "transom plan gemma3-4b --context many",
        "transom run a b",
    ],
)
def test_wrong_commands_are_faults(line: str) -> None:
    (command,) = commands(f"```\n{line}    # words\n```\n")
    assert command_fault(command)


@pytest.mark.parametrize("link", ["docs/none.md", "docs/targets.md#none", "#none", "../README.md"])
def test_wrong_links_are_faults(link: str) -> None:
    assert link_fault(ROOT / "README.md", link)
