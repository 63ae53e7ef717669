"""What the interpreter in the box runs: limits first, then the code that nobody trusts.

This file is copied into the box and must not import anything of this package. Outside, only `encode` and `decode` are
used. Values cross as lines of JSON, so what comes out is plain data whose type and equality the code has no part in.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys
import threading
from typing import Any

_CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any) -> Any:
    """A value as JSON: lists and numbers as they are, other containers as {kind: items}.

    Raises:
        TypeError: If it is, or holds, something other than plain data.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(item) for item in value]
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind in _CONTAINERS.values():
        return {kind.__name__: [encode(item) for item in value]}
    if kind is bytes:
        return {"bytes": list(value)}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a value of type {kind.__name__} is no plain data")


def decode(value: Any) -> Any:
    """What `encode` was given.

    Raises:
        ValueError, TypeError: If it is nothing that `encode` writes.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("no encoded value")
    ((kind, items),) = value.items()
    # `bytes` of a number would be that many.
    if not isinstance(items, list):
        raise ValueError("no encoded value")
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](decode(item) for item in items)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in items}
    if kind == "bytes":
        return bytes(items)
    if kind == "complex":
        return complex(*items)
    raise ValueError(f"no encoded value: {kind}")


class Channel:
    """Lines of JSON over standard input and output, which the code itself no longer sees."""

    def __init__(self) -> None:
        self._input = os.fdopen(os.dup(0), "rb")
        self._output = os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._output, data) :]

    def receive(self) -> dict[str, Any]:
        """The next line; ends the process where none follows."""
        line = self._input.readline()
        if not line:
            os._exit(0)
        message: dict[str, Any] = json.loads(line)
        return message


def _error(reason: BaseException) -> dict[str, Any]:
    return {"error": [type(reason).__name__, str(reason)[:200]]}


def serve(source: str, name: str) -> None:
    """Define a function and answer calls of it."""
    channel = Channel()
    try:
        variables: dict[str, Any] = {"__name__": "solution"}
        exec(compile(source, "solution.py", "exec"), variables)
        function = variables[name]
    except BaseException as reason:
        channel.send(_error(reason))
        return
    channel.send({"ready": True})
    while True:
        args, keywords = decode(channel.receive()["call"])
        try:
            message = {"value": encode(function(*args, **keywords))}
        except BaseException as reason:
            message = _error(reason)
        channel.send(message)


def check(source: str) -> None:
    """Run a `check(candidate)` whose candidate lives in another box."""
    channel = Channel()

    def candidate(*args: Any, **keywords: Any) -> Any:
        channel.send({"call": encode((list(args), keywords))})
        reply = channel.receive()
        if "error" in reply:
            kind, text = reply["error"]
            error = getattr(builtins, kind, None)
            # What a test expects to be raised; anything else must not end the test as if it were its own.
            if isinstance(error, type) and issubclass(error, Exception):
                raise error(text)
            raise RuntimeError(f"{kind}: {text}")
        return decode(reply["value"])

    try:
        variables: dict[str, Any] = {"__name__": "check"}
        exec(compile(source, "check.py", "exec"), variables)
        variables["check"](candidate)
    except BaseException as reason:
        channel.send(_error(reason))
        return
    channel.send({"passed": True})


def main() -> None:
    """Read the task, its length in eight bytes before it; what follows is the program's own input."""
    task = json.loads(_read(int.from_bytes(_read(8), "big")))
    for kind, limit in task["limits"].items():
        resource.setrlimit(getattr(resource, kind), (limit, limit))
    # Threads' stacks count as memory, so eight MiB each would not leave room for many.
    threading.stack_size(1 << 20)
    sys.argv = [""]
    if task["mode"] == "program":
        variables = {"__name__": "__main__", "__builtins__": builtins}
        exec(compile(task["source"], "solution.py", "exec"), variables)
    elif task["mode"] == "function":
        serve(task["source"], task["name"])
    else:
        check(task["source"])


def _read(count: int) -> bytes:
    """Exactly that many bytes, none buffered beyond."""
    data = b""
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part:
            raise EOFError("the task is cut")
        data += part
    return data


if __name__ == "__main__":
    main()
