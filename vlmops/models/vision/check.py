"""Options of a tower that do not go together, said when it is built."""

from __future__ import annotations

from vlmops.models.config import VisionConfig
from vlmops.ops._shared.activations import check_activation

__all__ = ["check"]

CHOICES = {
    "position": ("learned", "rope", "learned+rope", "none"),
    "rope": ("axial", "alternating", "interleaved"),
    "attention_bias": ("qkvo", "qvo", "qkv", "o", ""),
    "merge_size": (1, 2),
}


def check(config: VisionConfig) -> None:
    """ValueError naming the option that is wrong."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {getattr(config, name)!r}")
    for name in ("width", "layers", "heads", "mlp_width", "patch_size", "temporal_patch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    check_activation(config.activation)
    if config.head_dim is None and config.width % config.heads:
        raise ValueError(f"heads: expected a divisor of width {config.width}, got {config.heads}")
    if "rope" in config.position and config.dim % 4:
        raise ValueError(f"head_dim: expected a multiple of 4 for 2-D rotary positions, got {config.dim}")
    if "learned" in config.position:
        if config.image_size is None or config.image_size < config.patch_size:
            raise ValueError(
                f"image_size: expected at least {config.patch_size} for learned positions, got {config.image_size}"
            )
        if config.merge_size != 1:
            raise ValueError(f"merge_size: expected 1 with learned positions, got {config.merge_size}")
    if config.rope != "axial" and config.merge_size != 1:
        raise ValueError(f"merge_size: expected 1 with rope {config.rope!r}, got {config.merge_size}")
    if config.window is not None:
        if config.class_token or config.registers:
            raise ValueError("window: a tower with windows has no class token and no registers")
        if config.window < 1 or config.window % (config.patch_size * config.merge_size):
            raise ValueError(
                f"window: expected a multiple of {config.patch_size * config.merge_size}, got {config.window}"
            )
    if config.norm_after and (config.layer_scale or config.sub_norm):
        raise ValueError("norm_after: not with layer_scale or sub_norm")
