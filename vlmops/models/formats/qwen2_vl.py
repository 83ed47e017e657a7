"""Qwen2-VL (Wang et al. 2024): its own tower at any resolution, a 2x2 merger, Qwen2 with M-RoPE."""

from __future__ import annotations

from typing import Any

from vlmops.models.assemblies.projected import ProjectedVLM
from vlmops.models.config import ConnectorConfig, VisionConfig, VLMConfig
from vlmops.models.formats.base import Format, Json, decoder_rules, parts, text_part, tower_rules
from vlmops.models.keymap import Rule, affine, layer
from vlmops.models.language import families as decoders
from vlmops.models.language.to_json import to_json as decoder_json
from vlmops.models.vision import families as towers
from vlmops.models.vision.to_json import to_json as tower_json

__all__ = ["FORMAT", "RENAMES", "image_options", "read", "rules", "values", "write"]

RENAMES = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.visual\.", "visual."),
)
MERGER = "visual.merger."
IMAGES = dict(mode="native", style="qwen2_vl", min_pixels=56 * 56, max_pixels=28 * 28 * 1280)


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours."""
    return VLMConfig(**values(json, "qwen2_vl", "layer_norm"))


def values(json: Json, family: str, norm: str) -> dict[str, Any]:
    """Arguments of ``VLMConfig``, for this family and Qwen2.5-VL."""
    text = text_part(json)
    decoder = decoders.from_json({**text, "model_type": text.get("model_type") or f"{family}_text"})
    seen = dict(json.get("vision_config") or {})
    vision = towers.from_json(seen, family)
    return dict(
        family=family, decoder=decoder, decoder_family="qwen2", vision=vision, vision_family=family,
        connector=ConnectorConfig("merger", vision.width, decoder.width, norm=norm),
        image_token=json.get("image_token_id", 151655), video_token=json.get("video_token_id", 151656),
        images=image_options(vision),
    )  # fmt: skip


def image_options(vision: VisionConfig) -> dict[str, Any]:
    """How its processor prepares an image."""
    return dict(IMAGES, patch_size=vision.patch_size, merge_size=vision.merge_size)


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``; for Qwen2.5-VL too."""
    vision, _ = parts(config, "merger", "a merger")
    name = "Qwen2VL" if config.family == "qwen2_vl" else "Qwen2_5_VL"
    return {
        "architectures": [f"{name}ForConditionalGeneration"], "model_type": config.family,
        "text_config": decoder_json(config.decoder, "qwen2", model_type=f"{config.family}_text"),
        "vision_config": tower_json(vision, config.family, out_width=config.decoder.width),
        "image_token_id": config.image_token, "video_token_id": config.video_token,
        "tie_word_embeddings": config.decoder.tied,
    }  # fmt: skip


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    _, connector = parts(config, "merger", "a merger")
    return [
        *tower_rules(config, "visual."),
        *layer("connector.norm", MERGER + "ln_q", connector.norm != "rms_norm"),
        *affine(("connector.w1", "connector.b1"), MERGER + "mlp.0"),
        *affine(("connector.w2", "connector.b2"), MERGER + "mlp.2"),
        *decoder_rules(config, "model.", "lm_head.weight"),
    ]


FORMAT = Format(("qwen2_vl",), ProjectedVLM, read, write, rules, RENAMES)
