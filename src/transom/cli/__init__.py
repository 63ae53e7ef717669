"""The command line. Exit codes: 0 done, 2 bad input or a missing part; 1 is kept for checks that fail."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from transom import __version__
from transom.cli import bisect, build, evaluate, export, models, qat, quantize, ranges, run, validate
from transom.graphs.errors import TransomError

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
evaluate.register(app)
ranges.register(app)


def main() -> None:
    """Run the command line; a `TransomError` becomes one line and exit code 2."""
    try:
        app()
    except TransomError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}", highlight=False)
    sys.exit(2)
