"""Gemma 3 with images: the text decoder, SigLIP, and what makes soft tokens of patches.

Source: the Gemma 3 report (arXiv 2503.19786, section 2.1) and transformers' modeling_gemma3. Soft tokens take the place
of embeddings; those of one image see each other, and a local layer's window bounds only how far back they see.

Axes:
    B  batch                  T  new tokens         D  model width
    P  patches of an image    Q  soft tokens        E  encoder width
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from transom.errors import ConfigError
from transom.graphs.images import Images
from transom.graphs.state import Port, Signature
from transom.graphs.weight import Weight
from transom.zoo import gemma3
from transom.zoo.architecture import Architecture, MmprojFormat, Preset
from transom.zoo.checkpoints.gguf_header import Header
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config import tile
from transom.zoo.config_keys import Keys
from transom.zoo.gemma3 import Gemma3, Gemma3Config
from transom.zoo.layers import LayerCache, RMSNorm
from transom.zoo.rope import Rope
from transom.zoo.siglip import (
    COLOURS,
    Siglip,
    SiglipConfig,
    read_siglip,
    read_siglip_gguf,
    siglip_gguf_names,
    write_siglip,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3VisionConfig(Gemma3Config):
    """A text decoder that sees images.

    Attributes:
        vision: The image encoder.
        images: An image's soft tokens are a square, whose side divides that of the patches.
    """

    architecture: str = "gemma3_vision"
    vision: SiglipConfig
    images: Images

    def __post_init__(self) -> None:
        super().__post_init__()
        side, patches = math.isqrt(self.images.soft_tokens), self.vision.side
        if side**2 != self.images.soft_tokens or patches % side:
            raise ConfigError(
                f"{self.name}: {patches} x {patches} patches do not average to {self.images.soft_tokens} soft tokens"
            )
        if self.images.size != self.vision.image_size:
            raise ConfigError(
                f"{self.name}: images have {self.images.size} pixels a side, the encoder {self.vision.image_size}"
            )
        if max(self.images.begin_id, self.images.end_id) >= self.vocab_size:
            raise ConfigError(
                f"{self.name}: the tokens around an image, {self.images.begin_id} and {self.images.end_id}, are not "
                f"among {self.vocab_size} tokens"
            )

    @property
    def text(self) -> Gemma3Config:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Gemma3Config)}
        return Gemma3Config(**{**fields, "architecture": "gemma3", "images": None})

    @property
    def inputs(self) -> dict[str, Port]:
        return {
            "until": Port(axes=("tokens",), dtype="int64", sizes=(None,)),
            "soft": Port(axes=("batch", "tokens", "width"), dtype="float32", sizes=(None, None, self.hidden_size)),
        }

    @property
    def encoders(self) -> dict[str, Signature]:
        size = self.vision.image_size
        axes, sizes = ("images", "colours", "rows", "columns"), (1, COLOURS, size, size)
        pixels = Port(axes=axes, dtype="float32", sizes=sizes)
        outputs = {"soft": ("images", "soft_tokens", "width")}
        return {"encode_image": Signature(inputs={"pixels": pixels}, outputs=outputs)}


class Projector(nn.Module):
    """Averages of patches, normed and brought to the decoder's width."""

    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__()
        self.patches, self.side = config.vision.side, math.isqrt(config.images.soft_tokens)
        E = config.vision.hidden_size
        self.mm_input_projection_weight = nn.Parameter(torch.empty(E, config.hidden_size))
        self.mm_soft_emb_norm = RMSNorm(E, config.vision.norm_eps, offset=1.0)

    def forward(self, x_BPE: torch.Tensor) -> torch.Tensor:
        B, _, E = x_BPE.shape
        side, block = self.side, self.patches // self.side
        pooled_BQE = x_BPE.reshape(B, side, block, side, block, E).mean((2, 4)).reshape(B, side * side, E)
        soft_BQD: torch.Tensor = self.mm_soft_emb_norm(pooled_BQE) @ self.mm_input_projection_weight
        return soft_BQD


