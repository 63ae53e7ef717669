"""Finding TensorRT, and building engines: with TensorRT for RTX for real, with TensorRT on a double."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

import transom
from tests.artifacts import Export
from tests.conftest import Cli
from transom.backends.artifact import MODEL_FILE, read_manifest, update_details
from transom.backends.tensorrt import builder
from transom.backends.tensorrt.builder import build_engine
from transom.backends.tensorrt.engines import engines
from transom.backends.tensorrt.library import Library, find_library
from transom.backends.tensorrt.sidecar import SIDECAR
from transom.cli.build import compute_capabilities
from transom.errors import ArtifactError, BuildError, TargetError
from transom.export.tensorrt.verify.verify import verify
from transom.validation.certificate import read_certificate, write_certificate
from transom.zoo.model import Model

CHUNK, CONTEXT = 20, 128


@pytest.fixture(scope="module")
def rtx() -> Library:
    try:
        return find_library(rtx=True)
    except TargetError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(exported: Export, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("tensorrt", chunk=CHUNK, context=CONTEXT).folder, tmp_path / "model"))


# For real: parsed, verified and compiled by TensorRT for RTX, without a GPU.


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [
        ("none", "bfloat16"),
        ("none", "float16"),
        ("int4_block32_bf16", "bfloat16"),
        ("int4_channel:none", "bfloat16"),
        ("fp8_channel", "bfloat16"),
        ("fp8_channel_activations", "bfloat16"),
    ],
)
def test_every_scheme_builds(quant: str, dtype: str, exported: Export, rtx: Library, tmp_path: Path) -> None:
    """Without one unsupported node, for both generations at once; the manifest tells bytes and seconds."""
    artifact = exported("tensorrt", quant, dtype=dtype, chunk=CHUNK, context=CONTEXT)
    out = Path(shutil.copytree(artifact.folder, tmp_path / "model"))
    told: list[tuple[str, int, int]] = []
    record = build_engine(out, rtx, compute=[89, 120], on_progress=lambda *step: told.append(step))
    path = out / "tensorrt_rtx-sm89-sm120.engine"
    assert (record.file, record.bytes, record.compute) == (path.name, path.stat().st_size, (89, 120))
    assert record.seconds > 0 and record.version == rtx.version
    manifest = read_manifest(out)
    assert engines(manifest) == [record] and record.stands(out)
    assert ("parse", 1, 1) in told and {stage for stage, _, _ in told} == {"parse", "build"}
    assert sorted(file.name for file in out.iterdir() if file.name.startswith(".")) == []


class Full(io.BytesIO):
    """A disk with room for some bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 300_000:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_full_disk(folder: Path, rtx: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT swallows what its writer raises, and calls that a success."""
    plain = builder._serialize

    def full(trt: Any, one: Any, network: Any, config: Any, file: Any, raised: Any) -> bool:
        return plain(trt, one, network, config, Full(), raised)

    monkeypatch.setattr(builder, "_serialize", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        build_engine(folder, rtx, compute=[89])
    assert not list(folder.glob("*.engine")) and not list(folder.glob(".*")) and not engines(read_manifest(folder))


def test_ctrl_c_ends_a_build(folder: Path, rtx: Library) -> None:
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "build" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(folder, rtx, compute=[89], on_progress=interrupted)
    assert not list(folder.glob("*.engine")) and not list(folder.glob(".*"))


def test_a_certificate_outlives_a_build(folder: Path, rtx: Library, cli: Cli) -> None:
    """An engine changes nothing of what was validated; one that was deleted is not missed."""
    write_certificate(folder, {"passed": True, "date": "today", "result": {}})
    record = build_engine(folder, rtx, compute=[89])
    assert read_certificate(folder).state == "valid"
    (folder / record.file).unlink()
    assert transom.open(folder, threads=1).note and build_engine(folder, rtx, compute=[89]).file == record.file
    update_details(folder, lambda details: details.update(other=1))
    assert read_certificate(folder).state == "stale"


def test_an_engine_is_kept_unless_told(folder: Path, rtx: Library) -> None:
    first = build_engine(folder, rtx, compute=[89])
    with pytest.raises(ArtifactError, match="exists already: pass --overwrite"):
        build_engine(folder, rtx, compute=[89])
    again = build_engine(folder, rtx, compute=[89], overwrite=True)
    other = build_engine(folder, rtx, compute=[120])
    assert engines(read_manifest(folder)) == [again, other] and first.file == again.file


def test_a_context_of_32768_builds(tiny: Model, rtx: Library, tmp_path: Path) -> None:
    """Exactly one token over so many keys has no kernel: the decode profile leaves room for two."""
    long = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, context=32768))
    out = tmp_path / "model"
    transom.compile(long, target="tensorrt", chunk=256, out=out)
    assert build_engine(out, rtx, compute=[89]).bytes > 0
    sidecar = json.loads((out / SIDECAR).read_text())
    sidecar["profiles"][1]["inputs"]["tokens"][2] = [1, 1]
    (out / SIDECAR).write_text(json.dumps(sidecar))
    accept(out, SIDECAR)
    with pytest.raises(BuildError, match="dedicated kernel"):
        build_engine(out, rtx, compute=[89], overwrite=True)
    assert len(engines(read_manifest(out))) == 1 and not list(out.glob(".*partial*")), "nothing half written"


def test_what_the_verifier_objects_to_is_refused_or_dropped(folder: Path, rtx: Library) -> None:
    """Rules against the parser itself: two violations planted in a whole model."""
    for plant, rule in ((_circular, "cache-write"), (_mixed, "mixed-types")):
        model = onnx.load(folder / MODEL_FILE, load_external_data=False)
        plant(model)
        assert rule in {finding.rule for finding in verify(model)}
        broken = folder.parent / rule
        shutil.copytree(folder, broken)
        (broken / MODEL_FILE).write_bytes(model.SerializeToString())
        accept(broken, MODEL_FILE)
        with pytest.raises(BuildError, match="does not take"):
            build_engine(broken, rtx, compute=[89])


def accept(folder: Path, name: str) -> None:
    """Let the manifest take a file as it is now."""
    path = folder / "manifest.json"
    data, content = json.loads(path.read_text()), (folder / name).read_bytes()
    data["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(data))


def _circular(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "TensorScatter")
    (mode,) = [entry for entry in node.attribute if entry.name == "mode"]
    mode.s = b"circular"


def _mixed(model: onnx.ModelProto) -> None:
    """The first residual sum adds float32 to bfloat16."""
    at, node = next((at, n) for at, n in enumerate(model.graph.node) if n.op_type == "Add" and "layers" in n.name)
    wide = onnx.helper.make_node("Cast", [node.input[1]], ["planted"], to=TensorProto.FLOAT)
    node.input[1] = "planted"
    model.graph.node.insert(at, wide)


def test_damaged_data(folder: Path, rtx: Library) -> None:
    (folder / f"{MODEL_FILE}.data").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="export the model again"):
        build_engine(folder, rtx)


def test_the_default_covers_what_the_artifact_can_run_on(folder: Path, rtx: Library) -> None:
    assert build_engine(folder, rtx).compute == (80, 86, 89, 120)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cc", "90"], "builds for no compute capability 90: choose of 75, 80, 86, 89, 120"),
        (["--cc", "75"], "needs a compute capability of 80 or more, not 75"),
        (["--cc", "eighty"], "--cc takes compute capabilities"),
        (["--cc", ""], "--cc takes compute capabilities"),
        (["--portable"], "leave out --portable"),
    ],
)
def test_what_cannot_be_built(arguments: list[str], words: str, folder: Path, rtx: Library, cli: Cli) -> None:
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = cli("build", folder, "--rtx", *arguments)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_command(folder: Path, rtx: Library, cli: Cli) -> None:
    code, out, _ = cli("build", folder, "--rtx", "--cc", "8.9,12.0")
    assert code == 0 and "TensorRT for RTX" in out and "SM 8.9, 12.0" in out and "built in" in out
    code, out, _ = cli("build", folder, "--rtx", "--cc", "89,120", "--overwrite", "--json")
    assert code == 0 and json.loads(out)["file"] == "tensorrt_rtx-sm89-sm120.engine"
    code, out, _ = cli("inspect", folder, "--json")
    assert code == 0 and json.loads(out)["details"]["engines"][0]["compute"] == [89, 120]
    code, out, _ = cli("inspect", folder)
    assert code == 0 and "TensorRT for RTX" in out


def test_numbers_of_compute_capabilities() -> None:
    assert compute_capabilities("89,120") == compute_capabilities("8.9, 12.0") == [89, 120]


def test_another_target(tiny: Model, tmp_path: Path, rtx: Library) -> None:
    transom.compile(tiny, target="onnx", context=64, out=tmp_path / "model")
    with pytest.raises(ArtifactError, match="export it with --target tensorrt"):
        build_engine(tmp_path / "model", rtx)


# Finding the library.


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any wheel of NVIDIA's."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "tensorrt" in name else find(name, *rest)
    )
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_wheels_one_line_says_what_to_install(nothing: None, folder: Path, cli: Cli) -> None:
    for options in ((), ("--rtx",)):
        code, out, err = cli("build", folder, *options)
        assert (code, out) == (2, "") and "no TensorRT that would do is installed" in err
        assert "transom[tensorrt-rtx]" in err and "--rtx" in err and "Traceback" not in err
        assert len(err.strip().splitlines()) == 1


def fake(version: str) -> types.ModuleType:
    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("version", ["10.15.1.29", "10.16.0", "11.0.0.114"])
def test_tensorrt_comes_first(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake(version))
    library = find_library()
    assert (library.name, library.version, library.is_rtx) == ("tensorrt", version, False)
    assert library.title == f"TensorRT {version}"


def test_tensorrt_that_is_too_old(nothing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake("10.13.3"))
    with pytest.raises(TargetError, match=r"TensorRT 10.13.3 has no TensorScatter, 10.15 has.*pip install"):
        find_library()


def test_rtx_stands_in(rtx: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (None, fake("10.13.3")):
        monkeypatch.setitem(sys.modules, "tensorrt", missing)
        assert find_library() == rtx


def test_nvidias_own_package_of_rtx_comes_before_bare_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    own = fake("1.9.0")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", own)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert find_library(rtx=True).module is own


# TensorRT itself, whose builder wants a GPU: what it is told.


class Recorder:
    """A builder's module that notes what it is told."""

    def __init__(self, version: int, *, engine: bytes | None = b"engine", takes: bool = True) -> None:
        self.told: list[tuple[Any, ...]] = []
        told = self.told

        class ILogger:
            ERROR = 1

        class Config:
            hardware_compatibility_level: Any = None
            progress_monitor = None

            def set_flag(self, flag: str) -> None:
                told.append(("flag", flag))

            def add_optimization_profile(self, profile: Profile) -> int:
                told.append(("profile", dict(profile.shapes)))
                return 0

        class Profile:
            def __init__(self) -> None:
                self.shapes: dict[str, Any] = {}

            def set_shape(self, name: str, *shapes: Any) -> None:
                self.shapes[name] = shapes

        config = self.config = Config()

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def create_network(self, flags: int) -> str:
                told.append(("network", flags))
                return "network"

            def create_builder_config(self) -> Config:
                return config

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: str, config: Config) -> bytes | None:
                if engine is None:
                    self.logger.log(1, "out of\nmemory")
                return engine

        class Refusal:
            def node_name(self) -> str:
                return "layers/0/Mod_1"

            def node_operator(self) -> str:
                return "Mod"

            def desc(self) -> str:
                return "no such thing"

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: str, logger: Any) -> None:
                pass

            def parse_from_file(self, path: str) -> bool:
                told.append(("parse", path))
                return takes

            def get_error(self, index: int) -> Refusal:
                return Refusal()

        self.ILogger, self.Builder, self.OnnxParser = ILogger, Builder, OnnxParser
        flags = {"STRONGLY_TYPED": 1} if version == 10 else {}
        self.NetworkDefinitionCreationFlag = type("Flag", (), flags)
        self.HardwareCompatibilityLevel = type("Level", (), {"AMPERE_PLUS": "ampere"})
        self.BuilderFlag = type("BuilderFlag", (), {"WEIGHT_STREAMING": "stream"} if version == 10 else {})


