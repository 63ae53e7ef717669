"""The command line.

Exit codes: 0 done; 1 is kept for checks that fail; 2 bad input or a missing part, told in one line. As for other
commands: 130 interrupted, 141 nobody reads the output any more, 143 asked to end.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer
from rich.markup import escape

from transom import __version__
from transom.cli import (
    align,
    bisect,
    build,
    distill,
    evaluate,
    export,
    finetune_vision,
    learn_windows,
    merge,
    models,
    qat,
    quantize,
    ranges,
    reward_model,
    run,
    validate,
)
from transom.cli.options import progress_console
from transom.cli.signals import orderly_end
from transom.cli.streams import abandon, flush, make_lenient
from transom.errors import TransomError

BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 2, 130, 141

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Typer shares click's class or brings its own, by its version; only those that are derived from it have a name."""

app = typer.Typer(
    name="transom",
    invoke_without_command=True,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Local:global transformers, traced once, lowered to many runtimes."""
    if version:
        print(__version__)
        raise typer.Exit


models.register(app)
export.register(app)
build.register(app)
run.register(app)
validate.register(app)
bisect.register(app)
quantize.register(app)
qat.register(app)
distill.register(app)
align.register(app)
reward_model.register(app)
merge.register(app)
finetune_vision.register(app)
learn_windows.register(app)
evaluate.register(app)
ranges.register(app)


def main() -> None:
    """Run the command line; see the top of this file for its exit codes."""
    make_lenient()
    code: str | int | None
    with orderly_end():
        try:
            code = _code()
        except SystemExit as stop:
            code = stop.code
    abandon()
    sys.exit(code)


def _code() -> int:
    """Run a command; returns its exit code."""
    try:
        code = app(prog_name="transom", standalone_mode=False)
        flush()
    except TransomError as error:
        return _failed(str(error))
    except _UsageError as error:
        return _misused(error)
    except typer.Abort:
        return _failed("the input ended too early: give an answer")
    except MemoryError as error:
        return _failed(f"not enough memory ({str(error) or 'for this'}): choose a smaller model, context or chunk")
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        # The library for commands turns a closed pipe into one of these.
        if isinstance(stop.__context__, BrokenPipeError):
            return CLOSED_PIPE
        raise
    except BrokenPipeError:
        return CLOSED_PIPE
    except OSError as error:
        place = error.filename or "a stream or file cannot be read or written"
        return _failed(f"{place}: {error.strerror or error}")
    return int(code or 0)


def _misused(error: Exception) -> int:
    """Tell what is wrong with the words of a command; where there are none, its help was shown."""
    words = " ".join(getattr(error, "format_message", error.__str__)().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return _failed(f"{words}: see {context.command_path if context else 'transom'} --help") if words else BAD_INPUT


def _failed(message: str) -> int:
    # Where nobody reads the errors, the exit code still tells.
    with contextlib.suppress(OSError):
        line = f"[red]error:[/red] {escape(message)}"
        progress_console.print(line, highlight=False, soft_wrap=True)
    return BAD_INPUT
