"""`transom evaluate`: schemes weighed on a text; artifacts on pairs of image and text, or on tasks that are judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from transom.cli.export import stage_bars
from transom.cli.options import (
    RewardOption,
    RopeScaling,
    Threads,
    Weights,
    check_outputs,
    check_weights,
    console,
    named,
    print_json,
    size,
)
from transom.cli.run import PanAndScanName, PanAndScanOption
from transom.errors import ConfigError, RewardError
from transom.images.pan_and_scan import SETTINGS

if TYPE_CHECKING:
    from transom.validation.evaluation.contest import Contest
    from transom.validation.evaluation.result import Evaluation, Row
    from transom.validation.evaluation.tasks import Reward

ModelOrDirs = Annotated[
    list[str],
    typer.Argument(metavar="MODEL_OR_DIR...", help="A model, to compile with every scheme; exported artifacts of it."),
]

COLUMNS = (
    "scheme", "size", "B/weight", "perplexity", "loss difference", "KL", "top-1", "prefill", "decode", "front",
)  # fmt: skip
WIDE = 140

EVERYWHERE = frozenset(("model_or_dirs", "seed", "threads", "json_file", "html"))
OF_PAIRS = frozenset(("pairs", "pan_and_scan"))
OF_TASKS = frozenset(("tasks", "reward", "reward_option", "samples", "temperature", "max_new", "chat", "start"))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)


def evaluate(
    call: typer.Context,
    model_or_dirs: ModelOrDirs,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to weigh schemes on.")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="JSONL", help="Lines of `image`, `prompt` and `answer`, to measure artifacts that see images on."
        ),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Lines of a `prompt` and what --reward reads, for artifacts to continue."),
    ] = None,
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
    rope_scaling: RopeScaling = None,
    weights: Weights = "checkpoint",
    seed: Annotated[int, typer.Option(help="Of random weights; else of draws and intervals.", min=0)] = 0,
    reward: Annotated[
        str | None, typer.Option(help="What judges --tasks: mathematics, code, instructions or preference.")
    ] = None,
    reward_option: RewardOption = None,
    samples: Annotated[int, typer.Option(help="Continuations of each prompt.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="Of --tasks; 0 takes the likeliest token.", min=0)] = 0.0,
    max_new: Annotated[int, typer.Option(help="Most tokens of a continuation.", min=1)] = 256,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are what a user says, in the model's chat template.")
    ] = False,
    start: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Artifact to take the KL of continuations to.")
    ] = None,
    pan_and_scan: PanAndScanOption = PanAndScanName.off,
    threads: Threads = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to FILE; - prints them.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report in one HTML file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plots in one file: .png, else SVG.")
    ] = None,
) -> None:
    """Weigh schemes on a text, or measure artifacts on pairs of image and text, or on tasks that a reward judges.

    --text tells perplexity, KL and top-1 against bytes and tokens a second, with the Pareto fronts. --pairs and --tasks
    take exported artifacts, and tell means with 95% intervals and differences to the first artifact.
    """
    _check_given(call, text=text, pairs=pairs, tasks=tasks)
    if text is None:
        path = pairs or tasks
        assert path is not None
        check_outputs(json_file, html, inputs=[path, start, *map(Path, model_or_dirs)])
        with stage_bars() as on_progress:
            if pairs is not None:
                from transom.validation.evaluation.pairs import evaluate_pairs

                setting = None if pan_and_scan is PanAndScanName.off else SETTINGS[pan_and_scan]
                contest = evaluate_pairs(
                    model_or_dirs, pairs, pan_and_scan=setting, seed=seed, threads=threads, on_progress=on_progress
                )
            else:
                from transom.validation.evaluation.tasks import TaskSettings, evaluate_tasks

                settings = TaskSettings(
                    samples=samples,
                    temperature=temperature,
                    max_new=max_new,
                    chat=chat,
                    right=reward != "preference",
                    seed=seed,
                )
                contest = evaluate_tasks(
                    model_or_dirs,
                    path,
                    _judge(reward, reward_option or ()),
                    settings=settings,
                    start=start,
                    threads=threads,
                    on_progress=on_progress,
                )
        _write_contest(contest, json_file, html)
        return
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
            rope_scaling=rope_scaling,
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


def _check_given(call: typer.Context, **files: Path | None) -> None:
    """Raise `ConfigError` unless one file is given, and no option that does nothing with it."""
    named = [name for name, path in files.items() if path is not None]
    if len(named) != 1:
        raise ConfigError("give one of --text, --pairs and --tasks: what is to be measured on")
    for parameter in call.command.params:
        name = parameter.name or ""
        source = call.get_parameter_source(name)
        if name in EVERYWHERE or source is None or source.name != "COMMANDLINE":
            continue
        (kind,) = named
        own = {"pairs": OF_PAIRS, "tasks": OF_TASKS}.get(kind)
        if name not in own if own is not None else name in OF_PAIRS | OF_TASKS:
            raise ConfigError(f"{parameter.opts[0]} does nothing beside --{kind}: leave it out")


def _judge(name: str | None, options: Sequence[str]) -> Reward:
    from transom.training.rewards.reward import reward

    if name is None:
        raise RewardError(
            "what judges the continuations is not said: give --reward mathematics, code, instructions or preference"
        )
    return reward(name, **named(options)).score


def _write_contest(contest: Contest, json_file: Path | None, html: Path | None) -> None:
    from transom.backends.folder import replace_file
    from transom.validation.evaluation.report import CONTEST_HEADER, contest_rows, render_contest

    if html is not None:
        replace_file(html, render_contest(contest))
    if str(json_file) == "-":
        print_json(contest.to_json())
        return
    if json_file is not None:
        replace_file(json_file, json.dumps(contest.to_json(), indent=1, allow_nan=False) + "\n")
    console.print(
        f"[bold]{escape(contest.file)}[/bold], {contest.rows:,} {contest.kind}: means, with 95% intervals by the "
        f"bootstrap over {contest.kind}",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in CONTEST_HEADER:
        table.add_column(
            name, justify="left" if name in ("measure", "artifact") else "right", no_wrap=name != "artifact"
        )
    for row in contest_rows(contest):
        table.add_row(*map(escape, row))
    console.print(table)
    if len(contest.contenders) > 1:
        console.print(
            f"[dim]Differences and win rates are against {escape(contest.contenders[0].name)}, row by row[/dim]",
            highlight=False,
        )
    for contender in contest.contenders:
        for reason, count in contender.failures.items():
            console.print(
                f"[yellow]not scored:[/yellow] {count:,} of {escape(contender.name)}: {escape(reason)}", highlight=False
            )


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
    from transom.validation.evaluation.report import position_table

    header, by_position = position_table(evaluation)
    if by_position:
        table = Table(
            box=None, padding=(0, 2, 0, 0), pad_edge=False, title="perplexity by position", title_justify="left"
        )
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for cells_of_row in by_position:
            table.add_row(*map(escape, cells_of_row))
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
