"""`transom list`, `show` and `plan`: what there is and what it needs. No weights are read."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from transom.cli.options import (
    Json,
    Mmproj,
    Model,
    RopeScaling,
    Seed,
    Weights,
    check_weights,
    console,
    print_json,
    size,
)

TABLE_CONTEXTS = (512, 4096, 32_768, 131_072)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list")(list_models)
    app.command()(show)
    app.command()(plan)


def list_models(json: Json = False) -> None:
    """List the models and targets that can be named."""
    from transom.formats.schemes import SCHEMES
    from transom.passes.targets import TARGETS
    from transom.zoo.architectures import presets
    from transom.zoo.plan import parameters

    rows = [
        {
            "name": config.name,
            "parameters": parameters(config),
            "layers": config.num_layers,
            "global_layers": sum(layer.kind == "global" for layer in config.layers),
            "window": config.longest_window,
            "context": config.context,
        }
        for config in (preset.config for preset in presets().values())
    ]
    if json:
        print_json({"models": rows, "targets": {name: t.text for name, t in TARGETS.items()}, "schemes": list(SCHEMES)})
        return
    table = Table("model", "parameters", "layers", "global", "window", "context", title="Models")
    for row in rows:
        table.add_row(str(row["name"]), *("-" if value is None else f"{value:,}" for value in list(row.values())[1:]))
    console.print(table)
    targets = Table("target", "what it is", title="Targets")
    for name, target in TARGETS.items():
        targets.add_row(name, target.text)
    console.print(targets)
    console.print(f"Quantisation: {', '.join(SCHEMES)}")


def show(
    model: Model, mmproj: Mmproj = None, weights: Weights = "checkpoint", seed: Seed = 0, json: Json = False
) -> None:
    """Show a model's configuration, layer by layer."""
    import dataclasses

    from transom.zoo.model import resolve_config

    check_weights(weights)
    config = resolve_config(model, mmproj=mmproj)
    data = dataclasses.asdict(config)
    if json:
        print_json(data)
        return
    table = Table("field", "value", title=escape(config.name))
    for name, value in data.items():
        if name == "layer_kinds":
            value = "".join(kind[0].upper() for kind in value) + "  (L local, G global)"
        table.add_row(name, escape(str(value)))
    console.print(table)


def plan(
    model: Model,
    context: Annotated[int | None, typer.Option(help="Tokens; by default the model's own context.")] = None,
    quant: Annotated[str, typer.Option(help="Weight quantisation: a scheme of transom list.")] = "none",
    cache_dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or int8.")] = "bf16",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    mmproj: Mmproj = None,
    rope_scaling: RopeScaling = None,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Tell what a model will need: weights, and caches with and without bounded local layers."""
    from transom.zoo.model import resolve_config
    from transom.zoo.plan import plan as make_plan
    from transom.zoo.plan import plan_caches

    check_weights(weights)
    config = resolve_config(model, mmproj=mmproj)
    if rope_scaling is not None:
        from transom.zoo.rope import RopeScaling as Scaling

        config = config.scaled(Scaling.read(rope_scaling))
    context = config.context if context is None else context
    model_plan = make_plan(config, context=context, quant=quant, cache_dtype=cache_dtype, batch=batch)
    if json:
        print_json(model_plan.to_json())
        return
    more = model_plan.encoder_parameters
    encoder = f" ({more:,} of them to encode images)" if more else ""
    console.print(
        f"[bold]{escape(config.name)}[/bold]: {model_plan.parameters:,} parameters{encoder}, "
        f"{size(model_plan.weight_bytes)} ({quant})"
    )
    table = Table("context", "bounded", "global-only", "share", title=f"Cache bytes, {cache_dtype}, batch {batch}")
    for tokens in sorted({*(c for c in TABLE_CONTEXTS if c <= config.context), model_plan.context}):
        row = plan_caches(config, context=tokens, cache_dtype=cache_dtype, batch=batch)
        share = row.bounded / row.global_only
        table.add_row(f"{tokens:,}", size(row.bounded), size(row.global_only), f"{share:.1%}")
    console.print(table)
    console.print(
        "Weights without a scheme count as released, in bfloat16, and local layers as their bare window. An artifact "
        "computes in float32, and its local layers hold window + chunk - 1 slots: transom inspect tells what it has.",
        style="dim",
    )
