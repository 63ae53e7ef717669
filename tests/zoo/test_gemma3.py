"""Parity of our text of the model with Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.gemma import gemma_config, gemma_module
from tests.tolerances import FP32_LOGITS, FP32_LOGITS_270M
from transom.zoo.gemma3 import Gemma3
from transom.zoo.layers import LayerCache, visible_keys
from transom.zoo.model import Model, load

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


@pytest.fixture(scope="module")
def real(real_gguf: Path) -> Model:
    return load(real_gguf)


@pytest.mark.real
def test_real_270m(real: Model) -> None:
    assert real.tokenizer is not None
    assert real.parameters == 268_098_176
    ids_BT = torch.tensor([real.tokenizer.encode("The capital of France is")])
    ours = real.eager()
    with torch.no_grad():
        ours_BTV, _ = ours(ids_BT, torch.tensor(0), None)
    top = ours_BTV[0, -1].topk(3)
    assert top.indices.tolist() == [506, 496, 9079]

    config = gemma_config(real.config)
    theirs = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            sliding_window=config.window,
            query_pre_attn_scalar=round(config.attention_scale**-2),
            max_position_embeddings=config.context,
        )
    )
    state = {f"model.{name}": tensor for name, tensor in ours.state_dict().items()}
    result = theirs.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    assert not result.missing_keys and not result.unexpected_keys
    with torch.no_grad():
        theirs_BTV = theirs.eval()(ids_BT).logits
    assert (ours_BTV - theirs_BTV).abs().max() < FP32_LOGITS_270M
