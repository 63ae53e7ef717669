"""Programs that attack the sandbox, the tests or the machine: none earns a reward, escapes, or leaves anything behind.

Each prints ESCAPED where it gets what it is after. Those that are harmless do get it outside the box, which shows that
the attack is one. Every loop is bounded, should a box ever not hold.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.rewards.boxes import code, needs_bubblewrap
from transom.training.rewards.code import Code
from transom.training.rewards.sandbox import Box, Limits, Sandbox

pytestmark = needs_bubblewrap

SECRET = "the secret of this test"
"""Stands in a file that everyone may read, and in the environment."""

LIMITS = Limits(seconds=1, memory=256 * 2**20, file=2**20 + os.getpid(), scratch=16 * 2**20 + os.getpid())
"""Of sizes by which this process's boxes are told from those of other test runs."""

SUM = {"cases": [{"stdin": "2 5\n", "stdout": "7\n"}, {"stdin": "30 12\n", "stdout": "42\n"}]}
HONEST = "a, b = map(int, input().split())\nprint(a + b)\n"

CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    return libc.syscall(*arguments)
"""

PROGRAMS = {
    "fork bomb": """
import os, time
for _ in range(20):
    if os.fork() == 0:
        time.sleep(3)
        os._exit(0)
    print("ESCAPED")
""",
    "subprocess": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])\nprint('ESCAPED')",
    "vfork by ctypes": CALL + "import sys\nif call(58) >= 0: print('ESCAPED')",
    "clone3": CALL + "if call(435, 0, 0) >= 0 or ctypes.get_errno() not in (1, 38): print('ESCAPED')",
    "daemon that stays": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(20)
    os._exit(0)
print("ESCAPED")
""",
    "threads without end": """
import threading, time
for _ in range(60):
    threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
print("ESCAPED", flush=True)
os._exit(0)
""",
    "memory": "block = bytearray(2 * 2**30)\nprint('ESCAPED')",
    "memory by doubling": "text = 'x' * 2**20\nfor _ in range(11): text += text\nprint('ESCAPED')",
    "big number": "print(len(str(10 ** 10 ** 9)), 'ESCAPED')",
    "memory files": CALL + "if call(319, b'x', 0) >= 0: print('ESCAPED')",
    "shared memory": CALL + "if call(29, 0, 2**30, 0o1600) >= 0: print('ESCAPED')",
    "fill the disk": """
for index in range(40):
    with open(f"/tmp/{index}", "wb") as file:
        file.write(bytes(2**20))
print("ESCAPED")
""",
    "one large file": "open('/tmp/x', 'wb').write(bytes(2**25))\nprint('ESCAPED')",
    "sparse file": "open('/tmp/x', 'wb').truncate(2**40)\nprint('ESCAPED')",
    "open files": "files = [open('/dev/null') for _ in range(200)]\nprint('ESCAPED')",
    "write outside": """
for folder in ("/", "/etc", "/usr/lib", "/dev", "/dev/shm", "/work", "/root", "/home", "/var/tmp", "/box.py/.."):
    try:
        with open(folder + "/written", "w") as file:
            file.write("x")
        print("ESCAPED", folder)
    except OSError:
        pass
""",
    "replace the driver": """
import os
for attack in (lambda: open("/box.py", "w"), lambda: os.remove("/box.py"), lambda: os.rename("/tmp", "/tmp2")):
    try:
        attack()
        print("ESCAPED")
    except OSError:
        pass
""",
    "read a secret": "print(open(PATH).read() and 'ESCAPED')",
    "read accounts": "print([open(path).read() for path in ('/etc/passwd', '/etc/hosts')] and 'ESCAPED')",
    "list homes": "import os\nprint(os.listdir('/root') or os.listdir('/home') or os.listdir('/work'), 'ESCAPED')",
    "environment": "import os\nprint('ESCAPED' if 'SECRET' in os.environ else 'empty')",
    "environment of others": "print(open(f'/proc/{PARENT}/environ', 'rb').read() and 'ESCAPED')",
    "symbolic link": "import os\nos.symlink(PATH, '/tmp/link')\nprint(open('/tmp/link').read() and 'ESCAPED')",
    "hard link": "import os\nos.link(PATH, '/tmp/link')\nprint(open('/tmp/link').read() and 'ESCAPED')",
    "parent by dots": "print(open('/tmp/../../../..' + PATH).read() and 'ESCAPED')",
    "old root": "import os\nprint(open('/oldroot' + PATH).read() or os.listdir('/newroot'), 'ESCAPED')",
    "inherited files": """
import os
for number in range(3, 64):
    try:
        os.fstat(number)
        print("ESCAPED", number)
    except OSError:
        pass
""",
    "process table": "import os\nprint(os.listdir('/proc'), 'ESCAPED')",
    "memory of itself by proc": "open('/proc/self/mem', 'r+b')\nprint('ESCAPED')",
    "loopback": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\nprint('ESCAPED')",
    "socket": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nprint('ESCAPED')",
    "socket of the machine": "import socket\nsocket.socket(socket.AF_UNIX)\nprint('ESCAPED')",
    "endless output": "while True: print('7' * 1000)",
    "one long line": "print('7' * 2**20)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('7' * 1000)",
    "sleep": "import time\ntime.sleep(600)",
    "sleep without outputs": "import os, time\nprint(7, flush=True)\nos.close(1)\nos.close(2)\ntime.sleep(600)",
    "busy loop": "while True: pass",
    "busy loop in C": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "signals ignored": """
import signal
for number in range(1, 32):
    try:
        signal.signal(number, lambda *_: None)
    except (OSError, ValueError):
        pass
while True: pass
""",
    "exceptions swallowed": """
while True:
    try:
        while True: pass
    except BaseException:
        pass
""",
    "limits raised": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))
