"""`transom ranges`: which layers' numbers a narrower format cannot hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from transom.cli.export import stage_bars
from transom.cli.options import Json, Model, Seed, Weights, console, load_model, print_json

if TYPE_CHECKING:
    from transom.export.ranges import Ranges, ValueRange
    from transom.formats.number_format import NumberFormat


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(ranges)


def ranges(
    model: Model,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to read; by default one of ours.")] = None,
    dtype: Annotated[str, typer.Option(help="Format: float16, bfloat16 or float8_e4m3fn.")] = "float16",
    tokens: Annotated[
        int | None, typer.Option(help="How many tokens of the text; by default 1,024 or the context.", min=1)
    ] = None,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Trace the ranges of a model's numbers over a text.

    Exit code 1 if something leaves the format's range, or is NaN or infinite; 2 if a checkpoint's own weight is.
    """
    from transom.formats.number_format import float_format
    from transom.validation.ranges import ranges_of

    number_format = float_format(dtype)
    loaded = load_model(model, weights, seed)
    with stage_bars() as on_progress:
        value_ranges = ranges_of(loaded, text=text, tokens=tokens, seed=seed, on_progress=on_progress)
    if json:
        print_json(value_ranges.to_json(number_format))
    else:
        _show(value_ranges, number_format)
    if value_ranges.overflowing(number_format):
        raise typer.Exit(1)


def _show(value_ranges: Ranges, number_format: NumberFormat) -> None:
    """The tightest value of every layer, then every value that overflows."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.title = f"{escape(value_ranges.model)} in {number_format.name}, {value_ranges.tokens:,} tokens"
    for name in ("layer", "largest value", "magnitude", "headroom", "overflow", "to zero"):
        # Where the terminal is narrow, long names are folded, and numbers stay whole.
        table.add_column(
            name,
            justify="left" if name in ("layer", "largest value") else "right",
            no_wrap=name != "largest value",
            overflow="fold",
        )
    groups: dict[str, list[ValueRange]] = {}
    for value in value_ranges.values:
        kind = "weights" if value.op == "weight" else "outside" if value.layer is None else str(value.layer)
        groups.setdefault(kind, []).append(value)
    for kind, values in groups.items():
        # What is not finite first makes all that follows so.
        nonfinite = [value for value in values if value.observation.nonfinite]
        worst = nonfinite[0] if nonfinite else max(values, key=lambda value: value.observation.largest)
        numbers = worst.to_json(number_format)
        table.add_row(
            kind,
            escape(worst.name.removeprefix(f"layers.{kind}.")),
            "not finite" if nonfinite else f"{numbers['largest']:,.4g}",
            "" if nonfinite else _bits(worst.headroom(number_format), overflows=bool(numbers["overflows"])),
            f"{numbers['overflow_share']:.1e}" if numbers["overflows"] and not nonfinite else "",
            f"{max(value.to_json(number_format)['underflow_share'] for value in values):.1e}",
        )
    console.print(table)
    for value in value_ranges.overflowing(number_format):
        count, finite = value.observation.nonfinite, value.observation.count
        if count:
            what, amount = "not finite:", f": {count:,.0f} of {count + finite:,.0f} numbers are NaN or infinite"
        else:
            what, amount = "out of range:", f" reaches {value.observation.largest:,.4g}"
        console.print(f"[red]{what}[/red] {escape(value.name)}{amount}", highlight=False)
    if not value_ranges.overflowing(number_format):
        console.print(f"everything is in the range of {number_format.name}")


def _bits(headroom: float, *, overflows: bool) -> str:
    bits = "all zero" if math.isinf(headroom) else f"{headroom:+.1f} bits"
    return f"[red]{bits}[/red]" if overflows else bits
