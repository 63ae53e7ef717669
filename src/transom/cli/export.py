"""`transom export` and `inspect`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from transom.cli.options import (
    Folder,
    Json,
    Mmproj,
    Model,
    RopeScaling,
    Seed,
    Weights,
    console,
    load_model,
    print_json,
    progress_console,
    size,
)
from transom.errors import ConfigError

if TYPE_CHECKING:
    from transom.backends.artifact import Manifest
    from transom.graphs.state import State


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(export)
    app.command()(inspect)


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    target: Annotated[str, typer.Option(help="What to lower to: see transom list.")] = "onnxruntime",
    quant: Annotated[
        str | None,
        typer.Option(help="Weight quantisation: a scheme of transom list; by default what the checkpoint holds."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Longest sequence; by default the model's own.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Largest number of new tokens in one call.", min=1)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="What to compute in: float32; xla and tensorrt: bfloat16, float16.")
    ] = None,
    topology: Annotated[
        str | None, typer.Option(help="For xla: compile ahead of time for these TPUs, such as v5e:2x2.")
    ] = None,
    cpu: Annotated[
        str | None, typer.Option(help="For tvm: processor to make code for, such as aarch64; by default this one.")
    ] = None,
    vision: Annotated[
        bool, typer.Option("--vision/--no-vision", help="Export the encoder of images too, if there is one.")
    ] = True,
    mmproj: Mmproj = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="An adapter of low rank to merge into the weights, in peft's format."),
    ] = None,
    rope_scaling: RopeScaling = None,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    taps: Annotated[bool, typer.Option("--taps", help="Return intermediate values too, for transom bisect.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder of that name.")] = False,
    json: Json = False,
) -> None:
    """Lower a model to a target and write the artifact."""
    from transom.backends.folder import check_absent
    from transom.compiler import compile_model
    from transom.export.options import Options
    from transom.passes.add_taps import AddTaps

    # What can be refused at once should not wait for the weights.
    check_absent(out, overwrite=overwrite)
    if mmproj is not None and not vision:
        raise ConfigError("--mmproj gives an encoder of images, and --no-vision leaves it out: drop one of them")
    loaded = load_model(model, weights, seed, images=vision, mmproj=mmproj, adapter=adapter, rope_scaling=rope_scaling)
    options = Options.of(
        loaded, target=target, quant=quant, context=context, chunk=chunk, dtype=dtype, topology=topology, cpu=cpu
    )
    with stage_bars() as on_progress:
        artifact = compile_model(
            loaded,
            options,
            before=[AddTaps()] if taps else (),
            out=out,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    manifest = artifact.manifest
    total = sum(entry["bytes"] for entry in manifest.files.values())
    if json:
        print_json({"folder": str(out), "bytes": total, **manifest.to_json()})
        return
    console.print(
        f"{escape(str(out))}: {manifest.target}, {manifest.quantization}, context {manifest.context:,}, {size(total)}"
    )
    if manifest.conversions:
        console.print(conversions_table(manifest.conversions))
    for line in manifest.not_done:
        console.print(f"[yellow]not done:[/yellow] {escape(line)}", highlight=False)


def engines_table(manifest: Manifest) -> Table:
    """The engines that were built of an artifact."""
    from transom.backends.tensorrt.engines import engines

    table = Table("engine", "built by", "for", "size", "built in", title="Engines")
    for engine in engines(manifest):
        cells = (escape(engine.title), escape(engine.where), size(engine.bytes), f"{engine.seconds:.1f} s")
        table.add_row(escape(engine.file), *cells)
    return table


def conversions_table(conversions: Sequence[Mapping[str, Any]]) -> Table:
    """What became of quantised weights, by kind."""
    table = Table("weights", "from", "to", "codes", "worst error", title="Quantised weights")
    kinds: dict[tuple[Any, ...], list[float]] = {}
    for entry in conversions:
        fate = "kept to the bit" if entry["kept"] else "found on their grid" if entry["recovered"] else "rounded"
        key = (entry["source"] or "numbers", f"{entry['number']}, {entry['block']} a scale", fate)
        kinds.setdefault(key, []).append(entry["error"])
    for (source, format, words), errors in kinds.items():
        kept = words == "kept to the bit"
        table.add_row(str(len(errors)), escape(source), escape(format), words, "" if kept else f"{max(errors):.2%}")
    return table


@contextmanager
def stage_bars() -> Iterator[Callable[..., None]]:
    """A progress bar a stage, on standard error; silent where that is no terminal.

    Yields:
        `(stage, done, total, words)`, with words to stand beside the bar, if there are some.
    """
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=progress_console, disable=not progress_console.is_terminal) as bars:
        tasks = {}

        def on_progress(stage: str, done: int, total: int, words: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, words=words)
            bars.update(tasks[stage], completed=done, total=total, words=words)

        yield on_progress


def inspect(
    folder: Folder,
    verify: Annotated[bool, typer.Option(help="Check the hash of every file.")] = True,
    json: Json = False,
) -> None:
    """Show what an artifact is: its source, caches, passes, files, and what was not done."""
    from transom.backends.artifact import read_manifest
    from transom.validation.certificate import read_certificate

    manifest, certificate = read_manifest(folder, verify=verify), read_certificate(folder)
    if json:
        data = manifest.to_json()
        decode = data["entries"]["decode"]
        data |= {"caches": [_cache_json(state) for state in manifest.decode.states]}
        data |= {key: decode[key] for key in ("taps", "payload")}
        print_json({**data, "certificate": certificate.to_json()})
        return
    facts = Table("", "", title=escape(str(folder)), show_header=False)
    facts.add_row("model", escape(f"{manifest.model['name']} from {manifest.source['name']}"))
    facts.add_row("revision", escape(manifest.source["revision"]))
    if scaling := manifest.source.get("rope_scaling"):
        facts.add_row("rope scaling", escape(scaling))
    facts.add_row("target", escape(f"{manifest.target}, {manifest.quantization}, {manifest.dtype}"))
    facts.add_row("context", f"{manifest.context:,} tokens, at most {manifest.chunk} new ones in a call")
    if manifest.images is not None:
        images = manifest.images
        facts.add_row("images", f"{images.size} x {images.size} pixels become {images.soft_tokens} tokens")
    facts.add_row("validation", escape(certificate.describe()))
    for name, entry in manifest.files.items():
        facts.add_row(escape(name), escape(f"{size(entry['bytes'])}, sha256 {entry['sha256'][:16]}"))
    console.print(facts)
    rows = dict.fromkeys(_cache_row(state, manifest.context) for state in manifest.decode.states)
    alike = " (keys; values alike)" if 2 * len(rows) == len(manifest.decode.states) else ""
    caches = Table("layer", "kind", "window", "slots", "shape", title=f"Caches{alike}")
    for row in rows:
        caches.add_row(*row)
    console.print(caches)
    if manifest.tpu is not None:
        tpu = Table("program", "arguments", "caches in place", "temporary", "peak", "FLOPs", "compiled in")
        devices = f"each of {manifest.tpu['devices']} devices, libtpu {manifest.tpu['libtpu']}"
        tpu.title = escape(f"Compiled for {manifest.tpu['topology']} ({devices})")
        for program, report in manifest.tpu["programs"].items():
            cells = [size(report[f"{kind}_bytes"]) for kind in ("argument", "alias", "temp", "peak")]
            tpu.add_row(escape(program), *cells, f"{report['flops']:.3g}", f"{report['compile_s']:.1f} s")
        console.print(tpu)
    if manifest.details.get("engines"):
        console.print(engines_table(manifest))
    passes = Table("pass", "changes", "calls", "weights", title="Passes")
    for record in manifest.passes:
        calls = f"{record['nodes_before']} → {record['nodes_after']}"
        sizes = f"{size(record['weight_bytes_before'])} → {size(record['weight_bytes_after'])}"
        passes.add_row(escape(record["name"]), str(record["changes"]), calls, sizes)
    console.print(passes)
    if manifest.conversions:
        console.print(conversions_table(manifest.conversions))
    for record in manifest.passes:
        for line in record.get("notes", ()):
            console.print(f"[dim]{escape(record['name'])}: {escape(line)}[/dim]", highlight=False)
    for line in manifest.not_done:
        console.print(f"[yellow]not done:[/yellow] {escape(line)}", highlight=False)


def _cache_json(state: State) -> dict[str, Any]:
    """A state with a key a size."""
    named = {"name": state.name, "layer": state.layer, "window": state.window, "slots": state.slots}
    sizes = {axis: size for axis, size in zip(state.axes, state.sizes, strict=True) if axis != "batch"}
    return {**named, **sizes, "dtype": state.dtype}


def _cache_row(state: State, context: int) -> tuple[str, ...]:
    """Layer, kind, window, slots and shape of a state."""
    sizes = zip(state.axes, state.sizes, strict=True)
    shape = " x ".join(axis if axis == "slots" else str(size) for axis, size in sizes if axis != "batch")
    return (
        str(state.layer),
        "summary" if not state.is_ring else "global" if state.window is None else "local",
        str(state.window or ""),
        str(state.slots or f"grow to {context}") if state.is_ring else "",
        escape(f"{shape} {state.dtype}"),
    )
