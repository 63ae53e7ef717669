"""Fine-tuning on pairs: losses on answers alone, gradients where they belong, runs that go on, files, errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import transom
from tests.conftest import Cli
from tests.tolerances import FP32_LOGITS
from tests.training.pairs import write_pairs
from transom.backends.prompt import split_at
from transom.errors import ContextLengthError, ImageError, TrainingError
from transom.images.pairs import Pair, read_pairs
from transom.training.finetune_vision import finetune_vision
from transom.training.loop import Metrics
from transom.training.objectives.vision import Vision, VisionSettings, read_examples
from transom.zoo.model import Model, load

NAME = "gemma3-vision-tiny"
SHORT = VisionSettings(rank=2, steps=6, batch=3, learning_rate=3e-3, save_every=2)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(NAME, images=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def objective(model: Model, data: Path, **changes: Any) -> Vision:
    """An objective whose products are not zero, so that both factors have gradients."""
    vision = Vision(model, dataclasses.replace(SHORT, **changes), read_examples(model, read_pairs(data)))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in vision.parameters.items():
            if name.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.01)
    return vision


def gradients_of(vision: Vision) -> dict[str, torch.Tensor]:
    for loss in vision.losses(0):
        loss.value.backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in vision.parameters.items() if parameter.grad is not None}


def test_a_prompt_is_what_run_reads(model: Model, data: Path) -> None:
    """Tokens of a session's own prompt, then the answer's; each image's tokens see each other."""
    pairs, (first, second, *_) = read_pairs(data), read_examples(model, read_pairs(data))
    images, tokenizer = model.config.images, model.tokenizer
    assert images is not None and tokenizer is not None
    for pair, example in zip(pairs, (first, second), strict=False):
        before, after = (text for text in _texts(pair))
        expected = [
            *tokenizer.encode(f"{before}{images.text_before}"),
            images.begin_id, *[-1] * images.soft_tokens, images.end_id,
            *tokenizer.encode(f"{images.text_after}{after}", bos=False),
        ]  # fmt: skip
        assert example.tokens.tolist() == [*expected, *tokenizer.encode(pair.answer, bos=False)]
        assert example.first == len(expected)
        soft = [place for place, token in enumerate(expected) if token < 0]
        until = [soft[-1] if place in soft else place for place in range(len(example.tokens))]
        assert example.until.tolist() == until
    assert first.layout != second.layout


def _texts(pair: Pair) -> tuple[str, str]:
    parts = split_at(pair.prompt, "<image>", [pair.image])
    before, after = parts[: parts.index(pair.image)], parts[parts.index(pair.image) + 1 :]
    return "".join(before), "".join(after)


def test_the_loss_is_that_of_the_answer(model: Model, data: Path) -> None:
    vision = objective(model, data, train="projector")
    example = vision._examples[1]
    tokens, module = torch.from_numpy(example.tokens)[None], vision.module
    with torch.no_grad():
        soft = torch.zeros(1, tokens.shape[1], model.config.hidden_size)
        soft[tokens < 0] = module.encode_image(vision._pixels(example.image))[0]
        until = torch.from_numpy(example.until)
        logits = module(tokens, torch.tensor(0), None, until=until, soft=soft)[0][0]
    log_p = logits.log_softmax(-1)
    expected = -sum(float(log_p[place - 1, tokens[0, place]]) for place in range(example.first, len(example.tokens)))
    count = len(example.tokens) - example.first
    measured = vision.measure([example])
    assert count == 2 and measured["loss"] == pytest.approx(expected / count, abs=FP32_LOGITS)
    assert measured["exact_match"] == 0
    # An answer that the model gives itself is an exact one; with another last token it is none.
    likeliest = logits[example.first - 1].argmax()
    tokens[0, example.first] = likeliest
    single = dataclasses.replace(example, tokens=tokens[0, : example.first + 1].numpy(), until=example.until[:-1])
    assert vision.measure([single])["exact_match"] == 1
    other = dataclasses.replace(single, tokens=single.tokens.copy())
    other.tokens[-1] = (int(likeliest) + 1) % 256
    assert vision.measure([other])["exact_match"] == 0


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("train", ["projector", "tower", "both"])
def test_gradients_are_only_where_they_belong(
    train: str, method: Literal["lora", "full"], model: Model, data: Path
) -> None:
    vision = objective(model, data, train=train, method=method)
    heads = {"projector": ("multi_modal_projector.",), "tower": ("vision_tower.",)}
    prefixes = heads.get(train, heads["projector"] + heads["tower"])
    gradients = gradients_of(vision)
    assert gradients.keys() == vision.parameters.keys() and all(name.startswith(prefixes) for name in gradients)
    # A shift of keys shifts all scores of a query alike.
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if not name.endswith("k_proj.bias"))
    assert all(any(name.startswith(head) for name in gradients) for head in prefixes)
    trained = {id(parameter) for parameter in vision.parameters.values()}
    others = [parameter for parameter in vision.module.parameters() if id(parameter) not in trained]
    assert others and not any(p.requires_grad or p.grad is not None for p in others)
    if method == "lora":
        projections = 12 if train == "tower" else 1 if train == "projector" else 13
        assert len(gradients) == 2 * projections
    else:
        assert {name for name in model.weights if name.startswith(prefixes)} == gradients.keys()