def of(recorder: Any, version: str = "10.99.0") -> Library:
    return Library(module=recorder, name="tensorrt", version=version)


def test_what_tensorrt_is_told(folder: Path) -> None:
    recorder = Recorder(10)
    record = build_engine(folder, of(recorder), portable=True, weight_streaming=True)
    assert (record.file, record.compute, record.portable) == ("tensorrt-portable.engine", (), True)
    assert (folder / record.file).read_bytes() == b"engine" and engines(read_manifest(folder)) == [record]
    assert recorder.config.hardware_compatibility_level == "ampere"
    kinds = [kind for kind, *_ in recorder.told]
    assert kinds == ["network", "parse", "flag", "profile", "profile"]
    assert recorder.told[0] == ("network", 1 << 1), "strongly typed"
    assert recorder.told[1] == ("parse", str(folder / MODEL_FILE)), "by its path, as weights lie beside it"
    assert recorder.told[3][1]["tokens"] == ((1, 1), (1, CHUNK), (1, CHUNK))


def test_a_file_that_is_no_engine_of_ours_stays(folder: Path) -> None:
    (folder / "tensorrt.engine").write_text("mine")
    with pytest.raises(ArtifactError, match="is not an engine of this artifact, so it is not replaced"):
        build_engine(folder, of(Recorder(11), "11.0.0"), overwrite=True)
    assert (folder / "tensorrt.engine").read_text() == "mine"


