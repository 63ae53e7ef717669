"""From object files to a shared library, with the C compiler of this computer or with zig's."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tvm.support import cc

from transom.errors import TargetError
from transom.export.tvm.processor import Processor

ZIG = (sys.executable, "-m", "ziglang", "cc")


def linker(processor: Processor) -> Callable[..., None]:
    """A function that links, in the form that TVM's `export_library` takes.

    Raises:
        TargetError: If nothing here can link for the processor.
    """
    compiler = cc.get_cc() if processor.is_native else None
    if compiler is not None:
        command: Sequence[str] = (compiler,)
    elif importlib.util.find_spec("ziglang") is not None:
        command = (*ZIG, "-target", processor.triple)
    else:
        missing = "no C compiler was found" if processor.is_native else f"linking for {processor.triple} needs zig"
        raise TargetError(f"{missing}: pip install 'transom[tvm-cross]'")

    def link(output: str, objects: Sequence[str], **_: Any) -> None:
        # The runtime brings the C library's functions; zig would build that library first.
        line = [*command, "-nostdlib", "-shared", "-fPIC", "-o", output, *objects]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            message = (done.stderr.strip() or "no message").splitlines()[-1]
            raise TargetError(f"{Path(command[0]).name} could not link for {processor.triple}: {message}")

    return link