@pytest.mark.parametrize("changes", [{"rows": 3}, {"recompute": True}])
def test_neither_rows_nor_memory_change_the_gradient(changes: dict[str, Any], model: Model, data: Path) -> None:
    expected, actual = (gradients_of(objective(model, data, batch=8, **more)) for more in ({}, changes))
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_where_it_was_saved(model: Model, data: Path, tmp_path: Path) -> None:
    whole = finetune_vision(model, SHORT, data=data, out=tmp_path / "whole", held_out=2)

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, metrics: Metrics) -> None:
        if done == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        finetune_vision(model, SHORT, data=data, out=tmp_path / "parts", held_out=2, on_step=stop)
    assert not (tmp_path / "parts").exists() and (tmp_path / ".parts.training").is_file()
    with pytest.raises(TrainingError, match="another model, text or settings"):
        finetune_vision(model, SHORT, data=data, out=tmp_path / "parts", held_out=1)
    steps: list[int] = []
    again = finetune_vision(
        model, SHORT, data=data, out=tmp_path / "parts", held_out=2, on_step=lambda done, *_: steps.append(done)
    )
    assert steps == [5, 6], "step 5 was not saved"
    assert (again.metrics, again.before, again.after) == (whole.metrics, whole.before, whole.after)
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def _same(first: Model, second: Model) -> bool:
    return all(torch.equal(weight.read(), second.weights[name].read()) for name, weight in first.weights.items())


def test_the_command_writes_adapters_and_checkpoints(model: Model, data: Path, tmp_path: Path, cli: Cli) -> None:
    options = ["--data", data, "--steps", 3, "--batch", 2, "--rank", 2, "--learning-rate", 0.01]
    code, out, errors = cli("finetune-vision", NAME, *options, "--held-out", 2, "--json", "-o", tmp_path / "beside")
    assert code == 0, errors
    report = json.loads(out)
    assert len(report["loss"]) == 3 and report["before"]["loss"] != report["after"]["loss"]
    assert sorted(path.name for path in (tmp_path / "beside").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "training.json",
    ]  # fmt: skip
    written = json.loads((tmp_path / "beside" / "training.json").read_text())
    assert written["held_out"] == {"pairs": 2, "before": report["before"], "after": report["after"]}
    # The same run, merged.
    code, out, errors = cli("finetune-vision", NAME, *options, "--held-out", 2, "--merge", "-o", tmp_path / "merged")
    assert code == 0 and "held out, exact match: " in out, errors
    adapted, merged = load(NAME, images=True, adapter=tmp_path / "beside"), load(tmp_path / "merged", images=True)
    assert _same(adapted, merged) and not _same(model, merged) and merged.tokenizer is not None
    # Other weights change only where they were trained.
    code, _, errors = cli(
        "finetune-vision", NAME, *options, "--method", "full", "--train", "projector", "-o", tmp_path / "full"
    )
    assert code == 0, errors
    full = load(tmp_path / "full", images=True)
    differing = {n for n, weight in full.weights.items() if not torch.equal(weight.read(), model.weights[n].read())}
    assert differing == {name for name in model.weights if name.startswith("multi_modal_projector.")}
    # What it wrote it replaces, if told so, and nothing else.
    assert cli("finetune-vision", NAME, *options, "-o", tmp_path / "full")[0] == 2
    assert cli("finetune-vision", NAME, *options, "--overwrite", "-o", tmp_path / "full")[0] == 0
    assert not (tmp_path / "full" / "model.safetensors").exists()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    code, _, errors = cli("finetune-vision", NAME, *options, "--overwrite", "-o", tmp_path / "full")
    assert code == 2 and "mine.txt" in errors