def test_tensorrt_11_is_always_strongly_typed(folder: Path) -> None:
    recorder = Recorder(11)
    record = build_engine(folder, of(recorder, "11.0.0"))
    assert record.file == "tensorrt.engine" and recorder.told[0] == ("network", 0)
    with pytest.raises(TargetError, match="cannot stream weights"):
        build_engine(folder, of(recorder, "11.0.0"), weight_streaming=True, overwrite=True)


def test_compute_capabilities_are_rtxs(folder: Path) -> None:
    with pytest.raises(TargetError, match="leave out --cc, or pass --rtx"):
        build_engine(folder, of(Recorder(10)), compute=[89])


def test_a_refusal_names_its_node(folder: Path) -> None:
    with pytest.raises(BuildError, match=r"(?s)does not take .*layers/0/Mod_1 \(Mod\): no such thing"):
        build_engine(folder, of(Recorder(10, takes=False)))
    assert not list(folder.glob("*.engine")) and not list(folder.glob(".*partial*"))


def test_a_build_that_fails_says_why(folder: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot build .*: out of memory"):
        build_engine(folder, of(Recorder(10, engine=None)))
    assert not list(folder.glob("*.engine"))


def test_without_a_gpu_tensorrt_makes_no_builder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(10)

    def no_gpu(logger: Any) -> Any:
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(recorder, "Builder", no_gpu)
    with pytest.raises(TargetError, match=r"finds no GPU to build on \(CUDA .*35\): build with --rtx"):
        build_engine(folder, of(recorder))