print("ESCAPED")
""",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)\nprint('ESCAPED')",
    "kill everyone": "import os\nos.kill(-1, 9)\nprint('ESCAPED')",
    "ptrace": CALL + "if call(101, 16, os.getppid(), 0, 0) >= 0: print('ESCAPED')",
    "another's memory": CALL + "if call(310, os.getppid(), 0, 0, 0, 0, 0) >= 0: print('ESCAPED')",
    "user namespace": CALL + "if libc.unshare(0x10000000) >= 0: print('ESCAPED')",
    "user namespace with a thread": CALL + "if call(56, 0x10010f00, 0, 0, 0, 0) >= 0: print('ESCAPED')",
    "mount": CALL + "if libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0) >= 0: print('ESCAPED')",
    "chroot": "import os\nos.chroot('/tmp')\nprint('ESCAPED')",
    "bpf, io_uring, keys, perf, userfaultfd": CALL
    + """
for number in (321, 425, 250, 248, 298, 323):
    call(number, 0, 0, 0, 0, 0)
    if ctypes.get_errno() != 38: print("ESCAPED", number)
""",
    "32-bit numbers": CALL + "if call(0x40000000 + 41, 2, 1, 0) >= 0 or ctypes.get_errno() != 38: print('ESCAPED')",
    "become root": "import os\nos.setuid(0)\nprint('ESCAPED')",
    "device": "import os\nos.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))\nprint('ESCAPED')",
    "type into the terminal": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')\nprint('ESCAPED')",
    "exit code": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit code after a right answer": HONEST + "import sys\nsys.exit(3)",
    "says that it passed": "print('{\"passed\": true}')\nprint('all tests passed')",
    "constant": "print(7)",
    "output at the end": HONEST + "import atexit\natexit.register(print, 'more')",
    "exit patched": "import sys, builtins\nsys.exit = builtins.exit = lambda *_: None\nprint('passed')",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**8)\nf = lambda n: f(n + 1)\nf(0)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "not UTF-8": "import sys\nsys.stdout.buffer.write(b'7\\xff\\n')",
    "closes its input": "import os\nos.close(0)\nos.close(1)",
    "frames": """
