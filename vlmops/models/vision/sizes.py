"""The real towers by name, with where their parameter counts are published.

family, config = SIZES["clip-l14-336"]
"""

from __future__ import annotations

from dataclasses import replace

from vlmops.models.config import VisionConfig

__all__ = ["SIZES", "named"]


def _vit(width: int, layers: int, heads: int, patch: int, image: int) -> VisionConfig:
    """ViT (Dosovitskiy et al. 2021)."""
    return VisionConfig(width, layers, heads, 4 * width, patch, image_size=image, norm_eps=1e-12, class_token=True)


def _clip(width: int, layers: int, heads: int, patch: int, image: int) -> VisionConfig:
    """OpenAI's CLIP (Radford et al. 2021)."""
    return VisionConfig(
        width, layers, heads, 4 * width, patch, image_size=image, activation="quick_gelu", norm_eps=1e-5,
        patch_bias=False, class_token=True, pre_norm=True,
    )  # fmt: skip


def _siglip(width: int, layers: int, heads: int, patch: int, image: int, hidden: int = 0) -> VisionConfig:
    """SigLIP (Zhai et al. 2023); so400m is the shape-optimised ViT of Alabdulmohsin et al. 2023."""
    return VisionConfig(width, layers, heads, hidden or 4 * width, patch, image_size=image, activation="gelu_tanh")


def _dinov2(width: int, layers: int, heads: int, hidden: int = 0, registers: int = 0) -> VisionConfig:
    """DINOv2 (Oquab et al. 2023), registers by Darcet et al. 2023; the giant's MLP is SwiGLU."""
    return VisionConfig(
        width, layers, heads, hidden or 4 * width, 14, image_size=518, activation="silu" if hidden else "gelu",
        gated=hidden > 0, class_token=True, layer_scale=True, registers=registers, antialias=registers > 0,
    )  # fmt: skip


EVA01_G = VisionConfig(1408, 40, 16, 6144, 14, image_size=224, attention_bias="qvo", class_token=True)
EVA02_L = VisionConfig(
    1024, 24, 16, 2730, 14, image_size=224, activation="silu", gated=True, attention_bias="qvo", class_token=True,
    position="learned+rope", rope="interleaved", rope_side=16, sub_norm=True,
)  # fmt: skip
EVA02_E = VisionConfig(1792, 64, 16, 15360, 14, image_size=224, attention_bias="qvo", class_token=True, norm_after=True)
QWEN_VL = VisionConfig(
    1664, 48, 16, 8192, 14, image_size=224, patch_bias=False, pre_norm=True, post_norm=False
)  # its positions are 16 x 16; images of 448 pixels get them resized
QWEN2_VL = VisionConfig(
    1280, 32, 16, 5120, 14, temporal_patch_size=2, activation="quick_gelu", patch_bias=False, position="rope",
    post_norm=False, merge_size=2,
)  # fmt: skip
QWEN2_5_VL = replace(
    QWEN2_VL, mlp_width=3420, activation="silu", gated=True, norm="rms_norm", window=112, full_layers=(7, 15, 23, 31)
)
PIXTRAL = VisionConfig(
    1024, 24, 16, 4096, 16, activation="silu", gated=True, norm="rms_norm", norm_eps=1e-5, patch_bias=False,
    attention_bias="", mlp_bias=False, position="rope", rope="alternating", pre_norm=True, post_norm=False,
)  # fmt: skip

#: name -> (family, config).
SIZES: dict[str, tuple[str, VisionConfig]] = {
    "vit-b16": ("vit", _vit(768, 12, 12, 16, 224)),
    "vit-l16": ("vit", _vit(1024, 24, 16, 16, 224)),
    "clip-b32": ("clip", _clip(768, 12, 12, 32, 224)),
    "clip-b16": ("clip", _clip(768, 12, 12, 16, 224)),
    "clip-l14": ("clip", _clip(1024, 24, 16, 14, 224)),
    "clip-l14-336": ("clip", _clip(1024, 24, 16, 14, 336)),
    "siglip-b16-224": ("siglip", _siglip(768, 12, 12, 16, 224)),
    "siglip-b16-256": ("siglip", _siglip(768, 12, 12, 16, 256)),
    "siglip-b16-384": ("siglip", _siglip(768, 12, 12, 16, 384)),
    "siglip-b16-512": ("siglip", _siglip(768, 12, 12, 16, 512)),
    "siglip-l16-256": ("siglip", _siglip(1024, 24, 16, 16, 256)),
    "siglip-l16-384": ("siglip", _siglip(1024, 24, 16, 16, 384)),
    "siglip-so400m-224": ("siglip", _siglip(1152, 27, 16, 14, 224, 4304)),
    "siglip-so400m-384": ("siglip", _siglip(1152, 27, 16, 14, 384, 4304)),
    "siglip-so400m-448": ("siglip", _siglip(1152, 27, 16, 14, 448, 4304)),
    "siglip-so400m-896": ("siglip", _siglip(1152, 27, 16, 14, 896, 4304)),
    "eva01-g": ("eva_clip", EVA01_G),
    "eva01-g-blip2": ("blip2", replace(EVA01_G, layers=39, attention_bias="qkvo")),
    "eva02-l": ("eva_clip", EVA02_L),
    "eva02-l-336": ("eva_clip", replace(EVA02_L, image_size=336)),
    "eva02-e": ("eva_clip", EVA02_E),
    "eva02-e-cogvlm2": (
        "cogvlm",
        replace(EVA02_E, layers=63, attention_bias="qkvo", image_size=1344, post_norm=False),
    ),
    "dinov2-s": ("dinov2", _dinov2(384, 12, 6)),
    "dinov2-b": ("dinov2", _dinov2(768, 12, 12)),
    "dinov2-l": ("dinov2", _dinov2(1024, 24, 16)),
    "dinov2-g": ("dinov2", _dinov2(1536, 40, 24, 4096)),
    "dinov2-s-reg": ("dinov2_with_registers", _dinov2(384, 12, 6, registers=4)),
    "dinov2-b-reg": ("dinov2_with_registers", _dinov2(768, 12, 12, registers=4)),
    "dinov2-l-reg": ("dinov2_with_registers", _dinov2(1024, 24, 16, registers=4)),
    "dinov2-g-reg": ("dinov2_with_registers", _dinov2(1536, 40, 24, 4096, registers=4)),
    "qwen-vl": ("qwen_vl", QWEN_VL),
    "qwen2-vl": ("qwen2_vl", QWEN2_VL),
    "qwen2.5-vl": ("qwen2_5_vl", QWEN2_5_VL),
    "pixtral-12b": ("pixtral", PIXTRAL),
}


def named(name: str) -> tuple[str, VisionConfig]:
    """Family and config of a real tower.

    Raises:
        ValueError: a name that is not in ``SIZES``.
    """
    if name not in SIZES:
        raise ValueError(f"name: expected one of {', '.join(SIZES)}, got {name!r}")
    return SIZES[name]
