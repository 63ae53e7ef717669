"""Merged checkpoints: of every family equal to plain torch, streamed, and refused where they cannot be merged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Cli
from tests.zoo.tiny_gguf import STORABLE, write_gguf
from transom.errors import ArtifactError, CheckpointError, MergeError, RangeError
from transom.graphs.weight import Weight
from transom.training.averaging import METHODS, Average
from transom.training.merge import REPORT, load_alike, merge_models
from transom.training.quantize import quantize_model
from transom.zoo.architecture import Architecture
from transom.zoo.architectures import architectures, preset
from transom.zoo.checkpoints.random import random_weights, write_checkpoint
from transom.zoo.companions import write_companions
from transom.zoo.model import Model, load
from transom.zoo.tokenizer import Tokenizer

Sources = tuple[Path, Path, Path, Path]


def write_sources(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Sources:
    """A start, and three checkpoints that training might have made of it; the second in shards."""
    config, paths = preset(name), tuple(folder / end for end in ("start", "a", "b", "c"))
    for seed, path in enumerate(paths):
        shard_bytes = 100_000 if seed == 2 else 10**9
        write_checkpoint(path, config, random_weights(config, seed), dtype=dtype, shard_bytes=shard_bytes)
        write_companions(load(name), path)
    return paths  # type: ignore[return-value]


@pytest.fixture(scope="module", params=architectures(), ids=lambda family: family.name)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    record: Architecture = request.param
    tiny = next(preset for preset in record.presets if preset.hub is None)
    return write_sources(tiny.config.name, tmp_path_factory.mktemp(record.name))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return write_sources("gemma3-tiny", tmp_path_factory.mktemp("sources"))


def with_weights(model: Model, changed: Mapping[str, Weight]) -> Model:
    return dataclasses.replace(model, weights={**model.weights, **changed})


def spherical(start: torch.Tensor, ends: list[torch.Tensor]) -> torch.Tensor:
    """As WARP writes it: of task vectors, one after the other."""
    merged = ends[0] - start
    for count, end in enumerate(ends[1:], 2):
        other, at = end - start, 1 / count
        cosine = (merged * other).sum() / (merged.norm() * other.norm())
        if start.numel() == 1:  # two numbers have no angle
            merged = (1 - at) * merged + at * other
            continue
        omega = torch.arccos(cosine)
        merged = (torch.sin((1 - at) * omega) * merged + torch.sin(at * omega) * other) / torch.sin(omega)
    return start + merged


def expected(method: str, numbers: list[torch.Tensor]) -> torch.Tensor:
    start, *ends = (tensor.double() for tensor in numbers)
    together = torch.stack(ends).mean(0)
    return {
        "mean": lambda: together,
        "ema": lambda: 0.99 * ends[0] + 0.01 * ends[1],
        "slerp": lambda: spherical(start, ends),
        "liti": lambda: 0.7 * start + 0.3 * together,
        "warp": lambda: 0.7 * start + 0.3 * spherical(start, ends),
    }[method]()


@pytest.mark.parametrize("method", METHODS)
def test_every_family_merges_as_plain_torch_does(family: Sources, method: str, tmp_path: Path) -> None:
    average = Average.of(method, 2 if method == "ema" else 3)
    start, *ends = load_alike([str(path) for path in family])
    ends = ends[: len(average.shares)]
    merged = merge_models(ends, average, out=tmp_path / "m", start=start if average.has_start else None)
    again = load(tmp_path / "m", images=True)
    assert dataclasses.replace(again.config, name="") == dataclasses.replace(start.config, name="")
    for name, weight in again.weights.items():
        reference = expected(method, [model.weights[name].read() for model in (start, *ends)])
        assert weight.dtype == torch.float32
        assert torch.allclose(weight.read().double(), reference, rtol=1e-6, atol=1e-7), name
    report = json.loads((tmp_path / "m" / REPORT).read_text())
    assert report == merged.report and report["method"] == method
    assert [entry["source"] for entry in report["sources"]] == [model.source for model in ends]
    assert all(entry["revision"].startswith("headers-sha256:") for entry in report["sources"])
    assert (report["start"] is None) != average.has_start
    assert set(report["angles_degrees"]) == (set(start.weights) if average.has_angles else set())


def test_a_merge_runs_and_keeps_what_stands_beside_the_first(sources: Sources, tmp_path: Path) -> None:
    first, second = load_alike([str(path) for path in sources[1:3]])
    vocabulary = first.tokenizer and first.tokenizer.vocabulary
    assert vocabulary and second.tokenizer is None, "one tokenizer is enough"
    first = dataclasses.replace(first, generation=dataclasses.replace(first.generation, sampling={"do_sample": False}))
    merge_models([first, second], Average.of("mean", 2), out=tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.generation.sampling == {"do_sample": False} and again.tokenizer is not None
    assert again.tokenizer.vocabulary == vocabulary
    with torch.no_grad():
        logits, _ = again.eager()(torch.tensor([again.tokenizer.encode("A window.")]), torch.tensor(0), None)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_dtypes(dtype: str | None, tmp_path: Path) -> None:
    half = write_sources("gemma3-tiny", tmp_path, torch.bfloat16)
    start, a, b, _ = load_alike([str(path) for path in half])
    merged = merge_models([a, b], Average.of("warp", 2), start=start, out=tmp_path / "m", dtype=dtype)
    assert merged.report["dtypes"] == [dtype or "bfloat16"]
    name = "layers.1.mlp.up_proj.weight"
    reference = expected("warp", [model.weights[name].read() for model in (start, a, b)])
    kind = getattr(torch, dtype or "bfloat16")
    assert torch.equal(load(tmp_path / "m").weights[name].read(), reference.float().to(kind)), (
        "rounded once, at the end"
    )


def test_of_two_dtypes_the_widest(sources: Sources, tmp_path: Path) -> None:
    halves = write_sources("gemma3-tiny", tmp_path, torch.bfloat16)
    a, b = load_alike([str(halves[1]), str(sources[2])])
    assert merge_models([a, b], Average.of("mean", 2), out=tmp_path / "m").report["dtypes"] == ["float32"]


def test_progress_counts_every_byte_that_is_read(sources: Sources, tmp_path: Path) -> None:
    start, a, b, _ = load_alike([str(path) for path in sources])
    told: list[tuple[str, int, int]] = []
    average = Average.of("warp", 2)
    merge_models([a, b], average, start=start, out=tmp_path / "m", on_progress=lambda *args: told.append(args))
    total = 2 * 3 * sum(weight.bytes for weight in start.weights.values())
    assert told[-1] == ("merge", total, total) and [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_what_no_training_moved_is_kept_and_told(sources: Sources, tmp_path: Path) -> None:
    start, a, b, _ = load_alike([str(path) for path in sources])
    frozen = [with_weights(model, {"norm.weight": start.weights["norm.weight"]}) for model in (a, b)]
    merged = merge_models(frozen, Average.of("slerp", 2), start=start, out=tmp_path / "m")
    assert merged.report["angles_degrees"]["norm.weight"] == [None] and merged.straight == 1
    again = load(tmp_path / "m").weights["norm.weight"].read()
    assert torch.equal(again, start.weights["norm.weight"].read())
    # Independent numbers around one start: task vectors share its part, which makes 60 degrees.
    assert merged.median_angle == pytest.approx(60, abs=1)


def test_models_that_differ(sources: Sources, tiny: Model, tmp_path: Path) -> None:
    a, b = load_alike([str(path) for path in sources[1:3]])
    average = Average.of("mean", 2)

    def refused(other: Model, words: str) -> None:
        with pytest.raises(MergeError, match=words):
            merge_models([a, other], average, out=tmp_path / "m")

    refused(load("llama3-tiny"), "the family is Gemma3Config here and Llama3Config there")
    refused(dataclasses.replace(b, config=dataclasses.replace(b.config, context=77)), "context is .* here and 77 there")
    theta: Any = dataclasses.replace(a.config.rope_global, theta=3.0)  # type: ignore[attr-defined]
    refused(dataclasses.replace(b, config=dataclasses.replace(b.config, rope_global=theta)), "rope_global.theta is")  # type: ignore[call-arg]
    refused(with_weights(b, {"norm.weight": Weight.of(torch.ones(3))}), r"norm.weight is \[.*\] here and \[3\] there")
    fewer = {name: weight for name, weight in b.weights.items() if name != "norm.weight"}
    refused(dataclasses.replace(b, weights=fewer), "norm.weight is .* here and missing there")
    other = Tokenizer.of_bytes(a.config.vocab_size - 1)
    last = a.config.vocab_size - 1
    refused(dataclasses.replace(b, tokenizer=other), f"the token .* is {last} here and no token there")
    assert not list(tmp_path.iterdir())


def test_codes_do_not_average(sources: Sources, tiny: Model, tmp_path: Path) -> None:
    quantize_model(tiny, quant="int4_block32", out=tmp_path / "q")
    with pytest.raises(MergeError, match=r"is quantised .* do not average: merge the checkpoints in bfloat16"):
        load_alike([str(sources[1]), str(tmp_path / "q")])
    config = dataclasses.replace(STORABLE["gemma3"], name="gguf")
    types = {"ffn_up.weight": "Q8_0"}
    path = write_gguf(tmp_path / "coded.gguf", config, random_weights(config, 5), types=types)
    with pytest.raises(MergeError, match=r"up_proj.weight is quantised \(Q8_0\)"):
        load_alike([str(path), str(sources[1])])
    plain = [
        str(write_gguf(tmp_path / f"{seed}.gguf", config, random_weights(config, seed), types={})) for seed in (1, 2)
    ]
    merge_models(load_alike(plain), Average.of("mean", 2), out=tmp_path / "m")
    assert load(tmp_path / "m").weights.keys() == load(plain[0]).weights.keys()


def test_numbers_that_are_none(sources: Sources, tmp_path: Path) -> None:
    a, b = load_alike([str(path) for path in sources[1:3]])
    name = "layers.3.mlp.up_proj.weight"
    spoilt = b.weights[name].read()
    spoilt[17, 3] = torch.nan
    bad = with_weights(b, {name: dataclasses.replace(Weight.of(spoilt), origin=f"b: {name}").refuse_nonfinite()})
    with pytest.raises(CheckpointError, match=f"b: {name} holds numbers that are not finite in row 17"):
        merge_models([a, bad], Average.of("mean", 2), out=tmp_path / "m")
    large = with_weights(b, {name: Weight.of(spoilt.nan_to_num(3e5))})
    with pytest.raises(RangeError, match=f"the merged {name} reaches .* in row 17, of which float16"):
        merge_models([a, large], Average.of("mean", 2), out=tmp_path / "m", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_command_line(cli: Cli, sources: Sources, tmp_path: Path) -> None:
    start, a, b, c = sources
    out = tmp_path / "m"
    code, text, err = cli("merge", a, b, c, "--method", "warp", "--start", start, "--eta", "0.5", "-o", out, "--json")
    assert code == 0, err
    report = json.loads(text)
    assert report["eta"] == 0.5 and report["start"]["source"] == str(start) and report["folder"] == str(out)
    code, _, err = cli("merge", a, b, "--method", "mean", "-o", out)
    assert code == 2 and "exists already" in err
    options = ("--method", "mean", "--shares", "0.75,0.25", "-o", out)
    code, text, err = cli("merge", a, b, *options, "--overwrite")
    assert code == 0 and "mean of 2" in text and "float32" in text, err
    name = "layers.0.mlp.up_proj.weight"
    left, right, merged = (load(path).weights[name].read() for path in (a, b, out))
    assert torch.allclose(merged, 0.75 * left + 0.25 * right, atol=1e-6)
    code, text, err = cli("merge", a, b, "--method", "slerp", "--start", start, "-o", tmp_path / "s")
    assert code == 0 and "median angle between what training added: 60." in text.replace("59.", "60."), err
    (out / "notes.txt").write_text("mine")
    code, _, err = cli("merge", a, b, *options, "--overwrite")
    assert code == 2 and "holds what transom did not write there (notes.txt)" in err


REFUSED = {
    "one": (("a", "--method", "mean"), "of one model is that model"),
    "twice": (("a", "a", "--method", "mean"), "is named twice"),
    "no start": (("a", "b", "--method", "slerp"), "give --start MODEL"),
    "start for nothing": (("a", "b", "--method", "mean", "--start", "start"), "reads no --start"),
    "start is a source": (("a", "b", "--method", "warp", "--start", "a"), "is named twice"),
    "shares": (("a", "b", "--method", "mean", "--shares", "1,1"), "sum to 2"),
    "words": (("a", "b", "--method", "mean", "--shares", "half"), "takes numbers with commas between"),
    "dtype": (("a", "b", "--method", "mean", "--dtype", "int8"), "no dtype named 'int8'"),
    "missing": (("a", "nowhere", "--method", "mean"), "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_command_refuses(case: str, cli: Cli, sources: Sources, tmp_path: Path) -> None:
    args, words = REFUSED[case]
    named = {path.name: path for path in sources}
    code, out, err = cli("merge", *(named.get(arg, arg) for arg in args), "-o", tmp_path / "m")
    assert code == 2 and words in err and not out, err
    assert not list(tmp_path.iterdir())


def test_a_source_is_not_replaced(sources: Sources, tmp_path: Path) -> None:
    a, b, _ = load_alike([str(path) for path in sources[1:]])
    merge_models([a, b], Average.of("mean", 2), out=tmp_path / "m")
    again = load(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    with pytest.raises(ArtifactError, match="is the model that is read"):
        merge_models([again, b], Average.of("mean", 2), out=tmp_path / "m", overwrite=True)
    with pytest.raises(ArtifactError, match="is the model that is read"):
        merge_models([a, b], Average.of("slerp", 2), start=again, out=tmp_path / "m", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
