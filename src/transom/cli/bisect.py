"""`transom bisect`: the first layer and operation where two runs of one model differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from transom.backends.artifact import DECODE
from transom.cli.options import Json, Seed, Weights, check_weights, console, load_model, print_json
from transom.errors import TargetError

if TYPE_CHECKING:
    from transom.validation.bisection.verdict import Verdict


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bisect)


_SOURCE = 'An artifact\'s folder, a target, TARGET@PASS, "reference" (the graph as traced) or "eager" (the module).'


def bisect(
    a: Annotated[str | None, typer.Argument(metavar="A", help=_SOURCE)] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", help=_SOURCE)] = None,
    model: Annotated[str | None, typer.Option(help="What to run; by default the model of a folder.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="In place of A and B: find the first pass at fault."),
    ] = None,
    quant: Annotated[str, typer.Option(help="Weight quantisation of what has to be made first.")] = "none",
    length: Annotated[int | None, typer.Option(help="Tokens of the prompt; by default past the wrap.", min=1)] = None,
    chunk: Annotated[int | None, typer.Option(help="Most tokens in a call; by default past the window.", min=1)] = None,
    decode: Annotated[int | None, typer.Option(help="Tokens to decode one by one after it.", min=1)] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Share of a position's largest value up to which values agree.", min=0)
    ] = None,
    vision: Annotated[
        bool, typer.Option("--vision/--no-vision", help="Compare images too, if there is an encoder of them.")
    ] = True,
    weights: Weights = "checkpoint",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Find the first layer and operation whose output differs while its inputs agree. Exit code 1 if there is one."""
    check_weights(weights)
    if (stages is None) == (a is None or b is None):
        raise TargetError("give two things to compare, A and B, or --stages TARGET")
    if stages is not None and (a is not None or model is None):
        raise TargetError("--stages TARGET needs --model, and neither A nor B")
    if model is None and (weights != "checkpoint" or seed):
        raise TargetError("--weights and --seed say how --model is loaded: name a model, or leave them out")
    from transom.validation.bisection.bisect import bisect as find
    from transom.validation.bisection.bisect import bisect_stages

    loaded: Any = None if model is None else load_model(model, weights, seed, images=vision)
    sizes: dict[str, Any] = {"length": length, "chunk": chunk, "decode": decode, "vision": vision}
    if stages is not None:
        verdict = bisect_stages(stages, model=loaded, quant=quant, share=tolerance, **sizes)
    else:
        verdict = find(a, b, model=loaded, quant=quant, share=tolerance, **sizes)  # type: ignore[arg-type]
    if json:
        print_json(verdict.to_json())
    else:
        verdicts = [verdict, *verdict.others]
        for each in verdicts:
            _show(each, {"a": a, "b": b}, f"{each.entry}: " if len(verdicts) > 1 else "")
    if verdict.diverged:
        raise typer.Exit(1)


def _show(verdict: Verdict, sources: Mapping[str, str | None], entry: str) -> None:
    """Print the verdict of an entry; `entry` stands before it, if there are several."""
    if not verdict.diverged:
        result = "logits" if verdict.entry == DECODE else "soft tokens"
        console.print(
            f"{entry}no divergence: {verdict.compared} values agree, the farthest within {verdict.relative:.1e} of its "
            f"size (tolerance {verdict.tolerance:.0e}); {result} differ by {verdict.max_abs:.1e} at most"
        )
        return
    place = "outside of the layers" if verdict.layer is None else f"layer {verdict.layer}"
    console.print(f"{entry}[red]diverged[/red] at {place}, {verdict.op} ({escape(str(verdict.tap))})", highlight=False)
    console.print(f"  cause: {escape(verdict.cause)}", highlight=False)
    if verdict.stage is not None:
        console.print(f"  stage: {escape(verdict.stage)}", highlight=False)
    if (blamed := sources.get(verdict.side or "")) is not None:
        console.print(f"  at fault: {escape(blamed)}", highlight=False)
    console.print(
        f"  from position {verdict.position} on, {verdict.positions} in all; "
        f"{_size(verdict)} (tolerance {verdict.tolerance:.0e})",
        highlight=False,
    )


def _size(verdict: Verdict) -> str:
    """Of the difference."""
    if verdict.max_abs is None or verdict.relative is None:
        return "the largest difference is not a number"
    return f"{verdict.max_abs:.3g} at most, {verdict.relative:.1e} of the value's size"
