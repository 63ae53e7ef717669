"""Models by name. Sizes: the Gemma 3 report (arXiv 2503.19786, Table 1) and the released configurations."""

from __future__ import annotations

from transom.errors import ConfigError
from transom.zoo.config import DecoderConfig, Rope, tile


def _gemma3(
    name: str,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    window: int,
    context: int,
    vocab_size: int,
    head_dim: int = 256,
    query_scalar: float = 256,
    rope_factor: float = 1.0,
) -> DecoderConfig:
    return DecoderConfig(
        name=name,
        architecture="gemma3",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layer_kinds=tile("LLLLLG", num_layers),
        window=window,
        rope_local=Rope(theta=1e4),
        rope_global=Rope(theta=1e6, factor=rope_factor),
        attention_scale=query_scalar**-0.5,
        context=context,
    )


PRESETS: dict[str, DecoderConfig] = {
    config.name: config
    for config in (
        # Two periods of local and global layers, a window that tests wrap many times, grouped heads.
        DecoderConfig(
            name="gemma3-tiny",
            architecture="gemma3",
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            layer_kinds=tile("LLG", 6),
            window=16,
            rope_local=Rope(theta=1e4),
            rope_global=Rope(theta=1e6, factor=8.0),
            attention_scale=40**-0.5,
            context=512,
        ),
        _gemma3("gemma3-270m", hidden_size=640, num_layers=18, num_heads=4, num_kv_heads=1, intermediate_size=2048,
                window=512, context=32_768, vocab_size=262_144),
        _gemma3("gemma3-1b", hidden_size=1152, num_layers=26, num_heads=4, num_kv_heads=1, intermediate_size=6912,
                window=512, context=32_768, vocab_size=262_144),
        _gemma3("gemma3-4b", hidden_size=2560, num_layers=34, num_heads=8, num_kv_heads=4, intermediate_size=10_240,
                window=1024, context=131_072, vocab_size=262_208, rope_factor=8.0),
        _gemma3("gemma3-12b", hidden_size=3840, num_layers=48, num_heads=16, num_kv_heads=8, intermediate_size=15_360,
                window=1024, context=131_072, vocab_size=262_208, rope_factor=8.0),
        _gemma3("gemma3-27b", hidden_size=5376, num_layers=62, num_heads=32, num_kv_heads=16, head_dim=128,
                intermediate_size=21_504, window=1024, context=131_072, vocab_size=262_208, query_scalar=5376 / 32,
                rope_factor=8.0),
    )
}  # fmt: skip


def preset(name: str) -> DecoderConfig:
    """Look a preset up.

    Raises:
        ConfigError: If there is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"no model named {name!r}: choose one of {', '.join(PRESETS)}, a checkpoint folder or a .gguf file"
        )
    return PRESETS[name]
