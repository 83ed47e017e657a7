"""PaliGemma 2 (Steiner et al. 2024): SigLIP so400m, one linear layer, Gemma 2; the prompt's tokens all see each other."""

from __future__ import annotations

from typing import Any

from vlmops.models.assemblies.projected import ProjectedVLM
from vlmops.models.config import ConnectorConfig, VLMConfig
from vlmops.models.formats.base import Format, Json, decoder_rules, parts, text_part, tower_rules
from vlmops.models.formats.llava import RENAMES, image_options
from vlmops.models.keymap import Rule, layer
from vlmops.models.language import families as decoders
from vlmops.models.language.to_json import to_json as decoder_json
from vlmops.models.vision import families as towers
from vlmops.models.vision.to_json import to_json as tower_json

__all__ = ["FORMAT", "read", "rules", "write"]


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours."""
    text = text_part(json)
    text.pop("use_bidirectional_attention", None)  # token_type_ids say which tokens
    decoder = decoders.from_json({**text, "model_type": text.get("model_type", "gemma2")})
    vision = towers.from_json(json["vision_config"], "siglip")
    return VLMConfig(
        "paligemma", decoder, "gemma2", vision, "siglip", ConnectorConfig("linear", vision.width, decoder.width),
        image_token=json.get("image_token_index", json.get("image_token_id", 257152)), images=image_options(vision),
    )  # fmt: skip


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``."""
    vision, _ = parts(config, "linear", "a linear layer")
    text = decoder_json(config.decoder, "gemma2")
    seen = {**tower_json(vision, "siglip"), "projection_dim": config.decoder.width, "vision_use_head": False}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
        "image_token_index": config.image_token, "projection_dim": config.decoder.width, "hidden_size": config.decoder.width,
        "text_config": text, "vision_config": seen, "tie_word_embeddings": config.decoder.tied,
    }  # fmt: skip


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    return [
        *tower_rules(config, "vision_tower."),
        *layer("connector", "multi_modal_projector.linear"),
        *decoder_rules(config, "language_model.model.", "language_model.lm_head.weight"),
    ]


FORMAT = Format(("paligemma",), ProjectedVLM, read, write, rules, RENAMES)
