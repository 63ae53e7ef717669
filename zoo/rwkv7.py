"""RWKV-7's text decoder, as textbook tensor code, and all that is known of its files.

Source: arXiv 2503.14456, section 4, and the released reference implementation (RWKV-LM, `RWKV-v7/rwkv_v7_demo.py` and
`rwkv_v7_numpy.py`). Names of tensors and keys of `config.json` are those of flash-linear-attention (`fla/models/rwkv7`,
`fla/layers/rwkv7.py`), in whose format its checkpoints are published for transformers. A layer keeps no positions but
summaries of them: the last row that each of its two halves got, and the state of a delta rule.

Axes:
    B  batch            T  new tokens        D  model width      F  MLP width
    N  heads            H  head dim
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import nn

from transom.errors import ConfigError
from transom.graphs import ops
from transom.graphs.state import summary
from transom.zoo.architecture import Architecture, HuggingFaceFormat, Preset
from transom.zoo.config import LARGEST, DecoderConfig, SummaryLayer
from transom.zoo.config_keys import Keys
from transom.zoo.layers import LayerCache, LayerNorm, StackedDecoder
from transom.zoo.rwkv7_gguf import GGUF


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config(DecoderConfig):
    """A decoder of delta rules, whose heads together are as wide as the model.

    Attributes:
        depth: Number of layers.
        decay_rank: Rank of what the decays depend on.
        rate_rank: Of the rates at which the state is replaced.
        value_rank: Of how much of the first layer's values later layers take.
        gate_rank: Of the gates.
    """

    SIZES = (*DecoderConfig.SIZES, "decay_rank", "rate_rank", "value_rank", "gate_rank")

    architecture: str = "rwkv7"
    depth: int
    decay_rank: int
    rate_rank: int
    value_rank: int
    gate_rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads * self.head_dim != self.hidden_size:
            raise ConfigError(
                f"{self.name}: {self.num_heads} heads of {self.head_dim} are {self.num_heads * self.head_dim} wide, "
                f"expected the model's {self.hidden_size}"
            )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.depth

    @property
    def layers(self) -> tuple[SummaryLayer, ...]:
        """What every layer keeps: a row before each half, and the state."""
        H = self.head_dim
        state = summary("state", dtype="float32", heads=self.num_heads, values=H, width=H)
        before, mlp_before = (summary(name, rows=1, width=self.hidden_size) for name in ("shift", "mlp_shift"))
        return (SummaryLayer(summaries=(before, state, mlp_before)),) * self.depth


class Shift(nn.Module):
    """By how much of each channel a token's row becomes the one before it, for every use of the row."""

    neutral: ClassVar[dict[str, float]] = {f"x_{use}": 0.5 for use in "rwkvag"}

    def mixed(self, x_BTD: torch.Tensor, before_BTD: torch.Tensor, use: str) -> torch.Tensor:
        """A token's row, mixed with the row before it for a use."""
        return x_BTD + (before_BTD - x_BTD) * self.get_parameter(f"x_{use}")


class LowRank(nn.Module):
    """`activation(x A) B + bias`, where A and B meet in few numbers; random biases lie around a value."""

    def __init__(self, width: int, rank: int, activation: nn.Module, *, bias: bool = True, around: float = 0.0) -> None:
        super().__init__()
        out: Any = nn.Linear(rank, width, bias=bias)
        out.neutral = {"bias": around}
        self.lora = nn.Sequential(nn.Linear(width, rank, bias=False), activation, out)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        out_BTD: torch.Tensor = self.lora(x_BTD)
        return out_BTD


class HeadNorm(nn.Module):
    """`(x - mean(x)) / deviation(x)` of every head by itself, then `* weight + bias`, in float32."""

    neutral: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(heads * head_dim)), nn.Parameter(torch.zeros(heads * head_dim))

    def forward(self, x_BTNH: torch.Tensor) -> torch.Tensor:
        B, T, N, H = x_BTNH.shape
        normed_BTD = nn.functional.layer_norm(x_BTNH.float(), (H,), eps=self.eps).view(B, T, N * H)
        return (normed_BTD * self.weight.float() + self.bias.float()).type_as(x_BTNH)


