"""The families of towers: how transformers' ``config.json`` describes each, and the options it has here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlmops.models import activations
from vlmops.models.config import VisionConfig

__all__ = ["FAMILIES", "MODEL_TYPES", "from_json"]

Json = Mapping[str, Any]

#: transformers' name of a value -> ours.
NAMES = {
    "hidden_size": "width", "embed_dim": "width", "num_hidden_layers": "layers", "depth": "layers",
    "num_attention_heads": "heads", "num_heads": "heads", "intermediate_size": "mlp_width", "image_size": "image_size",
    "patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "spatial_merge_size": "merge_size",
    "hidden_act": "activation", "layer_norm_eps": "norm_eps", "window_size": "window", "num_register_tokens": "registers",
}  # fmt: skip
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224)
NATIVE = dict(depth=32, num_heads=16, patch_size=14, temporal_patch_size=2, spatial_merge_size=2)


def from_json(json: Json, family: str | None = None) -> VisionConfig:
    """A transformers vision config as ours; what the file leaves out has transformers' default.

    Args:
        json: the vision part of a ``config.json``.
        family: of ``FAMILIES``; None: by the file's ``model_type``.

    Raises:
        ValueError: a family or model type that is not known.
    """
    if family is None:
        kind = json.get("model_type", "")
        if kind not in MODEL_TYPES:
            raise ValueError(f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {kind!r}")
        family = MODEL_TYPES[kind]
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family](json)


def _read(json: Json, **defaults: Any) -> dict[str, Any]:
    """Our arguments out of the file's values, or of the defaults (by their names) where it has none."""
    found = {}
    for theirs, default in defaults.items():
        value = json.get(theirs)
        found[NAMES[theirs]] = default if value is None else value
    found["activation"] = activations.ours(found["activation"])
    return found


def _qkv(json: Json) -> str:
    return "o" if json.get("qkv_bias") is False else "qkvo"


def _theta(json: Json) -> float:
    return float((json.get("rope_parameters") or json).get("rope_theta") or 10000.0)


def _vit(json: Json) -> VisionConfig:
    values = _read(json, **BASE, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-12)
    return VisionConfig(**values, class_token=True, attention_bias=_qkv(json))


def _clip(json: Json) -> VisionConfig:
    values = _read(json, **BASE, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    return VisionConfig(**values, class_token=True, patch_bias=False, pre_norm=True)


def _siglip(json: Json) -> VisionConfig:
    return VisionConfig(**_read(json, **BASE, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6))


def _dinov2(json: Json) -> VisionConfig:
    base = {name: value for name, value in BASE.items() if name != "intermediate_size"}
    values = _read(json, **base, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6)
    hidden, gated = int(values["width"] * json.get("mlp_ratio", 4)), bool(json.get("use_swiglu_ffn"))
    if gated:  # a gated MLP has three matrices: two thirds of the channels, and a multiple of 8
        hidden, values["activation"] = (int(hidden * 2 / 3) + 7) // 8 * 8, "silu"
    return VisionConfig(
        **values, mlp_width=hidden, gated=gated, class_token=True, layer_scale=True, attention_bias=_qkv(json)
    )


def _dinov2_with_registers(json: Json) -> VisionConfig:
    more = _read(json, num_register_tokens=4, patch_size=16, hidden_act="gelu")
    plain = _dinov2(json)
    return VisionConfig(**{**vars(plain), **more, "activation": plain.activation, "antialias": True})


def _blip2(json: Json) -> VisionConfig:
    """EVA01-g without its last block (BLIP-2, Li et al. 2023)."""
    sizes = dict(hidden_size=1408, num_hidden_layers=39, num_attention_heads=16, intermediate_size=6144, image_size=224)
    values = _read(json, **sizes, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6)
    return VisionConfig(**values, class_token=True, attention_bias=_qkv(json))


def _qwen2_vl(json: Json) -> VisionConfig:
    values = _read(json, **NATIVE, embed_dim=1280, hidden_act="quick_gelu")
    hidden = int(values["width"] * json.get("mlp_ratio", 4))
    return VisionConfig(
        **values, mlp_width=hidden, position="rope", rope_theta=_theta(json), patch_bias=False, post_norm=False
    )


def _qwen2_5_vl(json: Json) -> VisionConfig:
    values = _read(json, **NATIVE, hidden_size=3584, intermediate_size=3420, window_size=112, hidden_act="silu")
    full = json.get("fullatt_block_indexes", (7, 15, 23, 31))
    return VisionConfig(
        **values, full_layers=tuple(full), gated=True, norm="rms_norm", position="rope", rope_theta=_theta(json),
        patch_bias=False, post_norm=False,
    )  # fmt: skip


def _pixtral(json: Json) -> VisionConfig:
    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    return VisionConfig(
        **_read(json, **sizes, patch_size=16, hidden_act="gelu"), norm_eps=1e-5, gated=True, norm="rms_norm",
        position="rope", rope="alternating", rope_theta=_theta(json), patch_bias=False, attention_bias="", mlp_bias=False,
        pre_norm=True, post_norm=False,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[Json], VisionConfig]] = {
    "vit": _vit, "clip": _clip, "siglip": _siglip, "dinov2": _dinov2, "dinov2_with_registers": _dinov2_with_registers,
    "blip2": _blip2, "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "pixtral": _pixtral,
}  # fmt: skip
MODEL_TYPES = {
    "vit": "vit", "clip_vision_model": "clip", "siglip_vision_model": "siglip", "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers", "blip_2_vision_model": "blip2", "qwen2_vl": "qwen2_vl",
    "qwen2_vl_vision": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl", "qwen2_5_vl_vision": "qwen2_5_vl", "pixtral": "pixtral",
}  # fmt: skip
