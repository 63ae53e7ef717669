"""Write the suite: `python -m tests.conformance.generate OUT`. The same seed gives the same files.

Numbers are drawn from the raw bits of numpy's SFC64 generator, which numpy promises to keep; its distributions it
may change. Expected logits are sums in float64, so another machine's may differ in the last digits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.conformance.cases import CASES, SOFT_TOKENS, Case, cache_bounds, schedules
from tests.conformance.reference import SOFT, compute_logits, encode_image, read_config, read_weights

FORMAT = 2
_KINDS = {"L": "sliding_attention", "G": "full_attention"}

_BEGIN, _END, _IMAGE = -3, -2, -1
"""Ids around an image, and the one that Hugging Face writes for a soft token, from the end of the vocabulary."""

_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 2,
    "num_channels": 3,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": False,
}


def write_case(folder: Path, case: Case, seed: int = 0) -> None:
    """Write one case's folder."""
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", _config(case))
    save_file(_weights(case, seed), folder / "model.safetensors", metadata={"format": "pt"})
    ids = case.vocab_size - 3 if case.images else case.vocab_size
    tokens_T = (_uniform(f"{seed}/{case.name}/tokens", (case.length,)) * ids).astype(np.int64)
    for start, stop in case.images:
        tokens_T[start - 1], tokens_T[start:stop], tokens_T[stop] = ids, SOFT, ids + 1
    # From the files, so that what is expected belongs to what was written.
    config, weights = read_config(folder / "config.json"), read_weights(folder / "model.safetensors")
    if case.images:
        shape = (len(case.images), 3, _VISION["image_size"], _VISION["image_size"])
        pixels = (2.0 * _uniform(f"{seed}/{case.name}/pixels", shape) - 1.0).astype(np.float32)
        soft = np.stack([encode_image(config, weights, image) for image in pixels])
        np.savez(folder / "inputs.npz", tokens=tokens_T, pixels=pixels)
        np.savez(folder / "expected.npz", logits=compute_logits(config, weights, tokens_T, soft), soft=soft)
    else:
        np.savez(folder / "inputs.npz", tokens=tokens_T)
        np.savez(folder / "expected.npz", logits=compute_logits(config, weights, tokens_T))
    _write_json(
        folder / "case.json",
        {
            "format": FORMAT,
            "name": case.name,
            "purpose": case.purpose,
            "needs": case.needs,
            "layers": case.layers,
            "window": case.window,
            "context": case.length,
            "image_tokens": SOFT_TOKENS if case.images else 0,
            "schedules": [{**schedule, "caches": cache_bounds(case, schedule)} for schedule in schedules(case)],
        },
    )


def write_suite(folder: Path, seed: int = 0) -> list[Path]:
    """Write every case; returns their folders.

    Raises:
        FileExistsError: If a case's folder exists.
    """
    for case in CASES:
        write_case(folder / case.name, case, seed)
    return [folder / case.name for case in CASES]


def _config(case: Case) -> dict[str, Any]:
    if case.images:
        text = {key: value for key, value in _text_config(case).items() if key != "architectures"}
        return {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": text,
            "vision_config": _VISION,
            "mm_tokens_per_image": SOFT_TOKENS,
            "boi_token_index": case.vocab_size + _BEGIN,
            "eoi_token_index": case.vocab_size + _END,
            "image_token_index": case.vocab_size + _IMAGE,
            "tie_word_embeddings": True,
        }
    return _text_config(case)