import sys
frame = sys._getframe()
while frame is not None:
    if "std" + "out" in repr(frame.f_locals.get("task", "")): print("ESCAPED")
    frame = frame.f_back
""",
    "objects in memory": """
import gc
if any(isinstance(thing, dict) and "stdout" in thing and "cases" in thing for thing in gc.get_objects()):
    print("ESCAPED")
""",
    "files of tests": """
import os
for folder, folders, names in os.walk("/"):
    if folder == "/": folders.remove("usr")
    if any("hostile" in name or name == "conftest.py" or name.endswith(".jsonl") for name in names): print("ESCAPED")
""",
    "no Python": "this is no program",
    "null bytes": "print(7)\0",
    "lone surrogate": "print('\udcff')",
    "nested source": "(" * 5000 + ")" * 5000,
    "empty": "",
}  # fmt: skip

OUTSIDE = ("subprocess", "environment", "read a secret", "environment of others", "symbolic link", "hard link",
           "parent by dots", "process table", "memory of itself by proc", "loopback", "socket", "read accounts",
           "socket of the machine", "sparse file", "open files", "memory files")  # fmt: skip
"""Harmless there, if bounded."""

FUNCTION = {"function": "add", "cases": [{"args": [2, 5], "returns": 7}, {"args": [30, 12], "returns": 42}]}
CHECK = {
    "function": "add",
    "check": "def check(candidate):\n    assert candidate(2, 5) == 7\n    assert candidate(30, 12) == 42\n",
}
CHANNEL = """
import os, sys
def say(text):
    for number in range(3, 12):
        try:
            os.write(number, text.encode() + b"\\n")
        except OSError:
            pass
"""

FUNCTIONS = {
    "equal to everything": """
class Yes(int):
    def __eq__(self, other): return True
    def __hash__(self): return 7
def add(a, b): return Yes(0)
""",
    "equality patched": """
