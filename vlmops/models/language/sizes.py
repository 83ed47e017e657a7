"""The decoders of the field in their real sizes.

``SIZES[name]`` is a ``DecoderConfig``. Each follows the ``config.json`` of the model's page on the Hugging Face hub.
"""

from __future__ import annotations

from dataclasses import replace

from vlmops.models.config import DecoderConfig, RopeScaling

__all__ = ["SIZES"]


def _llama(
    vocab: int, width: int, layers: int, heads: int, mlp_width: int, kv_heads: int, theta: float
) -> DecoderConfig:
    return DecoderConfig(vocab, width, layers, heads, mlp_width, kv_heads=kv_heads, norm_eps=1e-5, rope_theta=theta)


def _qwen(
    width: int, layers: int, heads: int, mlp: int, kv: int, vocab: int = 151936, tied: bool = False
) -> DecoderConfig:
    return DecoderConfig(
        vocab, width, layers, heads, mlp, kv_heads=kv, qkv_bias=True, rope_theta=1e6, tied=tied, norm_eps=1e-6
    )


def _gemma(width: int, layers: int, heads: int, kv: int, mlp: int, head_dim: int, query: float) -> DecoderConfig:
    return DecoderConfig(
        256000, width, layers, heads, mlp, kv_heads=kv, head_dim=head_dim, activation="gelu_tanh", norm_offset=1.0, sandwich=True,
        tied=True, embed_scale=width**0.5, query_scale=query**-0.5, attention_softcap=50.0, logit_softcap=30.0, window=4096,
        window_layers="even",
    )  # fmt: skip


def _opt(width: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        50272, width, layers, heads, 4 * width, activation="relu", gated=False, norm="layer_norm", norm_eps=1e-5,
        learned_positions=2048, position_offset=2, qkv_bias=True, o_bias=True, mlp_bias=True, tied=True,
    )  # fmt: skip


PERSIMMON = DecoderConfig(
    262144, 4096, 36, 64, 16384, activation="relu2", gated=False, norm="layer_norm", norm_eps=1e-5, qk_norm="shared",
    rope_theta=25000.0, rotary_factor=0.5, qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
LLAMA31 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
MISTRAL = _llama(32000, 4096, 32, 32, 14336, 8, 1e4)
LLAMA3_8B = _llama(128256, 4096, 32, 32, 14336, 8, 5e5)
LLAMA3_70B = _llama(128256, 8192, 80, 64, 28672, 8, 5e5)

SIZES: dict[str, DecoderConfig] = {
    # Llama 2; Vicuna 1.5 has the same shapes.
    "vicuna-7b": _llama(32000, 4096, 32, 32, 11008, 32, 1e4),
    "vicuna-13b": _llama(32000, 5120, 40, 40, 13824, 40, 1e4),
    "llama2-70b": _llama(32000, 8192, 80, 64, 28672, 8, 1e4),
    "llama3-8b": LLAMA3_8B,
    "llama3-70b": LLAMA3_70B,
    "llama3.1-8b": replace(LLAMA3_8B, rope_scaling=LLAMA31),
    "llama3.1-70b": replace(LLAMA3_70B, rope_scaling=LLAMA31),
    "mistral-7b-v0.1": replace(MISTRAL, window=4096, window_layers="all"),
    "mistral-7b-v0.2": replace(MISTRAL, rope_theta=1e6),
    "mistral-7b-v0.3": replace(MISTRAL, rope_theta=1e6, vocab=32768),
    "mistral-nemo-12b": replace(_llama(131072, 5120, 40, 32, 14336, 8, 1e6), head_dim=128),
    "mistral-large-2": _llama(32768, 12288, 88, 96, 28672, 8, 1e6),
    "qwen-7b": replace(_qwen(4096, 32, 32, 11008, 32), rope_theta=1e4),
    "qwen1.5-7b": _qwen(4096, 32, 32, 11008, 32),
    "qwen1.5-72b": _qwen(8192, 80, 64, 24576, 64, vocab=152064),
    "qwen2-0.5b": _qwen(896, 24, 14, 4864, 2, tied=True),
    "qwen2-1.5b": _qwen(1536, 28, 12, 8960, 2, tied=True),
    "qwen2-7b": _qwen(3584, 28, 28, 18944, 4, vocab=152064),
    "qwen2-72b": replace(_qwen(8192, 80, 64, 29568, 8, vocab=152064), norm_eps=1e-5),
    "qwen2.5-3b": _qwen(2048, 36, 16, 11008, 2, tied=True),
    "gemma2-2b": _gemma(2304, 26, 8, 4, 9216, 256, 256),
    "gemma2-9b": _gemma(3584, 42, 16, 8, 14336, 256, 256),
    "gemma2-27b": _gemma(4608, 46, 32, 16, 36864, 128, 144),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "persimmon-8b": PERSIMMON,  # also Fuyu's
    "chameleon-7b": replace(_llama(65536, 4096, 32, 32, 11008, 32, 1e4), qk_norm="heads"),
}