class TimeMix(Shift):
    """A delta rule, gated; later layers add to their values what the first layer's were."""

    neutral: ClassVar[dict[str, float]] = {**Shift.neutral, "k_k": 1.0, "k_a": 1.0}

    def __init__(self, config: RWKV7Config, index: int) -> None:
        super().__init__()
        D, N, H = config.hidden_size, config.num_heads, config.head_dim
        self.heads, self.head_dim = N, H
        for use in "rwkvag":
            self.register_parameter(f"x_{use}", nn.Parameter(torch.zeros(1, 1, D)))
        self.k_k, self.k_a = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.r_k = nn.Parameter(torch.zeros(N, H))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))
        # Decays of 0.97, so that random states reach back over some tens of tokens.
        self.w_lora = LowRank(D, config.decay_rank, nn.Tanh(), around=-3.0)
        self.v_lora = LowRank(D, config.value_rank, nn.Identity()) if index else None
        self.a_lora = LowRank(D, config.rate_rank, nn.Identity())
        self.g_lora = LowRank(D, config.gate_rank, nn.Sigmoid(), bias=False)
        self.g_norm = HeadNorm(N, H, H * config.norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        first_BTD: torch.Tensor | None,
        start: torch.Tensor,
        before: torch.Tensor | None,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Results, the first layer's values, and the two summaries."""
        B, T, D = x_BTD.shape
        before_BTD, before = ops.TOKEN_SHIFT(x_BTD, before, start)
        xr, xw, xk, xv, xa, xg = (self.mixed(x_BTD, before_BTD, use) for use in "rwkvag")
        q_BTD, k_BTD, v_BTD = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        logs_BTD = self.w_lora(xw).float().sigmoid() * -math.exp(-0.5)
        if first_BTD is None or self.v_lora is None:
            first_BTD = v_BTD
        else:
            v_BTD = v_BTD + (first_BTD - v_BTD) * self.v_lora(xv).sigmoid()
        rates_BTD, gate_BTD = self.a_lora(xa).sigmoid(), self.g_lora(xg)
        removals_BTD = k_BTD * self.k_k
        k_BTD = k_BTD + k_BTD * (rates_BTD - 1) * self.k_a
        q, logs, k, v, removals, rates = (
            value.view(B, T, self.heads, self.head_dim)
            for value in (q_BTD, logs_BTD, k_BTD, v_BTD, removals_BTD, rates_BTD)
        )
        y_BTNH, state = ops.DELTA_RULE(q, logs, k, v, removals, rates, state, start)
        bonus_BTD = ((q * k * self.r_k).sum(-1, keepdim=True) * v).view(B, T, D)
        return self.o_proj((self.g_norm(y_BTNH) + bonus_BTD) * gate_BTD), first_BTD, before, state


class ChannelMix(Shift):
    """`value(relu(key(x))^2)`."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.x_k = nn.Parameter(torch.zeros(D))
        self.key, self.value = nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, start: torch.Tensor, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before_BTD, before = ops.TOKEN_SHIFT(x_BTD, before, start)
        kept_BTF = nn.functional.relu(self.key(self.mixed(x_BTD, before_BTD, "k")))
        return self.value(kept_BTF * kept_BTF), before


class Layer(nn.Module):
    """One block; norms stand before both halves, and another one before the first block."""

    def __init__(self, config: RWKV7Config, index: int) -> None:
        super().__init__()
        norms = [LayerNorm(config.hidden_size, config.norm_eps, bias=True) for _ in range(3 if index == 0 else 2)]
        self.attn_norm, self.ffn_norm = norms[:2]
        self.pre_norm = norms[2] if index == 0 else None
        self.attn, self.ffn = TimeMix(config, index), ChannelMix(config)

    def forward(
        self, x_BTD: torch.Tensor, first_BTD: torch.Tensor | None, start: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        before, state, mlp_before = (None, None, None) if cache is None else cache
        x_BTD = x_BTD if self.pre_norm is None else self.pre_norm(x_BTD)
        mixed_BTD, first_BTD, before, state = self.attn(self.attn_norm(x_BTD), first_BTD, start, before, state)
        x_BTD = x_BTD + mixed_BTD
        mixed_BTD, mlp_before = self.ffn(self.ffn_norm(x_BTD), start, mlp_before)
        return x_BTD + mixed_BTD, first_BTD, (before, state, mlp_before)


class RWKV7(StackedDecoder):
    """The decoder."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config, Layer, LayerNorm(config.hidden_size, config.norm_eps, bias=True), tied=False)

    def hidden(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        x_BTD, first_BTD = self.embed_tokens(tokens_BT), None
        written: list[LayerCache] = []
        for index, layer in enumerate(self.layers):
            x_BTD, first_BTD, cache = layer(x_BTD, first_BTD, start, None if caches is None else caches[index])
            written.append(cache)
        return self.norm(x_BTD), written


# Class defaults of flash-linear-attention. What is absent here must be stated: its versions differ in it.
_SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
    "decay_rank": "decay_low_rank_dim",
    "rate_rank": "a_low_rank_dim",
    "value_rank": "v_low_rank_dim",
    "gate_rank": "gate_low_rank_dim",
}


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    sizes = {field: text.whole(key, _SIZES.get(key, 0)) for field, key in _FIELDS.items()}
    heads, rest = divmod(sizes["hidden_size"], sizes["head_dim"])
    if rest:
        text.refuse("hidden_size", f"expected a multiple of head_dim, {sizes['head_dim']}")
    values = text.get("value_dim")
    by_layer = values if isinstance(values, list) and values else [values]
    if values is not None and any(value != sizes["hidden_size"] for value in by_layer):
        text.refuse("value_dim", f"only values as wide as the model, {sizes['hidden_size']}, are supported")
    return {
        **sizes,
        "num_heads": heads,
        "num_kv_heads": heads,
        "depth": text.whole("num_hidden_layers", _SIZES["num_hidden_layers"], LARGEST["num_layers"]),
        "norm_eps": text.number("norm_eps", 1e-5),
    }


def _write(config: RWKV7Config) -> dict[str, Any]:
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        "num_hidden_layers": config.depth,
        "norm_eps": config.norm_eps,
        "hidden_act": "sqrelu",
        "attn": None,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"rwkv7": None},
    classes=("RWKV7ForCausalLM",),
    sizes=_SIZES,
    supported={
        "hidden_act": ("sqrelu",),
        "norm_first": (True,),
        "norm_bias": (True,),
        "attn": (None,),
        "tie_word_embeddings": (False,),
    },
    keys=frozenset({*_FIELDS.values(), "value_dim", "norm_eps"}),
    # Of kernels, and what `head_dim` and `intermediate_size` say. Checkpoints bring code that imports
    # flash-linear-attention, as transformers has no such class.
    ignored=frozenset(
        {
            "auto_map", "attn_mode", "num_heads", "hidden_ratio", "fuse_norm", "fuse_cross_entropy",
            "fuse_linear_cross_entropy", "use_l2warp",
        }
    ),
    renames={"model.embeddings.": "model.embed_tokens."},
    read=_read,
    write=_write,
    buffer=lambda config, name: None,
    # Of the first layer, whose values are no mix: some checkpoints hold them, and GGUF files do.
    unread=lambda config, name: name.startswith("layers.0.attn.v_lora."),
)  # fmt: skip


