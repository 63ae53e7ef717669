"""`transom build` and `verify`: from a `tensorrt` artifact to an engine, and whether TensorRT would take a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from transom.cli.export import stage_bars
from transom.cli.options import Folder, Json, console, print_json, size
from transom.errors import ArtifactError, TargetError
from transom.wording import listed

if TYPE_CHECKING:
    from transom.export.tensorrt.verify.view import Finding


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(build)
    app.command()(verify)


def build(
    folder: Folder,
    rtx: Annotated[bool, typer.Option("--rtx", help="Use TensorRT for RTX, which needs no GPU to build.")] = False,
    cc: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="For TensorRT for RTX: compute capabilities, such as 89,120; by default all that fit."
        ),
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="For TensorRT: an engine for Ampere and newer, not this GPU alone.")
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let weights stay in host memory when the engine runs.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an engine of that name.")] = False,
    json: Json = False,
) -> None:
    """Build a TensorRT engine beside every ONNX model of a tensorrt artifact."""
    from transom.backends.artifact import read_manifest
    from transom.backends.tensorrt.builder import build_engine
    from transom.backends.tensorrt.library import find_library

    compute = None if cc is None else compute_capabilities(cc)
    library = find_library(rtx=rtx)
    with stage_bars() as on_progress:
        records = [
            build_engine(
                folder,
                library,
                entry=entry,
                compute=compute,
                portable=portable,
                weight_streaming=weight_streaming,
                overwrite=overwrite,
                on_progress=on_progress,
            )
            for entry in read_manifest(folder, verify=False).entries
        ]
    if json:
        decode, *encoders = map(dataclasses.asdict, records)
        print_json({"folder": str(folder), **decode, **({"encoders": encoders} if encoders else {})})
        return
    for record in records:
        console.print(
            f"{escape(str(folder / record.file))}: {record.title}, for {record.where}, {size(record.bytes)}, built in "
            f"{record.seconds:.1f} s",
            highlight=False,
        )


def compute_capabilities(text: str) -> list[int]:
    """Numbers such as 89 of a list such as "89,120" or "8.9,12.0".

    Raises:
        TargetError: If it is no such list.
    """
    try:
        capabilities = [round(float(part) * 10) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        capabilities = []
    if not capabilities or min(capabilities) <= 0:
        raise TargetError(f"--cc takes compute capabilities with commas between, such as 89,120, not {text!r}")
    return capabilities


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="DIR|FILE", help="An artifact, all of whose models are checked, or any ONNX file.")
    ],
    json: Json = False,
) -> None:
    """Check ONNX models against what TensorRT takes, and what it would get wrong without a word."""
    from transom.export.tensorrt.verify.verify import RULES

    files = _models(path)
    findings = [(file, finding) for file in files for finding in _findings(file)]
    if json:
        rows = [{"file": str(file), **dataclasses.asdict(finding)} for file, finding in findings]
        print_json({"files": [str(file) for file in files], "rules": len(RULES), "findings": rows})
    elif findings:
        table = Table("file", "rule", "where", "what")
        for file, finding in findings:
            table.add_row(escape(file.name), finding.rule, escape(finding.where), escape(finding.what))
        console.print(table)
    else:
        for file in files:
            console.print(f"{escape(str(file))}: nothing breaks the {len(RULES)} rules", highlight=False)
    if findings:
        raise typer.Exit(1)


def _models(path: Path) -> list[Path]:
    """The model of every entry of an artifact; a file that is none; the model in any other folder."""
    from transom.backends.artifact import MODEL_FILE, read_manifest
    from transom.backends.folder import MANIFEST

    if not path.is_dir():
        return [path]
    if not (path / MANIFEST).is_file():
        return [path / MODEL_FILE]
    payloads = [entry.payload for entry in read_manifest(path, verify=False).entries.values()]
    if other := [name for name in payloads if not name.endswith(".onnx")]:
        raise ArtifactError(f"{path} has no ONNX model, but {listed(other)}: name an artifact of ONNX, or an ONNX file")
    return [path / name for name in payloads]


def _findings(file: Path) -> list[Finding]:
    """What TensorRT would not take of an ONNX file, or get wrong.

    Raises:
        ArtifactError: If it is no valid ONNX model.
    """
    import onnx

    from transom.export.tensorrt.verify.verify import verify as find

    try:
        model = onnx.load(file, load_external_data=False)
    except FileNotFoundError:
        raise ArtifactError(f"{file} does not exist: name an artifact or an ONNX file") from None
    except Exception as error:  # protobuf's own classes
        raise ArtifactError(f"{file} is no ONNX model ({type(error).__name__}: {error})") from error
    if not model.graph.node:
        raise ArtifactError(f"{file} is no ONNX model: it has no operations")
    try:
        return find(model)
    except Exception as error:  # what is wrong with it, onnx says in several ways
        raise ArtifactError(f"{file} is no valid ONNX model ({str(error).strip().splitlines()[0]})") from error
