"""LLaVA 1.5 (Liu et al. 2023): CLIP's last hidden state but one, an MLP, Vicuna. Pixtral (Agrawal et al. 2024) looks the same."""

from __future__ import annotations

from typing import Any

from vlmops.models import activations
from vlmops.models.assemblies.projected import ProjectedVLM
from vlmops.models.config import ConnectorConfig, VisionConfig, VLMConfig
from vlmops.models.formats.base import Format, Json, decoder_rules, parts, text_part, tower_rules
from vlmops.models.keymap import Rule, affine
from vlmops.models.language import families as decoders
from vlmops.models.language.to_json import to_json as decoder_json
from vlmops.models.vision import families as towers
from vlmops.models.vision.to_json import to_json as tower_json

__all__ = ["FORMAT", "base_values", "image_options", "read", "rules", "write"]

#: Names in files of transformers 4.52 and later, and of early ones, as the files in between have them.
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(model\.)?vision_tower\.vision_model\.", "vision_tower."),
    (r"^model\.(?=vision_tower|multi_modal_projector|image_newline)", ""),
)
PROJECTOR = "multi_modal_projector."


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours."""
    return VLMConfig(family="llava", **base_values(json))


def base_values(json: Json) -> dict[str, Any]:
    """What LLaVA and LLaVA-NeXT files have in common, as arguments of ``VLMConfig``."""
    text = text_part(json)
    kind = text.get("model_type", "llama")
    decoder = decoders.from_json({**text, "model_type": kind})
    seen = dict(json.get("vision_config") or {"model_type": "clip_vision_model"})
    vision_family = towers.MODEL_TYPES.get(seen.get("model_type", ""), "")
    vision = towers.from_json(seen)
    layer = json.get("vision_feature_layer", -2)
    layers = layer if isinstance(layer, int) else tuple(layer)
    connector = ConnectorConfig(
        "mlp", vision.width * (1 if isinstance(layers, int) else len(layers)), decoder.width,
        activation=activations.ours(json.get("projector_hidden_act", "gelu")),
        bias=json.get("multimodal_projector_bias", True),
    )  # fmt: skip
    full = json.get("vision_feature_select_strategy", "default") == "full"
    return dict(
        decoder=decoder, decoder_family=decoders.MODEL_TYPES[kind], vision=vision, vision_family=vision_family,
        connector=connector, image_token=json.get("image_token_index", json.get("image_token_id", 32000)), layer=layers,
        class_token=full and vision.class_token, images=image_options(vision, seen.get("image_size") or 1024),
    )  # fmt: skip


def image_options(vision: VisionConfig, long_edge: int = 1024) -> dict[str, Any]:
    """How its processors prepare an image: Pixtral's own resolution, CLIP's square cut from the centre, SigLIP's resized one."""
    if vision.position == "rope":
        return dict(mode="native", style="pixtral", patch_size=vision.patch_size, long_edge=long_edge)
    plain = dict(mode="fixed", size=vision.image_size, patch_size=vision.patch_size)
    if vision.class_token:
        return {**plain, "policy": "crop"}
    return {**plain, "policy": "resize", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``."""
    vision, connector = parts(config, "mlp", "an MLP")
    seen = tower_json(vision, config.vision_family)
    if vision.position == "rope":  # any size fits, but theirs makes its rotary table for this one
        seen["image_size"] = config.images.get("long_edge", 1024)
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": config.image_token, "projector_hidden_act": activations.theirs(connector.activation),
        "multimodal_projector_bias": connector.bias, "tie_word_embeddings": config.decoder.tied,
        "text_config": decoder_json(config.decoder, config.decoder_family),
        "vision_config": seen,
        "vision_feature_layer": config.layer if config.layer is None or isinstance(config.layer, int) else list(config.layer),
        "vision_feature_select_strategy": "full" if config.class_token or not vision.class_token else "default",
    }  # fmt: skip


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    _, connector = parts(config, "mlp", "an MLP")
    return [
        *tower_rules(config, "vision_tower."),
        *affine(("connector.w1", "connector.b1"), PROJECTOR + "linear_1", connector.bias),
        *affine(("connector.w2", "connector.b2"), PROJECTOR + "linear_2", connector.bias),
        *decoder_rules(config, "language_model.model.", "language_model.lm_head.weight"),
    ]


FORMAT = Format(("llava",), ProjectedVLM, read, write, rules, RENAMES)
