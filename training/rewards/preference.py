"""A learned reward: a line over a model's last hidden state, fitted to pairs of which people prefer one.

Bradley and Terry: the chosen completion wins with probability sigmoid(r_chosen - r_rejected). The line is fitted alone
first, on hidden states that are computed once (a linear probe, as WARM starts its runs), so that a random head does not
spoil the model's features. Then model and head may be trained together by `pairwise_loss`.

Axes: B sequences, T tokens, D width of the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from transom.errors import RewardError, TokenizerError
from transom.json_object import read_object
from transom.training.policy import Policy
from transom.training.rewards.reward import Score
from transom.zoo.model import Model, load

WEIGHTS_FILE, CONFIG_FILE = "preference.safetensors", "preference.json"

Hidden = Callable[[torch.Tensor], torch.Tensor]
"""Tokens int64 [B, T] to hidden states [B, T, D]; causal, so that what follows a token does not change its state."""

Encode = Callable[[str, str], Sequence[int]]
"""Tokens of a prompt and a completion after it."""


class Pair(NamedTuple):
    """One comparison."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: Path) -> list[Pair]:
    """Comparisons of a file with a JSON object {prompt, chosen, rejected} a line.

    Raises:
        RewardError: If a line is something else, or there is none; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise RewardError(f"{path} cannot be read as UTF-8 ({reason}): give JSON lines") from reason
    pairs = []
    for index, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = [row[key] for key in Pair._fields]
            if not all(isinstance(value, str) for value in texts):
                raise TypeError("a value is no text")
        except (ValueError, TypeError, KeyError, RecursionError) as reason:
            raise RewardError(f"{path}, line {index}: no object of {', '.join(Pair._fields)} ({reason!r})") from reason
        pairs.append(Pair(*texts))
    if not pairs:
        raise RewardError(f"{path} holds no comparison: give JSON lines of {', '.join(Pair._fields)}")
    return pairs


def pairwise_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(chosen - rejected), the mean; rewards [B]."""
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


