"""Quantisation-aware training: it helps, it can be stopped and go on, and what it writes is what it trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import transom
from tests.conftest import Cli
from tests.tolerances import FP32_LOGITS, INT8_ACTIVATIONS
from tests.training.test_quantize import divergence
from transom.errors import QuantizationError, TrainingError
from transom.formats.schemes import SPECS, QuantSpec, scheme
from transom.passes.base import Pipeline, rewrites
from transom.passes.fake_quantize import FakeQuantize, FakeQuantized
from transom.training.latent import dithered, into_cells
from transom.training.loop import Metrics
from transom.training.objectives import qat
from transom.training.objectives.qat import Qat, QatSettings
from transom.training.qat import train
from transom.training.quantize import quantize_model, score_graph
from transom.training.stages import Stages
from transom.zoo.model import Model, load

SHORT = QatSettings(quant="int4_block32", steps=8, length=48, batch=2, learning_rate=3e-4, start="nearest")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A local layer sees a window; a global one sees all that came before it. " * 60)
    return path


def test_training_brings_a_model_nearer_to_itself(tiny: Model, words: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, steps=40)
    losses = train(tiny, settings, text=words, out=tmp_path / "trained", target=None)
    quantize_model(tiny, quant="int4_block32", out=tmp_path / "nearest")
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode(words.read_text())[1000:1100]
    before, after = (divergence(tiny, load(tmp_path / name), ids) for name in ("nearest", "trained"))
    assert after < 0.5 * before
    assert len(losses) == 40 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
    report = json.loads((tmp_path / "trained" / "training.json").read_text())
    assert report["kl"] == losses and report["settings"]["steps"] == 40


def test_calibration_is_where_it_begins(tiny: Model, words: Path, tmp_path: Path) -> None:
    """The first loss is that of calibrated codes, not of rounding to nearest."""
    first = {}
    for start in ("nearest", "gptq"):
        settings = dataclasses.replace(SHORT, steps=1, start=start, learning_rate=0.0)
        (first[start],) = train(tiny, settings, text=words, out=tmp_path / start, target=None)
    assert first["gptq"] < 0.5 * first["nearest"]


def test_sequences_lose_together_what_they_lose_one_by_one(
    tiny: Model, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SHORT, steps=2, batch=6, start="nearest")
    assert settings.rows == 6 and dataclasses.replace(settings, length=200).rows == 2
    together = train(tiny, settings, text=words, out=tmp_path / "together", target=None)
    monkeypatch.setattr(qat, "PART_TOKENS", 1)
    assert settings.rows == 1
    one_by_one = train(tiny, settings, text=words, out=tmp_path / "one", target=None)
    assert together == pytest.approx(one_by_one, rel=1e-4)


@pytest.mark.parametrize("quant", ["int4_block32", "int4", "fp8_e4m3:none"])
def test_what_is_written_is_what_was_trained(quant: str, tiny: Model, words: Path, tmp_path: Path) -> None:
    """Fake-quantised logits, the checkpoint's, and the artifact's, which keeps every code."""
    settings = dataclasses.replace(SHORT, quant=quant, steps=3)
    last: list[Qat] = []
    with pytest.MonkeyPatch.context() as patch:
        finished = Qat.result

        def keep(run: Qat) -> object:
            last.append(run)
            return finished(run)

        patch.setattr(Qat, "result", keep)
        train(tiny, settings, text=words, out=tmp_path / "q", target="onnx")
    run, again = last[0], load(tmp_path / "q")
    ids = torch.tensor([[(7 * step) % 500 for step in range(70)]])
    with torch.no_grad():
        hidden = run._student_stages.hidden(ids, run._student)
        logits = run._student_head.logits(hidden)
        assert torch.equal(again.eager()(ids, torch.tensor(0), None)[0], logits)
    artifact = tmp_path / "q" / "onnx"
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["quantization"] == quant and all(entry["kept"] for entry in manifest["conversions"])
    actual = torch.from_numpy(transom.open(artifact).logits(ids[0].tolist()))
    # Activations are rounded to int8 where codes are integers; with 8-bit floats all products are of float32.
    limit = FP32_LOGITS if quant.startswith("fp8") else INT8_ACTIVATIONS
    assert float((actual - logits[0]).square().mean().sqrt()) < limit


def test_a_run_goes_on_where_it_was_saved(tiny: Model, words: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, save_every=3, samples=32)
    whole = train(tiny, settings, text=words, out=tmp_path / "whole", target=None)

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, metrics: Metrics) -> None:
        if done == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(tiny, settings, text=words, out=tmp_path / "parts", target=None, on_step=stop)
    assert not (tmp_path / "parts").exists()
    state = tmp_path / ".parts.training"
    assert state.is_file()
    steps: list[int] = []
    again = train(
        tiny, settings, text=words, out=tmp_path / "parts", target=None, on_step=lambda done, *_: steps.append(done)
    )
    assert steps == [4, 5, 6, 7, 8], "steps 4 and 5 were not saved"
    assert again == whole
    first, second = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert all(torch.equal(first.weights[name].read(), weight.read()) for name, weight in second.weights.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize("case", ["other settings", "damaged"])
def test_a_state_that_does_not_fit_is_refused(case: str, tiny: Model, words: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, steps=4, save_every=2)

    def stop(done: int, total: int, metrics: Metrics) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny, settings, text=words, out=tmp_path / "q", target=None, on_step=stop)
    state = tmp_path / ".q.training"
    if case == "damaged":
        state.write_bytes(state.read_bytes()[:1000])
    else:
        settings = dataclasses.replace(settings, learning_rate=1e-3)
    with pytest.raises(TrainingError, match="remove it to begin again"):
        train(tiny, settings, text=words, out=tmp_path / "q", target=None)
    assert state.is_file() and not (tmp_path / "q").exists()


def test_recomputing_changes_nothing(tiny: Model, words: Path, tmp_path: Path) -> None:
    losses = [
        train(tiny, dataclasses.replace(SHORT, recompute=value), text=words, out=tmp_path / str(value), target=None)
        for value in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_numbers_go_into_their_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, target = torch.randn(4, 64, generator=generator), torch.randn(4, 64, generator=generator).round()
    moved = into_cells(weight, target, -torch.ones(4, 2))
    assert torch.equal(moved.round(), target)
    inside = (weight - target).abs() < 0.49
    assert 20 < int(inside.sum()) < 236
    assert torch.equal(moved[inside], weight[inside]), "what rounds to it already stays"
    assert torch.equal((moved - target)[~inside], 0.25 * (weight - target)[~inside].sign())


def test_dither_parts_ties() -> None:
    ties = torch.arange(-7, 7).float().add(0.5).repeat(8).view(1, -1)[:, :64]
    noisy = dithered(ties, torch.ones(1, 2), SPECS["int4_block32"], torch.Generator().manual_seed(0))
    up = float((noisy.round() > ties).float().mean())
    assert 0.3 < up < 0.7
    assert float((noisy - ties).abs().max()) <= 1 / 16
    assert torch.equal(dithered(ties, torch.ones(1, 2), SPECS["sfp8"], torch.Generator()), ties)


def test_the_pass_shares_one_rounded_table(tiny: Model) -> None:
    """Embedding and head read one node; a linear with codes in the graph reads its own."""
    graph = score_graph(tiny)
    rounded, records = Pipeline([FakeQuantize(scheme("int4_block32:int8_block128"))]).run(graph)
    (result,) = rewrites(records, FakeQuantized)
    assert result.changes == len(result.specs) == 6 * 7 + 1
    assert result.specs["embed_tokens.weight"] == SPECS["int8_block128"]
    stages = Stages(rounded)
    assert stages.table.args[0].name.endswith("embed_tokens_weight")
    assert Pipeline([FakeQuantize(scheme("none"))]).run(graph)[1][0].changes == 0


def test_what_is_refused(tiny: Model, words: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="quantises no projection"):
        train(tiny, dataclasses.replace(SHORT, quant="none:int8_block128"), text=words, out=tmp_path / "q")
    with pytest.raises(TrainingError, match="no device 'abacus'"):
        train(tiny, dataclasses.replace(SHORT, device="abacus"), text=words, out=tmp_path / "q")
    with pytest.raises(TrainingError, match="smaller learning rate"):
        train(tiny, dataclasses.replace(SHORT, learning_rate=1e30), text=words, out=tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == [".q.metrics.jsonl"], "the steps of the run that diverged"


def test_command_line(cli: Cli, words: Path, tmp_path: Path) -> None:
    options = ("--scheme", "int4_block32", "--data", words, "--steps", 3, "--length", 32, "--start", "nearest")
    code, out, err = cli("qat", "gemma3-tiny", *options, "-o", tmp_path / "q", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["steps"] == len(report["kl"]) == 3 and report["artifact"] == str(tmp_path / "q" / "onnxruntime")
    assert cli("run", tmp_path / "q" / "onnxruntime", "--prompt", "A", "--max-new-tokens", 2)[0] == 0
    code, _, err = cli("qat", "gemma3-tiny", *options, "-o", tmp_path / "q")
    assert code == 2 and "exists already" in err
    note = tmp_path / "q" / "onnxruntime" / "notes.txt"
    note.write_text("mine")
    code, _, err = cli("qat", "gemma3-tiny", *options, "-o", tmp_path / "q", "--overwrite")
    assert code == 2 and "(onnxruntime/notes.txt)" in err and note.read_text() == "mine"
    note.unlink()
    assert cli("qat", "gemma3-tiny", *options, "-o", tmp_path / "q", "--overwrite")[0] == 0
    for bad in (("--start", "magic"), ("--target", "abacus"), ("--head-dtype", "int8"), ("--device", "abacus")):
        code, _, err = cli("qat", "gemma3-tiny", *options, *bad, "-o", tmp_path / "x")
        assert code == 2 and bad[1] in err
    assert not (tmp_path / "x").exists()


def test_a_spec_survives_its_key() -> None:
    for spec in (*SPECS.values(), QuantSpec(format="int8", block=64, symmetric=False)):
        assert QuantSpec.of_key(spec.key) == dataclasses.replace(spec, modules="")