def _text_config(case: Case) -> dict[str, Any]:
    scaled = {"rope_type": "linear", "factor": case.rope_factor} if case.rope_factor != 1.0 else {}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": case.vocab_size,
        "hidden_size": case.hidden_size,
        "intermediate_size": case.intermediate_size,
        "num_hidden_layers": len(case.layers),
        "num_attention_heads": case.num_heads,
        "num_key_value_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": case.query_scalar or case.head_dim,
        "sliding_window": case.window,
        "layer_types": [_KINDS[kind] for kind in case.layers],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            # As far apart as in Gemma 3, but small: a long text is a hundred tokens here.
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0, **scaled},
        },
        "final_logit_softcapping": case.softcap,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def _weights(case: Case, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights that make faults loud.

    Keys and queries are scaled up, so that attention is far from uniform and a key more or less matters; the embedding
    is small against what the layers add; the last norm makes up for it.
    """
    D, F, V = case.hidden_size, case.intermediate_size, case.vocab_size
    NH, KH, H = case.num_heads * case.head_dim, case.num_kv_heads * case.head_dim, case.head_dim
    prefix = "language_model.model." if case.images else "model."
    drawn = {"embed_tokens.weight": ((V, D), 0.0, 0.5 * D**-0.5), "norm.weight": ((D,), 3.0, 0.3)}
    for index in range(len(case.layers)):
        layer = f"layers.{index}."
        for name, shape in (
            ("self_attn.q_proj", (NH, D)),
            ("self_attn.k_proj", (KH, D)),
            ("self_attn.v_proj", (KH, D)),
            ("self_attn.o_proj", (D, NH)),
            ("mlp.gate_proj", (F, D)),
            ("mlp.up_proj", (F, D)),
            ("mlp.down_proj", (D, F)),
        ):
            drawn[f"{layer}{name}.weight"] = (shape, 0.0, shape[1] ** -0.5)
        for name in ("q_norm", "k_norm"):
            drawn[f"{layer}self_attn.{name}.weight"] = ((H,), 0.5, 0.3)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            drawn[f"{layer}{name}_layernorm.weight"] = ((D,), 0.0, 0.3)
    key = f"{seed}/{case.name}"
    drawn = {f"{prefix}{name}": how for name, how in drawn.items()} | (_vision_tensors(D) if case.images else {})
    return {
        name: (mean + deviation * 12**0.5 * (_uniform(f"{key}/{name.removeprefix(prefix)}", shape) - 0.5)).astype(
            np.float32
        )
        for name, (shape, mean, deviation) in drawn.items()
    }


def _vision_tensors(width: int) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """Shape, mean and deviation of every tensor of the image encoder and what brings it to the decoder's width."""
    E, F, patch = _VISION["hidden_size"], _VISION["intermediate_size"], _VISION["patch_size"]
    patches = (_VISION["image_size"] // patch) ** 2
    drawn: dict[str, tuple[tuple[int, ...], float, float]] = {
        "multi_modal_projector.mm_input_projection_weight": ((E, width), 0.0, E**-0.5),
        "multi_modal_projector.mm_soft_emb_norm.weight": ((E,), 0.0, 0.3),
    }
    tower = "vision_tower.vision_model."
    shapes: dict[str, tuple[int, ...]] = {f"{tower}embeddings.patch_embedding": (E, 3, patch, patch)}
    norms = [f"{tower}post_layernorm"]
    for index in range(_VISION["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{index}."
        shapes |= {f"{layer}self_attn.{name}": (E, E) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        shapes |= {f"{layer}mlp.fc1": (F, E), f"{layer}mlp.fc2": (E, F)}
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
    for name, shape in shapes.items():
        drawn[f"{name}.weight"] = (shape, 0.0, int(np.prod(shape[1:])) ** -0.5)
        drawn[f"{name}.bias"] = (shape[:1], 0.0, 0.3)
    for name in norms:
        drawn |= {f"{name}.weight": ((E,), 1.0, 0.3), f"{name}.bias": ((E,), 0.0, 0.3)}
    drawn[f"{tower}embeddings.position_embedding.weight"] = ((patches, E), 0.0, 1.0)
    return drawn


def _uniform(key: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Numbers in [0, 1)."""
    entropy = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    bits = np.random.SFC64(entropy).random_raw(int(np.prod(shape)))
    return (bits >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the conformance suite.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for written in write_suite(given.out, given.seed):
        print(written)