class PreferenceModel(torch.nn.Module):
    """A model's hidden states and a line over the last one.

    Args:
        hidden: The model; a module's weights are trained by whoever holds them.
        encode: How texts become tokens.
        width: D.

    Attributes:
        head: The line, float32. It begins at zero, where every pair is a tie. It has no constant: of a pair it cancels.
    """

    def __init__(self, hidden: Hidden, encode: Encode, width: int) -> None:
        super().__init__()
        self._hidden, self._encode = hidden, encode
        self.head = torch.nn.Linear(width, 1, bias=False)
        torch.nn.init.zeros_(self.head.weight)

    def features(self, texts: Sequence[tuple[str, str]]) -> torch.Tensor:
        """Hidden states of the last tokens, float32 [B, D], of prompts and completions.

        Raises:
            RewardError: If one has no token, or the model gives states of another width or that are no numbers.
        """
        rows = [list(self._encode(prompt, completion)) for prompt, completion in texts]
        if not all(rows):
            raise RewardError("a prompt and completion without any token have no hidden state: leave them out")
        length = max(map(len, rows))
        # What stands behind a sequence does not reach its last token, so any token fills the rows up.
        tokens_BT = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows])
        hidden_BTD = self._hidden(tokens_BT)
        last = torch.tensor([len(row) - 1 for row in rows], device=hidden_BTD.device)
        states_BD = hidden_BTD[torch.arange(len(rows), device=hidden_BTD.device), last].float()
        if states_BD.shape[1] != self.head.in_features:
            raise RewardError(
                f"the model's hidden states are {states_BD.shape[1]} wide, and the head {self.head.in_features}: "
                "open the head with the model that it was trained on"
            )
        return states_BD

    def forward(
        self, texts: Sequence[tuple[str, str]], *, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Rewards, float32 [B].

        Args:
            texts: Prompts and completions.
            dropout: Share of the hidden states' elements that are zero to the head; the others are scaled up. In
                training only, and only here: nothing is dropped inside the model, whose graph has no place for it.
            generator: Of which, on the CPU.
        """
        states_BD = self.features(texts)
        if dropout:
            shown_BD = torch.rand(states_BD.shape, generator=generator) >= dropout
            states_BD = states_BD * shown_BD.to(states_BD.device) / (1 - dropout)
        rewards: torch.Tensor = self.head(states_BD).squeeze(1)
        return rewards

    def loss(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """The pairwise loss of some comparisons, in one batch."""
        return pairwise_loss(*self.rewards(pairs))

    def rewards(
        self, pairs: Sequence[Pair], *, dropout: float = 0.0, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards of what is chosen and of what is rejected, each float32 [B], in one batch."""
        chosen = [(pair.prompt, pair.chosen) for pair in pairs]
        texts = chosen + [(pair.prompt, pair.rejected) for pair in pairs]
        rewards = self(texts, dropout=dropout, generator=generator)
        return rewards[: len(pairs)], rewards[len(pairs) :]

    def save(self, folder: Path) -> None:
        """Write the head and what it is for; the model is saved by whoever holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({"head.weight": self.head.weight.detach().cpu()}, folder / WEIGHTS_FILE)
        settings = {"kind": "bradley-terry", "width": self.head.in_features}
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, hidden: Hidden, encode: Encode) -> PreferenceModel:
        """What `save` wrote.

        Raises:
            RewardError: If the files are missing, damaged, or say different things.
        """
        settings = read_object(folder / CONFIG_FILE, RewardError, "save the preference model again")
        if settings is None:
            raise RewardError(f"{folder} holds no {CONFIG_FILE}: give a folder that a preference model was saved to")
        width = settings.get("width")
        if settings.get("kind") != "bradley-terry" or type(width) is not int or width < 1:
            raise RewardError(f"{folder / CONFIG_FILE} describes no preference model: save it again")
        try:
            weight = safetensors.torch.load_file(folder / WEIGHTS_FILE)["head.weight"]
        except (OSError, KeyError, safetensors.SafetensorError) as reason:
            raise RewardError(f"{folder / WEIGHTS_FILE} holds no head ({reason}): save it again") from reason
        if weight.shape != (1, width) or not bool(torch.isfinite(weight).all()):
            raise RewardError(f"{folder / WEIGHTS_FILE}: the head is not {width} finite numbers: save it again")
        model = cls(hidden, encode, width)
        model.head.load_state_dict({"weight": weight})
        return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """How the head is fitted alone.

    Attributes:
        steps: Of L-BFGS at most; the problem is convex.
        decay: Weight of half the head's squared length, without which pairs that a line parts have no best head.
        batch: Pairs at a time while hidden states are computed.
    """

    steps: int = 100
    decay: float = 1e-3
    batch: int = 8


def fit_head(model: PreferenceModel, pairs: Sequence[Pair], probe: Probe | None = None) -> float:
    """Fit the head on the model as it is.

    Returns:
        The pairwise loss at the end, without decay; log 2 is that of a coin.

    Raises:
        RewardError: If there is no pair, or a hidden state is no number.
    """
    if not pairs:
        raise RewardError("a head cannot be fitted to no comparison: give some")
    probe = probe or Probe()
    parts = []
    with torch.no_grad():
        for start in range(0, len(pairs), probe.batch):
            batch = pairs[start : start + probe.batch]
            chosen = model.features([(pair.prompt, pair.chosen) for pair in batch])
            parts.append(chosen - model.features([(pair.prompt, pair.rejected) for pair in batch]))
    difference_BD = torch.cat(parts)
    if not bool(torch.isfinite(difference_BD).all()):
        raise RewardError("the model's hidden states are NaN or infinite: no head can be fitted to them")
    weight = model.head.weight
    optimizer = torch.optim.LBFGS([weight], max_iter=probe.steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        return pairwise_loss(model.head(difference_BD).squeeze(1), difference_BD.new_zeros(len(pairs)))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = loss() + probe.decay / 2 * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(loss())


def accuracy(model: PreferenceModel, pairs: Sequence[Pair], batch: int = 8) -> float:
    """Share of the pairs whose chosen completion has the higher reward, a batch at a time; a tie counts one half."""
    if not pairs:
        raise RewardError("there is no comparison to measure on: give some")
    with torch.no_grad():
        parts = [model.rewards(pairs[start : start + batch]) for start in range(0, len(pairs), batch)]
    return sum(float(((1 + torch.sign(chosen - rejected)) / 2).sum()) for chosen, rejected in parts) / len(pairs)


class Preference:
    """A preference model's reward of a completion; no reference is read."""

    def __init__(self, model: PreferenceModel) -> None:
        self._model = model

    def score(self, prompt: str, completion: str, reference: Mapping[str, Any]) -> Score:
        with torch.no_grad():
            value = float(self._model([(prompt, completion)]))
        if value != value or abs(value) == float("inf"):
            return Score(None, "the preference model's reward is no number")
        return Score(value, "by the preference model")


def encoder(model: Model) -> Encode:
    """How a model's tokenizer reads a prompt and a completion: one after the other, as a policy writes them.

    Raises:
        TokenizerError: If it has none.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise TokenizerError(f"{model.config.name} has no tokenizer, so it reads no pairs: give a source that has")
    return lambda prompt, completion: [*tokenizer.encode(prompt), *tokenizer.encode(completion, bos=False)]


def open_preference(model: str, device: str = "cpu") -> Preference:
    """The reward of a folder that `transom reward-model` wrote.

    Args:
        model: The folder: a checkpoint, and the head beside it.
        device: Where to compute.

    Raises:
        RewardError: If there is no head, or a damaged one.
        TransomError: As `load` does.
    """
    folder = Path(model)
    if not (folder / CONFIG_FILE).is_file():
        raise RewardError(f"{folder} holds no {CONFIG_FILE}: give a folder that transom reward-model wrote")
    body = load(folder).text()
    policy = Policy(body, device=device, trained=lambda name: False)
    return Preference(PreferenceModel.load(folder, policy.hidden, encoder(body)).to(policy.device))


REWARD = open_preference