def test_an_artifact_of_a_trained_model(model: Model, data: Path, tmp_path: Path) -> None:
    """It has learned, and greedy answers of an artifact with the adapter are those that the run counted as exact."""
    settings = dataclasses.replace(SHORT, steps=50, batch=8, rows=4, rank=8, learning_rate=2e-2)
    losses = [
        metrics["loss"] for metrics in finetune_vision(model, settings, data=data, out=tmp_path / "adapter").metrics
    ]
    assert losses[-1] < 0.5 * losses[0]
    adapted = load(NAME, images=True, adapter=tmp_path / "adapter")
    transom.compile(adapted, out=tmp_path / "artifact", context=96, chunk=32)
    session, pairs = transom.open(tmp_path / "artifact"), read_pairs(data)
    examples = read_examples(adapted, pairs)
    judge = Vision(adapted, dataclasses.replace(SHORT, method="full"), examples)
    rights = []
    for pair, example in zip(pairs, examples, strict=True):
        answer = example.tokens[example.first :].tolist()
        parts = split_at(pair.prompt, "<image>", [pair.image])
        words = list(session.generate(parts, max_new_tokens=len(answer)))
        rights.append(words == answer)
        assert rights[-1] == bool(judge.measure([example])["exact_match"])
    assert any(rights)


def test_what_is_wrong_is_one_line(model: Model, data: Path, tmp_path: Path, cli: Cli) -> None:
    cases: dict[str, list[object]] = {
        "sees no images": ["gemma3-tiny"],
        "no part named 'decoder': choose one of tower, projector, both": [NAME, "--train", "decoder"],
        "--method takes lora or full": [NAME, "--method", "dora"],
        "a rank of 60 is none of low rank": [NAME, "--rank", 60],
        "8 are held out": [NAME, "--held-out", 8],
        "cannot be read": [NAME, "--data", tmp_path / "none.jsonl"],
        "no device 'nowhere' here": [NAME, "--device", "nowhere"],
        "is not what transom finetune-vision wrote": [NAME, "-o", data.parent, "--overwrite"],
    }
    for words, options in cases.items():
        code, _, errors = cli(
            "finetune-vision", options[0], "--data", data, "-o", tmp_path / "out", "--steps", 1, *options[1:]
        )
        assert code == 2 and words in errors and errors.count("\n") == 1, (words, errors)
        assert list(tmp_path.iterdir()) == []


def test_pairs_that_do_not_fit_are_named(model: Model, data: Path) -> None:
    pair = read_pairs(data)[0]
    with pytest.raises(ImageError, match="2 markers"):
        read_examples(model, [dataclasses.replace(pair, prompt="<image> or <image>")])
    with pytest.raises(ContextLengthError, match=r"0\.png has \d+ tokens, the context 512"):
        read_examples(model, [dataclasses.replace(pair, prompt="x" * 600)])
    with pytest.raises(TrainingError, match="sees no images"):
        read_examples(load("gemma3-tiny"), [pair])