class Gemma3Vision(Gemma3):
    """The decoder, with soft tokens of images among the tokens of text."""

    def __init__(self, config: Gemma3VisionConfig) -> None:
        super().__init__(config)
        self.vision_tower = Siglip(config.vision)
        self.multi_modal_projector = Projector(config)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Soft tokens [B, Q, D], float32, of pixels [B, 3, S, S] between -1 and 1."""
        dtype = self.embed_tokens.weight.dtype
        soft_BQD: torch.Tensor = self.multi_modal_projector(self.vision_tower(pixels.to(dtype))).float()
        return soft_BQD

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        start: torch.Tensor,
        caches: list[LayerCache] | None,
        **inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        """Run the new tokens as far as the last norm; see `Decoder.hidden`.

        Args:
            tokens_BT: Ids of text; negative where a soft token stands.
            start: Position of the first new token.
            caches: One pair a layer, or None.
            inputs: For text alone nothing. Else `until`, int64 [T], the last position that each new token sees: the end
                of its image, or its own; and `soft`, float32 [B, T, D], soft tokens where they stand.
        """
        if not inputs:
            return self.run_layers(self.embed(tokens_BT), start, caches)
        text_BTD = self.embed(tokens_BT.clamp(min=0))
        x_BTD = torch.where((tokens_BT < 0)[..., None], inputs["soft"].type_as(text_BTD), text_BTD)
        return self.run_layers(x_BTD, start, caches, inputs["until"])


_TEXT_AROUND = "\n\n"
_IDS = {"boi": 255_999, "eoi": 256_000, "image": 262_144}
_TOKENS = {"boi": "<start_of_image>", "eoi": "<end_of_image>"}
_SOFT_TOKENS = 256


def _images(size: int, soft_tokens: int, begin_id: int, end_id: int) -> Images:
    return Images(
        size=size,
        soft_tokens=soft_tokens,
        begin_id=begin_id,
        end_id=end_id,
        text_before=_TEXT_AROUND,
        text_after=_TEXT_AROUND,
    )


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    vision = read_siglip(Keys(outer.path, outer.mapping("vision_config"), "vision_config."))
    ids = {}
    for name, default in _IDS.items():
        # Both spellings are written; transformers reads the first as the second.
        values = {key: outer.values[key] for key in (f"{name}_token_index", f"{name}_token_id") if key in outer.values}
        if len(set(map(repr, values.values()))) > 1:
            outer.refuse(f"{name}_token_index", f"beside {values[f'{name}_token_id']!r}: they must agree")
        for key, value in values.items():
            if type(value) is not int or value < 0:
                outer.refuse(key, "expected the id of a token")
        ids[name] = next(iter(values.values()), default)
    return {
        **gemma3.read_text(text, outer),
        "vision": vision,
        "images": _images(vision.image_size, outer.whole("mm_tokens_per_image", _SOFT_TOKENS), ids["boi"], ids["eoi"]),
    }


def _write(config: Gemma3VisionConfig) -> dict[str, Any]:
    text = gemma3.ARCHITECTURE.huggingface.write(config.text)
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "vision_config": write_siglip(config.vision),
        "mm_tokens_per_image": config.images.soft_tokens,
        "boi_token_index": config.images.begin_id,
        "eoi_token_index": config.images.end_id,
        # The id that texts hold in the place of a soft token: any that no text has.
        "image_token_index": min(_IDS["image"], config.vocab_size - 1),
        "tie_word_embeddings": True,
    }


_HUGGINGFACE = dataclasses.replace(
    gemma3.ARCHITECTURE.huggingface,
    read=_read,
    write=_write,
)


_PROJECTOR = "multi_modal_projector."
_SCALE, _SCALE_DEFAULT = "vision.projector.scale_factor", 4


def _read_mmproj(header: Header, keys: Metadata, text: Gemma3Config, tokens: list[str]) -> dict[str, Any]:
    """The encoder, and the tokens around an image: those of the tokenizer with their names, else those released."""
    vision = read_siglip_gguf(header, keys)
    if keys.size("vision.projection_dim") != text.hidden_size:
        raise keys.refuse(
            "vision.projection_dim", f"but {text.name} is {text.hidden_size} wide: give files of one model"
        )
    scale = keys.size(_SCALE, _SCALE_DEFAULT)
    if vision.side % scale:
        raise keys.refuse(
            _SCALE, f"but it must divide the {vision.side} patches of a side, and is {_SCALE_DEFAULT} where missing"
        )
    ids = {name: tokens.index(token) if token in tokens else _IDS[name] for name, token in _TOKENS.items()}
    return {
        "vision": vision,
        "images": _images(vision.image_size, (vision.side // scale) ** 2, ids["boi"], ids["eoi"]),
    }


def _mmproj_names(config: Gemma3VisionConfig, header: Header) -> dict[str, str]:
    tower = {f"vision_tower.{ours}": theirs for ours, theirs in siglip_gguf_names(config.vision, header).items()}
    return {
        **tower,
        f"{_PROJECTOR}mm_input_projection_weight": "mm.input_projection.weight",
        f"{_PROJECTOR}mm_soft_emb_norm.weight": "mm.soft_emb_norm.weight",
    }


def _mmproj_rows(config: Gemma3VisionConfig, name: str) -> Callable[[Weight], Weight] | None:
    """The projector's norm is stored as 1 + w, as those of the text decoder are; the encoder's as they are."""
    form = gemma3.ARCHITECTURE.gguf
    return form.rows(config, name) if form is not None and name.startswith(_PROJECTOR) else None


_MMPROJ = MmprojFormat(projector="gemma3", read=_read_mmproj, tensors=_mmproj_names, rows=_mmproj_rows)


def _released(name: str, **sizes: Any) -> Preset:
    """A released size, all of which have one encoder."""
    text = gemma3.released(name, window=1024, context=131_072, vocab_size=262_208, rope_factor=8.0, **sizes)
    fields = {field.name: getattr(text, field.name) for field in dataclasses.fields(text)}
    images = _images(SiglipConfig.image_size, _SOFT_TOKENS, _IDS["boi"], _IDS["eoi"])
    changed = {"architecture": "gemma3_vision", "vision": SiglipConfig(), "images": images}
    hub = f"google/gemma-3-{name.removeprefix('gemma3-')}-it"
    return Preset(config=Gemma3VisionConfig(**{**fields, **changed}), hub=hub)


def _tiny(name: str, window: int) -> Gemma3VisionConfig:
    return Gemma3VisionConfig(
        name=name,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        layer_kinds=tile("LLG", 6),
        window=window,
        rope_local=Rope(theta=1e4),
        rope_global=Rope(theta=1e6, factor=8.0),
        attention_scale=40**-0.5,
        context=512,
        vision=SiglipConfig(
            hidden_size=48, intermediate_size=80, num_layers=2, num_heads=3, image_size=64, patch_size=4
        ),
        images=_images(64, 16, 508, 509),
    )


_PRESETS = (
    # A window shorter than an image's 16 tokens, and a longer one.
    Preset(config=_tiny("gemma3-vision-tiny", 8)),
    Preset(config=_tiny("gemma3-vision-tiny-wide", 24)),
    _released("gemma3-4b", hidden_size=2560, num_layers=34, num_heads=8, num_kv_heads=4, intermediate_size=10_240),
    _released("gemma3-12b", hidden_size=3840, num_layers=48, num_heads=16, num_kv_heads=8, intermediate_size=15_360),
    _released("gemma3-27b", hidden_size=5376, num_layers=62, num_heads=32, num_kv_heads=16, head_dim=128,
              intermediate_size=21_504, query_scalar=5376 / 32),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="gemma3_vision",
    config=Gemma3VisionConfig,
    build=Gemma3Vision,
    huggingface=_HUGGINGFACE,
    gguf=gemma3.ARCHITECTURE.gguf,
    text="gemma3",
    mmproj=_MMPROJ,
    image_parts={"tower": "vision_tower.", "projector": _PROJECTOR},
    presets=_PRESETS,
    sampling=gemma3.ARCHITECTURE.sampling,
    chat=gemma3.ARCHITECTURE.chat,
)
