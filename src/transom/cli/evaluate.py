"""`transom evaluate`: schemes weighed: perplexity, KL and top-1 against bytes and tokens a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from transom.cli.export import stage_bars
from transom.cli.options import Seed, Threads, Weights, check_outputs, check_weights, console, print_json, size

if TYPE_CHECKING:
    from transom.validation.evaluation.result import Evaluation, Row

ModelOrDirs = Annotated[
    list[str],
    typer.Argument(metavar="MODEL_OR_DIR...", help="A model, to compile with every scheme; exported artifacts of it."),
]

COLUMNS = (
    "scheme", "size", "B/weight", "perplexity", "loss difference", "KL", "top-1", "prefill", "decode", "front",
)  # fmt: skip
WIDE = 140


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)


def evaluate(
    model_or_dirs: ModelOrDirs,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to be scored on.")],
    schemes: Annotated[
        str | None, typer.Option(help="Names of transom list with commas between; by default none,int8,int4.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Names of transom list with commas between; by default onnxruntime.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="What to compute in: float32, or bfloat16 for xla.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; by default as many as there are, up to 2,048.", min=1)
    ] = None,
    windows: Annotated[int, typer.Option(help="Sequences of that length, one after another.", min=1)] = 1,
    context: Annotated[int | None, typer.Option(help="Longest sequence; by default enough for --length.")] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Largest number of new tokens in one call; by default 256.", min=1)
    ] = None,
    decode_tokens: Annotated[int, typer.Option(help="Tokens to decode when that is timed.", min=1)] = 64,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the artifacts, as DIR/TARGET-SCHEME.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace artifacts that DIR holds.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The unquantised model to hold artifacts against; by default the one that they were made from.",
        ),
    ] = None,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    threads: Threads = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to FILE; - prints them.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report in one HTML file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plots in one file: .png, else SVG.")
    ] = None,
) -> None:
    """Weigh schemes on a text: perplexity, KL and top-1 against bytes and tokens a second, with the Pareto fronts."""
    from transom.backends.folder import replace_file
    from transom.validation.charts import check_installed
    from transom.validation.evaluation.evaluate import evaluate_sources
    from transom.validation.evaluation.report import render, render_plot

    check_weights(weights)
    check_outputs(json_file, html, plot, inputs=[text, *map(Path, model_or_dirs), *([Path(model)] if model else [])])
    if plot is not None:
        check_installed()
    with stage_bars() as on_progress:
        evaluation = evaluate_sources(
            model_or_dirs,
            text=text,
            schemes=_names(schemes),
            targets=_names(targets),
            dtype=dtype,
            length=length,
            windows=windows,
            context=context,
            chunk=chunk,
            decode_tokens=decode_tokens,
            out=out,
            overwrite=overwrite,
            model=model,
            weights="random" if weights == "random" else "checkpoint",
            seed=seed,
            threads=threads,
            on_progress=on_progress,
        )
    if html is not None:
        replace_file(html, render(evaluation))
    if plot is not None:
        replace_file(plot, render_plot(evaluation, "png" if plot.suffix.lower() == ".png" else "svg"))
    if str(json_file) == "-":
        print_json(evaluation.to_json())
        return
    if json_file is not None:
        replace_file(json_file, json.dumps(evaluation.to_json(), indent=1, allow_nan=False) + "\n")
    _show(evaluation)


def _names(option: str | None) -> list[str] | None:
    return None if option is None else [name.strip() for name in option.split(",") if name.strip()]


def _show(evaluation: Evaluation) -> None:
    text, speed = evaluation.text, evaluation.speed
    timed = f"prefill of {speed['prefill_tokens']:,}, then {speed['decode_tokens']:,} one by one"
    cut = f"{text['sequences']} x {text['length']:,}" if text["sequences"] > 1 else f"{text['length']:,}"
    console.print(
        f"[bold]{escape(evaluation.model)}[/bold], {cut} tokens of {escape(str(text['source']))}, against the plain "
        "module in float32",
        highlight=False,
    )
    rows = [_cells(evaluation, row) for row in evaluation.rows]
    # Two tables where one would break its numbers over lines.
    for columns in [range(len(COLUMNS))] if console.width >= WIDE else [(0, 3, 4, 5, 6), (0, 1, 2, 7, 8, 9)]:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for index in columns:
            name = COLUMNS[index]
            table.add_column(name, justify="left" if name in ("scheme", "front") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[index] for index in columns))
        console.print(table)
    console.print(
        f"[dim]± is the standard error; that of the loss difference (nats a token) tells schemes apart. Tokens a "
        f"second: {timed}, {speed['threads']} threads, {escape(str(speed['machine']))}[/dim]",
        highlight=False,
    )
    for name, reason in evaluation.not_run.items():
        console.print(f"[yellow]not run:[/yellow] {escape(name)}: {escape(reason)}", highlight=False)


def _cells(evaluation: Evaluation, row: Row) -> tuple[str, ...]:
    from transom.validation.evaluation.report import cells

    name, _, *others = cells(evaluation, row)
    return (escape(name), size(row.bytes), *others)
