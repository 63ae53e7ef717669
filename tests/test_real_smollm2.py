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
