"""`transom validate`: the same prompts through every target, compared with the plain module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from transom.cli.export import stage_bars
from transom.cli.options import (
    Mmproj,
    RopeScaling,
    Seed,
    Threads,
    Weights,
    check_outputs,
    check_weights,
    console,
    print_json,
    size,
)

if TYPE_CHECKING:
    from transom.validation.result import TargetResult, Validation

ModelOrDirs = Annotated[
    list[str],
    typer.Argument(metavar="MODEL_OR_DIR...", help="A model, to compile for the targets; exported artifacts of it."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(validate)


def validate(
    model_or_dirs: ModelOrDirs,
    targets: Annotated[
        str | None,
        typer.Option(help="Names with commas between: reference, and those of transom list; by default all installed."),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="Weight quantisation: a scheme of transom list; by default what the checkpoint holds."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="What to compute in: float32; xla: bfloat16, float16 too.")] = None,
    context: Annotated[int | None, typer.Option(help="Longest sequence; by default enough for four windows.")] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Largest number of new tokens in one call; by default 1.5 windows.", min=1)
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to read; by default one of ours.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the artifacts, as DIR/TARGET.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace artifacts that DIR holds.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model of the artifacts; by default their manifests tell.")
    ] = None,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    threads: Threads = None,
    vision: Annotated[
        bool,
        typer.Option(
            "--vision/--no-vision",
            help="Validate images too, if the model sees them. One of 896 x 896 takes a minute or more of a CPU in the "
            "plain module, and half of that on each target.",
        ),
    ] = True,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Image to show, as often as wanted; by default drawn ones: one if the model takes large ones, else 3.",
        ),
    ] = None,
    mmproj: Mmproj = None,
    rope_scaling: RopeScaling = None,
    layers: Annotated[
        bool | None,
        typer.Option(
            "--layers/--no-layers",
            help="Also compare every step of every layer, which compiles again; by default for --html.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to FILE; - prints them.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report in one HTML file.")] = None,
) -> None:
    """Hold every target against the plain module: logits, tokens, images, cache bytes. Exit code 1 if one fails."""
    from transom.backends.folder import replace_file
    from transom.validation.report import render
    from transom.validation.validate import validate_sources

    check_weights(weights)
    check_outputs(
        json_file,
        html,
        inputs=[text, *(image or ()), mmproj, *map(Path, model_or_dirs), *([Path(model)] if model else [])],
    )
    with stage_bars() as on_progress:
        validation = validate_sources(
            model_or_dirs,
            targets=None if targets is None else [name.strip() for name in targets.split(",")],
            quant=quant,
            dtype=dtype,
            context=context,
            chunk=chunk,
            text=text,
            out=out,
            overwrite=overwrite,
            model=model,
            weights="random" if weights == "random" else "checkpoint",
            seed=seed,
            threads=threads,
            layers=html is not None if layers is None else layers,
            vision=vision,
            images=image or (),
            mmproj=mmproj,
            rope_scaling=rope_scaling,
            on_progress=on_progress,
        )
    if html is not None:
        replace_file(html, render(validation))
    if json_file is not None and str(json_file) != "-":
        replace_file(json_file, json.dumps(validation.to_json(), indent=1, allow_nan=False) + "\n")
    if str(json_file) == "-":
        print_json(validation.to_json())
    else:
        _show(validation)
    if not validation.passed:
        raise typer.Exit(1)


def _show(validation: Validation) -> None:
    prompt = validation.prompt
    console.print(
        f"[bold]{escape(validation.model)}[/bold], {prompt['tokens']:,} tokens of {escape(str(prompt['source']))}, "
        "against the plain module in float32",
        highlight=False,
    )
    table = Table(title="Largest differences over all lengths", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("target", "verdict", "max abs", "max rel", "KL max", "top-1", "diverges", "caches"):
        table.add_column(name, justify="left" if name in ("target", "verdict") else "right", no_wrap=True)
    for name, result in validation.targets.items():
        table.add_row(*_row(name, result))
    console.print(table)
    if any(result.images for result in validation.targets.values()):
        console.print(_image_table(validation))
    for name, result in validation.targets.items():
        window = "no window" if result.window is None else f"a window of {result.window:,}"
        lengths = ", ".join(f"{run.length:,}" for run in result.prefills)
        console.print(
            f"[dim]{escape(name)}: {result.quant}, {result.dtype}, chunks of {result.chunk:,}, "
            f"{window}, prompts of {lengths or 'no length'}; {result.seconds:.1f} s[/dim]",
            highlight=False,
        )
        if result.note:
            console.print(f"[yellow]{escape(name)}:[/yellow] {escape(result.note)}", highlight=False)
        for line in result.not_reached:
            console.print(f"[yellow]{escape(name)}, not reached:[/yellow] {escape(line)}", highlight=False)
    for name, reason in validation.not_run.items():
        console.print(f"[yellow]not run:[/yellow] {name}: {escape(reason)}", highlight=False)
    for name, result in validation.targets.items():
        for failure in result.failures:
            console.print(f"[red]{escape(name)}:[/red] {escape(failure)}", highlight=False, soft_wrap=True)


def _image_table(validation: Validation) -> Table:
    shown = len(validation.images)
    title = f"Soft tokens of {shown} image{'s' if shown > 1 else ''}, and logits of prompts with images"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("target", "soft max abs", "soft max rel", "max abs", "max rel", "KL max", "top-1"):
        table.add_column(name, justify="left" if name == "target" else "right", no_wrap=True)
    for name, result in validation.targets.items():
        if (images := result.images) is not None:
            soft = [f"{images.worst_soft(field):.1e}" for field in ("max_abs", "max_rel")]
            logits = [f"{images.worst(field):.1e}" for field in ("max_abs", "max_rel", "kl_max")]
            table.add_row(escape(name), *soft, *logits, f"{images.top1_agreement:.2%}")
    return table


def _divergence(result: TargetResult) -> str:
    if result.first_different is None:
        return "never" if result.lengths else "none"
    if result.first_divergence is None:
        return f"at {result.first_different}, a tie"
    return f"at {result.first_divergence}"


def _row(name: str, result: TargetResult) -> tuple[str, ...]:
    return (
        escape(name),
        "[green]pass[/green]" if result.passed else "[red]FAIL[/red]",
        *(f"{result.worst(name):.1e}" for name in ("max_abs", "max_rel", "kl_max")),
        f"{result.top1_agreement:.2%}",
        _divergence(result),
        size(result.caches.local) if result.caches else "none",
    )
