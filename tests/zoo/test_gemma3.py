"""Parity of our text of the model with Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.gemma import gemma_module
from tests.tolerances import FP32_LOGITS
from transom.zoo.gemma3 import Gemma3
from transom.zoo.layers import LayerCache, visible_keys
from transom.zoo.model import load

LENGTH = 60
"""More than three windows of gemma3-tiny."""


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Gemma3:
    return gemma_module(load(tiny_folder).eager())


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> transformers.Gemma3ForCausalLM:
    model = transformers.Gemma3ForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def tokens_BT() -> torch.Tensor:
    return torch.randint(0, 512, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def empty_caches(model: Gemma3, batch: int, slots: int) -> list[LayerCache]:
    config = model.config
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]


def run_in_chunks(model: Gemma3, tokens_BT: torch.Tensor, chunks: list[int], slots: int) -> torch.Tensor:
    caches, logits, start = empty_caches(model, len(tokens_BT), slots), [], 0
    for size in chunks:
        some, caches = model(tokens_BT[:, start : start + size], torch.tensor(start), caches)
        logits.append(some)
        start += size
    return torch.cat(logits, dim=1)


def test_logits(tiny: Gemma3, theirs: transformers.Gemma3ForCausalLM, tokens_BT: torch.Tensor) -> None:
    with torch.no_grad():
        ours_BTV, _ = tiny(tokens_BT, torch.tensor(0), None)
        theirs_BTV = theirs(tokens_BT).logits
    # Not parity of nothing: logits spread, and differ along the sequence.
    assert ours_BTV.std() > 1
    assert len(set(ours_BTV.argmax(-1).flatten().tolist())) > 20
    assert (ours_BTV - theirs_BTV).abs().max() < FP32_LOGITS


@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [7, 20, 1, 1, 31], [48, *[1] * 12]], ids=len)
def test_caches_change_nothing(tiny: Gemma3, tokens_BT: torch.Tensor, chunks: list[int]) -> None:
    whole_BTV, _ = tiny(tokens_BT, torch.tensor(0), None)
    assert (run_in_chunks(tiny, tokens_BT, chunks, slots=64) - whole_BTV).abs().max() < FP32_LOGITS


def test_greedy(tiny: Gemma3, theirs: transformers.Gemma3ForCausalLM, tokens_BT: torch.Tensor) -> None:
    prompt_BT = tokens_BT[:1, :20]
    expected = theirs.generate(prompt_BT, max_new_tokens=LENGTH, do_sample=False, eos_token_id=[])
    caches, ids, new_BT = empty_caches(tiny, 1, 128), prompt_BT, prompt_BT
    for _ in range(LENGTH):
        logits_BTV, caches = tiny(new_BT, torch.tensor(ids.shape[1] - new_BT.shape[1]), caches)
        new_BT = logits_BTV[:, -1:].argmax(-1)
        ids = torch.cat((ids, new_BT), dim=1)
    assert ids.tolist() == expected.tolist()
    assert len(set(ids[0, 20:].tolist())) > 5


def test_window_counts_the_token_itself() -> None:
    seen_TS = visible_keys(torch.arange(LENGTH), LENGTH, 16)
    assert seen_TS.sum(1).tolist() == [min(position + 1, 16) for position in range(LENGTH)]
    assert seen_TS.diagonal().all()
