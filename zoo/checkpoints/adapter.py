"""Adapters of low rank (LoRA, arXiv 2106.09685) in peft's files: `adapter_config.json`, `adapter_model.safetensors`.

An adapter adds `scale * B A` to matrices of a model: A [r, K] and B [R, r] for a matrix [R, K]. peft names its tensors
by the modules of transformers' classes, and a parameter that is no module's `weight` by the module that holds it, with
the parameter itself among `target_parameters` of the config.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transom.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.json_object import is_file, read_object
from transom.wording import listed
from transom.zoo.checkpoints.containers import ADAPTER
from transom.zoo.checkpoints.layout import in_class, own_names
from transom.zoo.checkpoints.safetensors import DTYPES, read_bytes, read_entries
from transom.zoo.checkpoints.safetensors_writer import write

CONFIG, TENSORS, PICKLED = ADAPTER

_ROOT = "base_model.model."
_ENDS = {".lora_A.weight": 0, ".lora_B.weight": 1}
_MEND = "save the adapter again, or fetch it again"

_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "target_parameters", "bias", "init_lora_weights"})
_IGNORED = frozenset(
    {
        # What was trained, which the tensors' names tell, and where.
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping", "revision",
        "base_model_name_or_path", "peft_version", "task_type", "inference_mode", "ensure_weight_tying",
        # How it was trained.
        "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
        # How a method that is off would work.
        "megatron_core", "qalora_group_size",
    }
)  # fmt: skip
"""Keys of peft's config that change none of an adapter's numbers. All others must be off."""

_OWN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Starts of training that leave the model's own weights as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is added to matrices of a model.

    Attributes:
        factors: A [r, K] and B [R, r], float32, by the matrix's name in the module's state dict.
        scale: Factor on every product.
    """

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float

    @property
    def revision(self) -> str:
        """Identity of its numbers."""
        digest = hashlib.sha256(str(self.scale).encode())
        for name, factors in sorted(self.factors.items()):
            digest.update(name.encode())
            for factor in factors:
                digest.update(factor.numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def merged(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """A model's weights with the adapter in them, made when rows are read.

        What is merged is float32 whatever it was, so that it is rounded once at most, and has no codes any more.
        """
        return {
            **weights,
            **{name: _with_product(weights[name], a, b * self.scale) for name, (a, b) in self.factors.items()},
        }


def _with_product(base: Weight, a_rK: torch.Tensor, b_Rr: torch.Tensor) -> Weight:
    return Weight(
        shape=base.shape,
        dtype=torch.float32,
        read_rows=lambda start, stop: base.read_rows(start, stop).float() + b_Rr[start:stop] @ a_rK,
        origin=f"{base.origin} with an adapter",
    ).refuse_nonfinite()


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Read an adapter, all of it.

    Args:
        folder: Holds the two files.
        shapes: Of the model's tensors, by their names in the module's state dict.

    Raises:
        CheckpointError: If a file is missing or damaged, the adapter is of a kind that is not merged, or is none of
            this model.
    """
    config = read_object(folder / CONFIG, CheckpointError, _MEND)
    if config is None:
        raise CheckpointError(f"{folder}: no {CONFIG}: give the folder of an adapter in peft's format")
    rank, scale = _read_config(folder / CONFIG, config)
    path = folder / TENSORS
    if not is_file(path, CheckpointError):
        pickled = f", but {PICKLED}: save it as safetensors" if (folder / PICKLED).is_file() else f": {_MEND}"
        raise CheckpointError(f"{folder}: no {TENSORS}{pickled}")
    entries, _ = read_entries(path)
    factors: dict[str, dict[int, torch.Tensor]] = {}
    for in_file, entry in sorted(entries.items()):
        origin = f"{path}: {in_file}"
        stem, part = next(
            ((in_file[: -len(end)], part) for end, part in _ENDS.items() if in_file.endswith(end)), ("", 0)
        )
        if not stem.startswith(_ROOT):
            raise CheckpointError(
                f"{origin}: only matrices {' and '.join(_ENDS)} of modules under {_ROOT} are merged: train linear "
                "layers alone"
            )
        name = _matrix(stem.removeprefix(_ROOT), shapes, config.get("target_parameters") or ())
        if name is None:
            raise CheckpointError(
                f"{origin}: the model has no such matrix: the adapter is of another model, or of its encoder of "
                "images, which must be opened with it"
            )
        if name in factors and part in factors[name]:
            raise CheckpointError(f"{origin}: {name} has two factors of this kind: {_MEND}")
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{origin} is {entry.dtype}, expected one of {', '.join(DTYPES)}: {_MEND}")
        rows, columns = shapes[name]
        expected = (rows, rank) if part else (rank, columns)
        if entry.shape != expected:
            other_rank = len(entry.shape) == 2 and entry.shape[part] != rank
            reason = f"the config says rank {rank}" if other_rank else "the adapter is of another model"
            raise CheckpointError(f"{origin} has shape {list(entry.shape)}, expected {list(expected)}: {reason}")
        raw = read_bytes(entry, 0, entry.stop - entry.start)
        tensor = raw.view(DTYPES[entry.dtype]).view(entry.shape).float()
        if not tensor.isfinite().all():
            raise CheckpointError(f"{origin} holds NaN or infinity: train the adapter again")
        factors.setdefault(name, {})[part] = tensor
    if lone := [name for name, pair in factors.items() if len(pair) < 2]:
        raise CheckpointError(f"{path}: {listed(lone)} lack one of two factors: {_MEND}")
    if not factors:
        raise CheckpointError(f"{path} holds no tensors: {_MEND}")
    return Adapter(factors={name: (pair[0], pair[1]) for name, pair in factors.items()}, scale=scale)


def _read_config(path: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank, and the factor on products."""

    def refuse(key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: {key} is {json.dumps(config.get(key))}: {expected}")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "only adapters of LORA are merged")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise refuse("r", "expected a whole number from 1 on")
    if type(alpha) not in (int, float) or not math.isfinite(alpha or 0.0):
        raise refuse("lora_alpha", "expected a finite number")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "adapters with biases are not merged")
    if config.get("init_lora_weights", True) not in _OWN_STARTS:
        raise refuse("init_lora_weights", "it changes the model's own weights: convert the adapter to plain LoRA")
    names = config.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise refuse("target_parameters", "expected names of parameters")
    for key, value in config.items():
        if key not in _READ | _IGNORED and value not in (None, False, 0, "", [], {}, "none"):
            raise refuse(key, "it is not merged: leave it at peft's default")
    if config.get("use_rslora") not in (None, False, True):
        raise refuse("use_rslora", "expected true or false")
    assert alpha is not None
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matrix(module: str, shapes: Mapping[str, tuple[int, ...]], parameters: Any) -> str | None:
    """The matrix that a module in a class of transformers stands for; None if the model has none."""
    # A module that has a weight is meant by it; of another one, a parameter that the config names.
    ends = ["weight", *dict.fromkeys(name.rpartition(".")[2] for name in parameters)]
    candidates = {name for end in ends for name in own_names(f"{module}.{end}") if len(shapes.get(name, ())) == 2}
    return candidates.pop() if len(candidates) == 1 else None


def write_adapter(
    folder: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], *, alpha: float, base: str
) -> None:
    """Write an adapter of a model that sees images, which `read_adapter` and peft read alike.

    Args:
        folder: Where; it exists.
        factors: A [r, K] and B [R, r] by the matrix's name in the module's state dict, all of one rank.
        alpha: The factor on products, times the rank.
        base: What the adapted model is called.
    """
    modules, parameters, tensors = [], [], {}
    for name, pair in factors.items():
        in_theirs = in_class(name)
        module, _, last = in_theirs.rpartition(".")
        if last == "weight":
            modules.append(module)
        else:
            parameters.append(in_theirs)
        for end, part in _ENDS.items():
            tensors[f"{_ROOT}{module}{end}"] = Weight.of(pair[part].float().contiguous())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": next(iter(factors.values()))[0].shape[0],
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write(tensors, folder / TENSORS, metadata={"format": "pt"})
