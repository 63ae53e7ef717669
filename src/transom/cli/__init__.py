"""The command line. Exit codes: 0 done, 1 a check failed, 2 bad input or a missing part."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from transom import __version__
from transom.cli import export, models, run
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
run.register(app)


def main() -> None:
    """Run the command line; a `TransomError` becomes one line and exit code 2."""
    try:
        app()
    except TransomError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {_plain(error)}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _plain(error: TransomError) -> str:
    # Square brackets in a message are no markup.
    return str(error).replace("[", r"\[")
