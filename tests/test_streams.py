"""The command line as a process: streams of any encoding, closed pipes, full disks, signals."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.artifacts import Export

UTF8 = {"LC_ALL": "C.UTF-8", "COLUMNS": "200"}
RUN = ("--prompt", "café → 日本", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def artifact(exported: Export) -> Path:
    return exported("onnxruntime", "none").folder


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", "from transom.cli import main; main()", *map(os.fspath, map(str, args))]


def execute(
    args: Sequence[object],
    variables: Mapping[str, str] = UTF8,
    *,
    stdin: bytes = b"",
    stdout: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command with some environment variables."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    return subprocess.run(
        command(*args),
        input=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment | dict(variables),
        check=False,
    )


CONSOLES: dict[str, dict[str, str]] = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "strict": {"PYTHONIOENCODING": "ascii:strict"},
    "C": {"LC_ALL": "C"},
    "C without UTF-8": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture(scope="module")
def expected(artifact: Path) -> list[int]:
    """Tokens that a console of UTF-8 gives."""
    tokens: list[int] = json.loads(execute(("run", artifact, *RUN, "--json")).stdout)["tokens"]
    return tokens


@pytest.mark.parametrize("console", CONSOLES)
def test_consoles_that_are_not_utf8(console: str, artifact: Path, expected: list[int]) -> None:
    variables = CONSOLES[console]
    plain, printed = (execute(("run", artifact, *RUN, *json), variables) for json in ((), ("--json",)))
    assert (plain.returncode, printed.returncode) == (0, 0), plain.stderr + printed.stderr
    # The prompt is the same text, whatever the console can show of it.
    assert json.loads(printed.stdout)["tokens"] == expected
    assert plain.stdout.startswith("café → 日本".encode() if console == "C" else b"caf")
    shown = execute(("inspect", artifact), variables)
    assert shown.returncode == 0 and b"BoundLocalCaches" in shown.stdout, shown.stderr
    if console != "C":
        assert shown.stdout.isascii() and b"+--" in shown.stdout


def test_a_name_that_is_no_utf8(artifact: Path, tmp_path: Path) -> None:
    link = os.fsencode(tmp_path) + b"/caf\xe9"
    os.symlink(artifact, link)
    shown = execute(("inspect", os.fsdecode(link)))
    # The table may break the path where a line ends.
    assert shown.returncode == 0 and b"caf\xe9" in b"".join(shown.stdout.split()), shown.stderr


LINES = {
    "run": ("run", *RUN),
    "inspect": ("inspect",),
    "inspect --json": ("inspect", "--json"),
    "help": ("run", "--help"),
}


def with_folder(line: str, artifact: Path) -> list[object]:
    name, *options = LINES[line]
    return [name, artifact, *options] if name in ("run", "inspect") and options != ["--help"] else [name, *options]


@pytest.mark.parametrize("line", LINES)
def test_a_closed_pipe_ends_it_quietly(line: str, artifact: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = execute(with_folder(line, artifact), stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("line", LINES)
def test_a_full_disk_is_one_line(line: str, artifact: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = execute(with_folder(line, artifact), stdout=full.fileno())
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1, done.stderr
    assert b"No space left" in done.stderr


def test_nobody_reads_errors(artifact: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command("run", artifact / "none", *RUN), stderr=writing, check=False)
    finally:
        os.close(writing)
    assert done.returncode == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_an_export_that_is_ended_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    args = command("export", "gemma3-tiny", "-o", tmp_path / "model", "--context", "128")
    # Whoever runs the tests in the background may have them ignore it.
    listen = functools.partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == [".model.partial"]
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, b"", b"")
    assert list(tmp_path.iterdir()) == []


ENDINGS = pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])


def interrupted(name: str, place: str) -> tuple[int, bytes, bytes]:
    """Exit code and streams of a program with a place where a signal comes."""
    script = f"""if True:
        import signal, sys, time
        from transom.cli.signals import orderly_end
        {place}
        try:
            with orderly_end():
                come(lambda: signal.raise_signal(signal.{name}))
                time.sleep(60)
        except KeyboardInterrupt:
            sys.exit(130)
    """
    listen = functools.partial(signal.signal, getattr(signal, name), signal.SIG_DFL)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, preexec_fn=listen, timeout=60)
    return ended.returncode, ended.stdout, ended.stderr


@ENDINGS
def test_a_signal_that_comes_in_a_finaliser_is_not_lost(name: str, code: int) -> None:
    """Python drops what is raised there."""
    place = "come = lambda send: type('Finalised', (), {'__del__': lambda self: send()})() and None"
    assert interrupted(name, place) == (code, b"", b"")


@ENDINGS
def test_a_signal_that_comes_in_a_dispatch_waits_for_its_end(name: str, code: int) -> None:
    """PyTorch aborts the process where an exception leaves a mode set that C++ sets again."""
    place = """
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, arguments=(), options=None):
                self.send()
                print("to its end", flush=True)
                return operation(*arguments, **(options or {}))
        def come(send):
            with Mode() as mode:
                mode.send = send
                torch.ones(1).neg()
    """
    ended, out, errors = interrupted(name, place)
    assert (ended, errors) == (code, b"")
    assert out.decode().split("\n")[0] == "to its end"


def test_an_ignored_signal_stays_ignored(artifact: Path) -> None:
    line = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from transom.cli import main; main()"
    hang_up = (
        "import os, signal, transom.cli.run as run\n"
        "from transom.errors import SessionError\n"
        "def opened(*_):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    raise SessionError('after the signal')\n"
        "run._open = opened\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hang_up + line, "run", str(artifact), *RUN], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, b"error: after the signal\n")


def test_chat_leaves_out_lines_and_goes_on(artifact: Path) -> None:
    lines = ["first", "caf\udce9", "y" * 2000, "\ufeffthird"]
    stdin = "\n".join(lines).encode("utf-8-sig", "surrogateescape")
    options = ("--temperature", "0", "--max-new-tokens", "4")
    done = execute(("chat", artifact, *options), stdin=stdin)
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.decode().splitlines()
    assert "the line is not UTF-8" in first
    assert "the conversation has" in second and "its context holds 512" in second
    # As if nobody had said the two.
    without = execute(("chat", artifact, *options), stdin=b"first\nthird")
    assert done.stdout == without.stdout and without.stderr == b""


def test_standard_input_as_a_prompt(artifact: Path) -> None:
    options = ("--max-new-tokens", "3", "--json")
    piped = execute(("run", artifact, "--prompt-file", "-", *options), stdin=b"\xef\xbb\xbfhello")
    named = execute(("run", artifact, "--prompt", "hello", *options))
    assert json.loads(piped.stdout)["tokens"] == json.loads(named.stdout)["tokens"]
    refused = execute(("run", artifact, "--prompt-file", "-", *options), stdin=b"caf\xe9")
    assert refused.returncode == 2 and b"standard input is not UTF-8 (byte 0xe9 at 3)" in refused.stderr
