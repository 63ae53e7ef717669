"""Teaching what makes soft tokens of images: pairs of image and text, losses on the answers, a decoder that stays.

What a run changes are matrices of low rank beside the model's own (LoRA, arXiv 2106.09685), or the weights themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from transom.backends.prompt import MARKER, ImageReader, Prompt, join, split_at
from transom.backends.runtime import Float
from transom.errors import ContextLengthError, TokenizerError, TrainingError
from transom.graphs.images import Images
from transom.images.decode import read_image
from transom.images.pairs import Pair
from transom.images.resize import Box, PixelSpec, pixels
from transom.training.device import device_of
from transom.training.loop import LoopSettings, Loss, Objective
from transom.training.text import index_at
from transom.wording import listed
from transom.zoo.architectures import architecture
from transom.zoo.model import Model

KEPT_BYTES = 256 * 2**20
"""Of pixels, that are kept for when they are needed again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """How to train.

    Attributes:
        train: Part of the model: one of its architecture's `image_parts`, or "both" for all of them.
        method: "lora" for matrices of low rank, "full" for all weights of the part.
        rank: Of those matrices.
        alpha: Factor on their products, times the rank; None for twice the rank.
        steps: Of the optimiser.
        batch: Pairs in a step.
        rows: Pairs that go through the model at once, at most, where their tokens stand alike: faster, in more memory.
        learning_rate: At its peak.
        recompute: Compute every layer again on the way back, for less memory.
        seed: Of the order of the pairs and of the first matrices.
        device: Where to compute: "cpu", "cuda" and so on.
        save_every: Steps between two saved states.
    """

    train: str = "both"
    method: Literal["lora", "full"] = "lora"
    rank: int = 8
    alpha: float | None = None
    steps: int = 500
    batch: int = 8
    rows: int = 1
    learning_rate: float = 1e-4
    recompute: bool = False
    seed: int = 0
    device: str = "cpu"
    save_every: int = 50

    @property
    def factor(self) -> float:
        """`alpha`, chosen."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def loop(self) -> LoopSettings:
        """How the optimiser steps."""
        return LoopSettings(
            steps=self.steps, learning_rate=self.learning_rate, epsilon=1e-8, clip=1.0, save_every=self.save_every
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A pair as tokens.

    Attributes:
        image: Its file.
        tokens: Of prompt and answer, int64 [T]; negative where a soft token stands.
        until: Last position that each token sees, int64 [T].
        first: Position of the answer's first token.
    """

    image: Path
    tokens: NDArray[np.int64]
    until: NDArray[np.int64]
    first: int

    @property
    def layout(self) -> tuple[int, int, bytes]:
        """What examples that go through the model at once share."""
        return len(self.tokens), self.first, self.until.tobytes()