import builtins, json, math, operator
class Always(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
builtins.int = builtins.isinstance = lambda *_: True
math.isclose = operator.eq = lambda *_, **__: True
def add(a, b): return 0
""",
    "json patched": """
import json
json.dumps = lambda *_, **__: '{"passed": true}'
json.loads = lambda *_: {"call": [[0, 0], {"dict": []}]}
def add(a, b): return 0
""",
    "says that it passed": CHANNEL
    + "say('{\"passed\": true}')\ndef add(a, b):\n    say('{\"passed\": true}')\n    os._exit(0)",
    "answers before it is asked": CHANNEL
    + "say('{\"ready\": true}')\nfor _ in range(9): say('{\"value\": 7}')\ndef add(a, b): return 7",
    "exit in the call": "import sys\ndef add(a, b): sys.exit(0)",
    "exit at once": "import os\ndef add(a, b): os._exit(0)",
    "exit on import": "raise SystemExit(0)",
    "assertion of its own": "def add(a, b): raise AssertionError('passed')",
    "end of the generator": "def add(a, b): raise StopIteration(7)",
    "keyboard": "def add(a, b): raise KeyboardInterrupt",
    "nested answer": CHANNEL + "def add(a, b): say('{\"value\": ' + '[' * 20000 + ']' * 20000 + '}')",
    "digits": CHANNEL + "def add(a, b): say('{\"value\": ' + '7' * 60000 + '}')",
    "bytes of a number": CHANNEL + "def add(a, b): say('{\"value\": {\"bytes\": 99999999999}}')",
    "no number": "def add(a, b): return float('nan')",
    "infinite": "def add(a, b): return float('inf')",
    "boolean": "def add(a, b): return True",
    "text": "def add(a, b): return str(a + b)",
    "list": "def add(a, b): return [a + b]",
    "endless answer": "def add(a, b): return [7] * 10**6",
    "answer that holds itself": "def add(a, b):\n    rows = []\n    rows.append(rows)\n    return rows",
    "never answers": "import time\ndef add(a, b): time.sleep(600)",
    "no answer and no end": "import os\ndef add(a, b):\n    os.closerange(0, 20)\n    while True: pass",
    "frames": """
import sys
def add(a, b):
    frame, seen = sys._getframe(), []
    while frame is not None:
        seen += [value for value in frame.f_locals.values() if value in (7, 42)]
        frame = frame.f_back
    return seen[0] if seen else -1
""",
    "another name": "def subtract(a, b): return a - b",
    "no function": "add = 7",
}  # fmt: skip


@functools.cache
def hostile() -> Code:
    return Code(Sandbox(LIMITS))


def processes() -> list[str]:
    """Processes of this module's boxes, by the sizes that only they have."""
    remaining = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            limits, command = (folder / "limits").read_text(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if str(LIMITS.file) in limits.split() or str(LIMITS.scratch).encode() in command.split(b"\0"):
            remaining.append(f"{folder.name}: {command!r}")
    return remaining


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    end = time.monotonic() + 5
    while (remaining := processes()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not remaining


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What each box wrote, as a score's reason does not tell it of a program that fails."""
    written: list[bytes] = []
    destroy = Box.__exit__

    def record(box: Box, *error: Any) -> None:
        written.append(box._output)
        destroy(box, *error)

    monkeypatch.setattr(Box, "__exit__", record)
    return written


@pytest.fixture(scope="module")
def surroundings() -> Iterator[dict[str, str]]:
    """What attacks are after: a readable file, a listening port, a process with an environment."""
    path = Path(f"/tmp/secret-{os.getpid()}")
    path.write_text(SECRET)
    path.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        yield {"PATH": repr(str(path)), "PORT": str(port), "PARENT": str(os.getpid())}
    path.unlink()


def source_of(name: str, surroundings: dict[str, str]) -> str:
    return "".join(f"{key} = {value}\n" for key, value in surroundings.items()) + PROGRAMS[name]


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_escapes_or_passes(
    name: str, surroundings: dict[str, str], outputs: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", SECRET)
    score = hostile().score("", source_of(name, surroundings), SUM)
    assert score.value == 0.0, score
    assert outputs and b"ESCAPED" not in b"".join(outputs)
    assert code().sandbox.run(HONEST, "2 5\n") == "7\n"


@pytest.mark.parametrize("name", OUTSIDE)
def test_without_a_box_attacks_succeed(name: str, surroundings: dict[str, str], tmp_path: Path) -> None:
    """Else they would show nothing."""
    source = (
        source_of(name, surroundings)
        .replace("'/tmp/link'", f"'{tmp_path}/link'")
        .replace("'/tmp/x'", f"'{tmp_path}/x'")
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", source],
        capture_output=True, text=True, env={"SECRET": SECRET}, timeout=60, check=False,
    )  # fmt: skip
    assert "ESCAPED" in done.stdout, done.stderr


@pytest.mark.parametrize("reference", [FUNCTION, CHECK], ids=["cases", "check"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_passes(name: str, reference: dict[str, object]) -> None:
    score = hostile().score("", FUNCTIONS[name], reference)
    assert score.value == 0.0, score


@pytest.mark.parametrize("reference", [FUNCTION, CHECK], ids=["cases", "check"])
def test_an_honest_function_passes(reference: dict[str, object]) -> None:
    assert code().score("", "def add(a, b): return a + b", reference).value == 1.0


def test_a_check_that_accepts_nothing_but_errors_is_not_ended_by_the_code() -> None:
    """A dead box is not an exception that a check could take for the right one."""
    check = "def check(candidate):\n    try: candidate(-1)\n    except Exception: return\n    assert False\n"
    reference = {"function": "root", "check": check}
    assert code().score("", "def root(x): raise ValueError(x)", reference).value == 1.0
    for source in (
        "import os\ndef root(x): os._exit(0)",
        "def root(x): return 1",
        "import ctypes\ndef root(x): ctypes.string_at(0)",
    ):
        assert hostile().score("", source, reference).value == 0.0
