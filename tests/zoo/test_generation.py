from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from transom.errors import ConfigError
from transom.zoo.generation import GENERATION, Generation, read_sampling

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
"""What stands for a family's own."""

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def read(folder: Path, generation: Any = None, config: Any = None) -> Generation:
    for name, data in ((GENERATION, generation), ("config.json", config)):
        if data is not None:
            (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return Generation.from_folder(folder, SAMPLING)


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        (None, SAMPLING),
        ({}, {"do_sample": False}),
        ({"do_sample": False}, {"do_sample": False}),
        ({"do_sample": None, "temperature": 0.7}, {"do_sample": False}),
        ({"do_sample": False, "temperature": None, "top_k": None, "top_p": None}, {"do_sample": False}),
        ({"do_sample": False, "temperature": 0.0}, {"do_sample": False}),
        ({"do_sample": True}, SAMPLED),
        ({"do_sample": True, "temperature": None, "top_k": None, "top_p": None, "min_p": None}, SAMPLED),
        ({"do_sample": True, "top_k": 0, "temperature": 0}, SAMPLED | {"top_k": 0, "temperature": 0}),
        ({**SAMPLING, "min_p": 0.1}, {**SAMPLING, "min_p": 0.1}),
    ],
    ids=str,
)
def test_sampling_is_the_sources(tmp_path: Path, generation: Any, sampling: dict[str, Any]) -> None:
    assert read(tmp_path, generation).sampling == sampling
    assert read_sampling(tmp_path) == ({"do_sample": False} if generation is None else sampling)
    # What an artifact holds is read back as it was.
    (tmp_path / GENERATION).write_text(json.dumps(read(tmp_path).to_json(2)))
    assert read_sampling(tmp_path) == sampling


@pytest.mark.parametrize(
    ("generation", "config", "stop_ids"),
    [
        (None, None, ()),
        ({"eos_token_id": [1, 106, 50]}, {"eos_token_id": 1}, (1, 50, 106)),
        ({"eos_token_id": 263}, {"eos_token_id": [1, 2]}, (1, 2, 263)),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": [106]}, "eos_token_id": None}, (106,)),
        ({"eos_token_id": []}, {"text_config": {"eos_token_id": 7}, "eos_token_id": 8}, (7, 8)),
    ],
    ids=str,
)
def test_stop_tokens_are_the_union(tmp_path: Path, generation: Any, config: Any, stop_ids: tuple[int, ...]) -> None:
    assert read(tmp_path, generation, config).stop_ids == stop_ids


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ("[1, 2]", "must hold a JSON object, got list"),
        ("{", "not readable as JSON"),
        ("null", "must hold a JSON object, got NoneType"),
        ({"eos_token_id": "<eos>"}, "eos_token_id is '<eos>'"),
        ({"eos_token_id": [[1], 106]}, "eos_token_id is"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"eos_token_id": 1.0}, "eos_token_id is 1.0"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": 10**400, "do_sample": True}, r"temperature is 1000+\.\.\., expected"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 2}, "top_p is 2"),
        ({"min_p": [0.1]}, "min_p is"),
    ],
    ids=str,
)
def test_what_cannot_be(tmp_path: Path, generation: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, generation)
    assert "\n" not in str(caught.value)


def test_settings_that_no_session_applies_are_listed(tmp_path: Path) -> None:
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "bad_words_ids": None, "transformers_version": "5.23.0"}
    assert read(tmp_path, neutral).left_out == ()
    assert read(tmp_path, neutral | {"repetition_penalty": 1.2, "stop_strings": ["###"]}).left_out == (
        "generation_config.json: repetition_penalty = 1.2 is not applied",
        "generation_config.json: stop_strings = ['###'] is not applied",
    )


def test_gguf_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert Generation.from_gguf(path, {}, SAMPLING) == Generation(sampling=SAMPLING)
    ids = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 106, "tokenizer.ggml.eom_token_id": 7}
    assert Generation.from_gguf(path, ids, SAMPLING).stop_ids == (1, 7, 106)
    sampling = {"general.sampling.temp": 0.5, "general.sampling.top_k": 3, "general.sampling.min_p": 0.25}
    assert Generation.from_gguf(path, sampling, SAMPLING).sampling == {
        "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.95, "min_p": 0.25,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"m\.gguf: tokenizer.ggml.eot_token_id is 'x'"):
        Generation.from_gguf(path, {"tokenizer.ggml.eot_token_id": "x"}, SAMPLING)
    assert Generation.from_gguf(path, {"tokenizer.ggml.suppress_tokens": [5]}, SAMPLING).left_out == (
        "tokenizer.ggml.suppress_tokens is not applied",
    )