class _Places(ImageReader):
    """Stands in for soft tokens that a step will compute."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def soft(self, image: Any, setting: Any, on_image: Any) -> list[Float]:
        return [np.zeros((self.images.soft_tokens, 1), np.float32)]


def read_examples(model: Model, pairs: Iterable[Pair]) -> list[Example]:
    """Pairs as tokens: the prompt with its image, as `transom run` reads it, and the answer right behind it.

    Raises:
        TrainingError: If the model sees no images, or an answer is no token.
        TokenizerError: If it has no tokenizer.
        ImageError: If a prompt has several places for its image.
        ContextLengthError: If a pair is longer than the model's context.
    """
    images, tokenizer = model.config.images, model.tokenizer
    if images is None:
        raise TrainingError(f"{model.config.name} sees no images: give a model with its encoder of images")
    if tokenizer is None:
        raise TokenizerError(f"{model.config.name} has no tokenizer, so it cannot read pairs: give a source that has")
    examples = []
    for pair in pairs:
        prompt = join(split_at(pair.prompt, MARKER, [pair.image]), _Places(images), tokenizer)
        answer = tokenizer.encode(pair.answer, bos=False)
        if not answer:
            raise TrainingError(f"the answer {pair.answer!r} to {pair.image} has no tokens: give another one")
        tokens = np.concatenate((prompt.tokens, np.array(answer, np.int64)))
        if len(tokens) > model.config.context:
            raise ContextLengthError(
                f"the pair of {pair.image} has {len(tokens)} tokens, the context {model.config.context}: shorten it"
            )
        until = Prompt(tokens=tokens, soft=prompt.soft).part(0, len(tokens), 0).until
        assert until is not None, "a pair has an image"
        examples.append(Example(image=pair.image, tokens=tokens, until=until, first=len(prompt)))
    return examples


class _AddProduct(nn.Module):
    """`W + scale * B A`, as a parametrisation."""

    def __init__(self, a_rK: torch.Tensor, b_Rr: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a_rK), nn.Parameter(b_Rr), scale

    def forward(self, w_RK: torch.Tensor) -> torch.Tensor:
        return w_RK + self.scale * (self.b @ self.a)


def trained_names(model: Model, module: nn.Module, train: str, method: str) -> list[str]:
    """Parameters of a part that a method changes: all of them, or, for low rank, the matrices that it multiplies with.

    Raises:
        TrainingError: If the model has no such part.
    """
    parts = architecture(model.config.architecture).image_parts
    if model.config.images is None or not parts:
        raise TrainingError(f"{model.config.name} sees no images: give a model with its encoder of images")
    if train != "both" and train not in parts:
        raise TrainingError(f"no part named {train!r}: choose one of {listed([*parts, 'both'])}")
    heads = tuple(parts.values()) if train == "both" else (parts[train],)
    names = []
    for path, owner in module.named_modules():
        for last, parameter in owner.named_parameters(path, recurse=False):
            # A table's rows are looked up.
            multiplied = parameter.dim() == 2 and not isinstance(owner, nn.Embedding)
            if last.startswith(heads) and (multiplied or method == "full"):
                names.append(last)
    return names


class Vision(Objective):
    """The model, with what is trained in it.

    Args:
        model: What to begin with.
        settings: How to train.
        examples: What it learns from.

    Attributes:
        settings: How it trains.
        module: The plain module, with the matrices of low rank in it.
    """

    def __init__(self, model: Model, settings: VisionSettings, examples: Sequence[Example]) -> None:
        self.settings, self._examples, self._device = settings, examples, device_of(settings.device)
        module = model.eager().to(self._device)
        names = trained_names(model, module, settings.train, settings.method)
        if settings.method == "full":
            self.parameters = {name: module.get_parameter(name).requires_grad_(True) for name in names}
        else:
            self.parameters = self._add_products(module, names)
        if settings.recompute:
            _recompute_layers(module)
        self.module: Any = module
        assert model.config.images is not None
        self._spec, self._width = PixelSpec(size=model.config.images.size), model.config.hidden_size
        self._kept: dict[Path, torch.Tensor] = {}

    def _add_products(self, module: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Put A, drawn at random, and B, zeros, beside matrices."""
        settings, parameters = self.settings, dict[str, torch.Tensor]()
        generator = torch.Generator().manual_seed(settings.seed)
        for name in names:
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path)
            rows, columns = getattr(owner, last).shape
            if settings.rank > min(rows, columns):
                raise TrainingError(
                    f"a rank of {settings.rank} is none of low rank for {name} [{rows}, {columns}]: choose a smaller "
                    "--rank"
                )
            a_rK = (torch.rand((settings.rank, columns), generator=generator) * 2 - 1) * columns**-0.5
            b_Rr, scale = torch.zeros(rows, settings.rank), settings.factor / settings.rank
            product = _AddProduct(a_rK.to(self._device), b_Rr.to(self._device), scale)
            parametrize.register_parametrization(owner, last, product)
            parameters |= {f"{name}.a": product.a, f"{name}.b": product.b}
        return parameters

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B by the matrix's name."""
        names = [name.removesuffix(".a") for name in self.parameters if name.endswith(".a")]
        return {name: (self._value(f"{name}.a"), self._value(f"{name}.b")) for name in names}

    def weights(self) -> dict[str, torch.Tensor]:
        """Weights that were trained themselves."""
        return {name: self._value(name) for name in self.parameters}

    def _value(self, name: str) -> torch.Tensor:
        return self.parameters[name].detach().cpu()

    def losses(self, step: int) -> Iterator[Loss]:
        """Mean -log p of answers' tokens, in nats; pairs that stand alike go through the model at once."""
        batch, groups = self.settings.batch, dict[Any, list[Example]]()
        for place in range(step * batch, (step + 1) * batch):
            example = self._examples[index_at(place, len(self._examples), self.settings.seed)]
            groups.setdefault(example.layout, []).append(example)
        for rows in groups.values():
            for first in range(0, len(rows), self.settings.rows):
                chosen = rows[first : first + self.settings.rows]
                lost_B, right_B = self._run(chosen)
                yield Loss(value=lost_B.sum() / batch, metrics={"exact": float(right_B.sum()) / batch})

    def measure(self, examples: Sequence[Example]) -> dict[str, float]:
        """Mean loss, in nats a token of an answer, and share of the answers that greedy decoding gives exactly."""
        with torch.no_grad():
            results = [self._run([example]) for example in examples]
        return {
            "loss": sum(float(lost) for lost, _ in results) / len(examples),
            "exact_match": sum(float(right) for _, right in results) / len(examples),
        }

    def _run(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over each answer's tokens, and whether all of them are the likeliest, [B] each.

        If every token of an answer is the likeliest after those before it, greedy decoding gives that answer.
        """
        tokens_BT = torch.from_numpy(np.stack([example.tokens for example in examples])).to(self._device)
        until_T = torch.from_numpy(examples[0].until).to(self._device)
        pixels_BCYX = torch.cat([self._pixels(example.image) for example in examples]).to(self._device)
        soft_BQD = self.module.encode_image(pixels_BCYX)
        is_soft_BT1 = (tokens_BT < 0)[..., None]
        soft_BTD = soft_BQD.new_zeros(*tokens_BT.shape, self._width).masked_scatter(is_soft_BT1, soft_BQD)
        start = torch.zeros((), dtype=torch.int64, device=self._device)
        hidden_BTD, _ = self.module.hidden(tokens_BT, start, None, until=until_T, soft=soft_BTD)
        first = examples[0].first
        logits_BAV = self.module.head(hidden_BTD[:, first - 1 : -1])
        answers_BA = tokens_BT[:, first:]
        lost_BA = nn.functional.cross_entropy(logits_BAV.float().transpose(1, 2), answers_BA, reduction="none")
        return lost_BA.mean(1), (logits_BAV.argmax(-1) == answers_BA).all(1)

    def _pixels(self, image: Path) -> torch.Tensor:
        if image in self._kept:
            return self._kept[image]
        array = read_image(image)
        values = torch.from_numpy(pixels(array, Box(0, 0, *array.shape[:2]), self._spec))
        if (len(self._kept) + 1) * values.nbytes <= KEPT_BYTES:
            self._kept[image] = values
        return values


def _recompute_layers(module: nn.Module) -> None:
    """Forget what each layer of a stack computed, and compute it again on the way back."""
    for stack in module.modules():
        for layer in stack if isinstance(stack, nn.ModuleList) else ():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def identity(pairs: Sequence[Pair], held_out: int) -> str:
    """What tells the data of one run from another's: texts and bytes of images."""
    digest = hashlib.sha256(str(held_out).encode())
    for pair in pairs:
        digest.update(repr((pair.prompt, pair.answer)).encode() + hashlib.sha256(pair.image.read_bytes()).digest())
    return digest.hexdigest()