def _released(size: str, hub: str, width: int, depth: int, ranks: tuple[int, int, int]) -> Preset:
    decay, value, gate = ranks
    config = RWKV7Config(
        name=f"rwkv7-world-{size}", vocab_size=65_536, hidden_size=width, intermediate_size=4 * width,
        num_heads=width // 64, num_kv_heads=width // 64, head_dim=64, depth=depth, decay_rank=decay, rate_rank=decay,
        value_rank=value, gate_rank=gate, norm_eps=1e-5, context=4096,
    )  # fmt: skip
    return Preset(config=config, hub=hub)


_PRESETS = (
    Preset(
        config=RWKV7Config(
            name="rwkv7-tiny", vocab_size=512, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=4,
            head_dim=16, depth=2, decay_rank=32, rate_rank=32, value_rank=32, gate_rank=32, norm_eps=1e-5, context=512,
        )
    ),
    _released("0.1b", "RWKV/RWKV7-Goose-World2.8-0.1B-HF", 768, 12, (64, 32, 128)),
    _released("0.4b", "RWKV/RWKV7-Goose-World2.9-0.4B-HF", 1024, 24, (64, 32, 128)),
    _released("1.5b", "RWKV/RWKV7-Goose-World3-1.5B-HF", 2048, 24, (96, 64, 256)),
    _released("2.9b", "RWKV/RWKV7-Goose-World3-2.9B-HF", 2560, 32, (96, 64, 320)),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="rwkv7",
    config=RWKV7Config,
    build=RWKV7,
    huggingface=_HUGGINGFACE,
    gguf=GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 1.0},
)
