"""Fuyu (Bavishi et al. 2023): Persimmon, and a linear layer that its images' patches go through."""

from __future__ import annotations

from typing import Any

from vlmops.models.assemblies.native import FuyuVLM
from vlmops.models.config import ConnectorConfig, VLMConfig
from vlmops.models.formats.base import Format, Json, decoder_rules, text_part
from vlmops.models.keymap import Rule, layer
from vlmops.models.language import families as decoders
from vlmops.models.language.to_json import to_json as decoder_json

__all__ = ["FORMAT", "read", "rules", "write"]

#: Its processor pads with bytes of 1.
IMAGES = dict(mode="native", style="fuyu", resample="bilinear", fill=(1, 1, 1), mean=(0.5,) * 3, std=(0.5,) * 3)
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_embed_tokens\.", "vision_embed_tokens."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours; early files have the language model's values among the rest."""
    text = text_part(json)
    if text.get("model_type", "persimmon") not in ("persimmon", "fuyu"):
        raise ValueError(f"text_config: expected persimmon, got {text['model_type']!r}")
    decoder = decoders.from_json({**text, "model_type": "persimmon"})
    side = json.get("patch_size", 30)
    if json.get("num_channels", 3) != 3:
        raise ValueError(f"num_channels: expected 3, got {json['num_channels']}")
    return VLMConfig(
        family="fuyu", decoder=decoder, decoder_family="persimmon", image_token=json.get("image_token_id", 71011),
        connector=ConnectorConfig("linear", side * side * 3, decoder.width), images={**IMAGES, "patch_size": side},
    )  # fmt: skip


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``."""
    return {
        "architectures": ["FuyuForCausalLM"], "model_type": "fuyu", "num_channels": 3, "patch_size": patch_size(config),
        "image_token_id": config.image_token, "tie_word_embeddings": config.decoder.tied,
        "text_config": decoder_json(config.decoder, "persimmon"),
    }  # fmt: skip


def patch_size(config: VLMConfig) -> int:
    """Pixels on a side of a patch; ValueError where the family cannot have what the config asks for."""
    connector = config.connector
    side = 0 if connector is None else round((connector.in_width / 3) ** 0.5)
    if config.vision is not None or connector is None or connector.kind != "linear" or not connector.bias:
        raise ValueError("connector: expected no tower and a linear layer with a bias in a fuyu checkpoint")
    if side * side * 3 != connector.in_width:
        raise ValueError(f"in_width: expected that of square patches of 3 colours, got {connector.in_width}")
    return side


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    patch_size(config)
    return [
        *layer("connector", "vision_embed_tokens"),
        *decoder_rules(config, "language_model.model.", "language_model.lm_head.weight"),
    ]


FORMAT = Format(("fuyu",), FuyuVLM, read, write, rules, RENAMES)
