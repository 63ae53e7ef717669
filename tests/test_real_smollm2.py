"""The real SmolLM2-135M-Instruct, a Llama with a byte-level tokenizer and a chat template, from its Q4_1 file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import transom
from tests.tolerances import ONNX_LOGITS_270M
from transom.errors import CheckpointError
from transom.formats.schemes import scheme
from transom.passes.convert_quantized import dequantized
from transom.zoo.checkpoints.random import write_checkpoint
from transom.zoo.model import Model, load

QUESTION = [{"role": "user", "content": "What is the capital of France, and which river runs through it?"}]
NEW = 64


@pytest.fixture(scope="module")
def model() -> Model:
    try:
        return load("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs(model: Model, tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    """Hugging Face's module on the numbers that the file's codes mean."""
    folder = tmp_path_factory.mktemp("smollm2")
    write_checkpoint(folder, model.config, model.weights, dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def test_greedy_text_is_that_of_transformers(
    model: Model, theirs: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    assert model.tokenizer is not None and model.generation.stop_ids == (2,)
    ids = model.tokenizer.encode_chat(QUESTION)  # type: ignore[arg-type]
    transom.compile(model, target="onnxruntime", context=256, chunk=32, out=tmp_path / "artifact")
    session = transom.open(tmp_path / "artifact")
    assert session.tokenizer is not None
    assert session.tokenizer.encode_chat(QUESTION) == ids
    new = list(session.generate(ids, max_new_tokens=NEW, stop_ids=()))
    whole = torch.tensor([[*ids, *new]])
    with torch.no_grad():
        logits = theirs(whole).logits[0].numpy()
    # Greedy, token by token: each is the likeliest after what stands before it.
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == new and len(new) == NEW
    assert "Paris" in session.tokenizer.decode(new)
    assert np.abs(session.logits(whole[0].tolist()) - logits).max() < ONNX_LOGITS_270M


def test_the_codes_of_the_file_are_kept(model: Model, tmp_path: Path) -> None:
    """Q4_1 throughout, and Q8_0 in the table: to the bit as weights, and so in the logits of a float32 runtime."""
    pytest.importorskip("tvm")
    matrices = {name: weight for name, weight in model.weights.items() if len(weight.shape) == 2}
    assert {weight.encoded and weight.encoded.name for weight in matrices.values()} == {"Q4_1", "Q8_0"}
    for name, weight in matrices.items():
        assert torch.equal(dequantized(name, weight, scheme("as_shipped")), weight.read()), name
    ids = model.tokenizer.encode_chat(QUESTION)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        expected = model.eager()(torch.tensor([ids]), torch.tensor(0), None)[0][0].numpy()
    artifact = transom.compile(model, target="tvm", quant="as_shipped", context=64, chunk=32, out=tmp_path / "artifact")
    session = transom.open(artifact.folder)
    # Both kernels: that of many tokens, and that of one.
    logits = np.concatenate((session.logits(ids[:-1]), session.decode(ids[-1])[None]))
    assert np.abs(logits - expected).max() < ONNX_LOGITS_270M
