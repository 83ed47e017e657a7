"""``families.from_json``'s inverse: a tower as the vision part of a transformers 5 ``config.json``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmops.models import activations
from vlmops.models.config import VisionConfig, check_same
from vlmops.models.vision.families import FAMILIES, from_json

__all__ = ["to_json"]

Json = dict[str, Any]

MODEL_TYPES = {
    "vit": "vit", "clip": "clip_vision_model", "siglip": "siglip_vision_model", "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers", "blip2": "blip_2_vision_model", "qwen2_vl": "qwen2_vl_vision",
    "qwen2_5_vl": "qwen2_5_vl_vision", "pixtral": "pixtral",
}  # fmt: skip
NATIVE = ("qwen2_vl", "qwen2_5_vl")
RATIOS = range(1, 65)  # DINOv2's and Qwen2-VL's files have whole numbers


def to_json(config: VisionConfig, family: str, *, out_width: int | None = None) -> Json:
    """A tower's config as transformers 5 writes it.

    Args:
        config: of the tower.
        family: of ``families.FAMILIES``.
        out_width: channels behind the connector, which Qwen2-VL's and Qwen2.5-VL's files keep here; None: left out.

    Returns:
        What ``from_json`` reads the config from again.

    Raises:
        ValueError: a family that transformers does not have, or an option of the config that the family does not have.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    json: Json = {"model_type": MODEL_TYPES[family], "patch_size": config.patch_size}
    dinov2_gated = family.startswith("dinov2") and config.gated  # whose files name the activation of the plain form
    json |= {"hidden_act": "gelu" if dinov2_gated else activations.theirs(config.activation)}
    if family in NATIVE:
        json |= _native(config, family, out_width)
    else:
        json |= dict(
            hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
            **_square(config, family),
        )  # fmt: skip
    wanted, read = (replace(x, head_dim=x.dim) for x in (config, from_json(json, family)))
    check_same(wanted, read, family)
    return json


def _square(config: VisionConfig, family: str) -> Json:
    """What is not the same in all families whose files say ``hidden_size``."""
    if family == "pixtral":
        return dict(intermediate_size=config.mlp_width, head_dim=config.dim, **_rope(config))
    json: Json = dict(image_size=config.image_size, layer_norm_eps=config.norm_eps)
    if family in ("vit", "dinov2", "dinov2_with_registers", "blip2"):
        json["qkv_bias"] = "qkv" in config.attention_bias
    if family == "siglip":
        json["vision_use_head"] = False
    if not family.startswith("dinov2"):
        return json | dict(intermediate_size=config.mlp_width)
    hidden = {_gated(config.width * r) if config.gated else config.width * r: r for r in RATIOS}
    json |= dict(mlp_ratio=hidden.get(config.mlp_width, 1), use_swiglu_ffn=config.gated)
    return json | (dict(num_register_tokens=config.registers) if family == "dinov2_with_registers" else {})


def _native(config: VisionConfig, family: str, out_width: int | None) -> Json:
    json: Json = dict(
        depth=config.layers, num_heads=config.heads, temporal_patch_size=config.temporal_patch_size,
        spatial_merge_size=config.merge_size, **_rope(config),
    )  # fmt: skip
    if family == "qwen2_vl":
        json |= dict(embed_dim=config.width, mlp_ratio=max(1, config.mlp_width // config.width))
        return json | ({} if out_width is None else dict(hidden_size=out_width))
    json |= dict(
        hidden_size=config.width, intermediate_size=config.mlp_width, window_size=config.window,
        fullatt_block_indexes=list(config.full_layers),
    )  # fmt: skip
    return json | ({} if out_width is None else dict(out_hidden_size=out_width))


def _rope(config: VisionConfig) -> Json:
    return dict(rope_parameters=dict(rope_type="axial", rope_theta=config.rope_theta))


def _gated(hidden: int) -> int:
    """DINOv2's width of a gated MLP."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8
