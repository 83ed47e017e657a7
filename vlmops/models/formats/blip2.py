"""BLIP-2 (Li et al. 2023): EVA01-g, a Q-Former whose queries take the places of the image tokens, OPT."""

from __future__ import annotations

from typing import Any

from vlmops.models import activations
from vlmops.models.assemblies.projected import ProjectedVLM
from vlmops.models.config import ConnectorConfig, VisionConfig, VLMConfig
from vlmops.models.formats.base import Format, Json, decoder_rules, text_part, tower_rules
from vlmops.models.keymap import Rule, affine, layer
from vlmops.models.language import families as decoders
from vlmops.models.language.to_json import to_json as decoder_json
from vlmops.models.vision import families as towers
from vlmops.models.vision.to_json import to_json as tower_json

__all__ = ["FORMAT", "read", "rules", "write"]

LAYER = "qformer.encoder.layer."


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours."""
    text = text_part({"text_config": {"model_type": "opt"}, **json})
    kind = text.get("model_type", "opt")
    decoder = decoders.from_json({**text, "model_type": kind})
    vision = towers.from_json(dict(json.get("vision_config") or {}), "blip2")
    query = json.get("qformer_config") or {}
    if query.get("use_qformer_text_input"):
        raise ValueError("use_qformer_text_input: this Q-Former reads images alone")
    if json.get("image_token_index") is None:
        raise ValueError(
            "image_token_index: expected the token whose places the queries take, as files since 2024 have it"
        )
    connector = ConnectorConfig(
        "qformer", vision.width, decoder.width, hidden=query.get("intermediate_size", 3072),
        activation=activations.ours(query.get("hidden_act", "gelu")), norm_eps=query.get("layer_norm_eps", 1e-12),
        queries=json.get("num_query_tokens", 32), layers=query.get("num_hidden_layers", 12),
        heads=query.get("num_attention_heads", 12), width=query.get("hidden_size", 768),
        cross_every=query.get("cross_attention_frequency", 2),
    )  # fmt: skip
    return VLMConfig(
        family="blip2", decoder=decoder, decoder_family=decoders.MODEL_TYPES[kind], vision=vision, vision_family="blip2",
        connector=connector, image_token=json["image_token_index"], class_token=True,
        images=dict(mode="fixed", size=vision.image_size, patch_size=vision.patch_size, policy="resize"),
    )  # fmt: skip


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``."""
    vision, connector = parts(config)
    width = connector.width or connector.in_width
    return {
        "architectures": ["Blip2ForConditionalGeneration"], "model_type": "blip-2",
        "image_token_index": config.image_token, "num_query_tokens": connector.queries,
        "vision_config": tower_json(vision, "blip2"), "text_config": decoder_json(config.decoder, config.decoder_family),
        "tie_word_embeddings": config.decoder.tied,
        "qformer_config": {
            "model_type": "blip_2_qformer", "hidden_size": width, "num_hidden_layers": connector.layers,
            "num_attention_heads": connector.heads, "intermediate_size": connector.hidden or 4 * width,
            "hidden_act": activations.theirs(connector.activation), "layer_norm_eps": connector.norm_eps,
            "cross_attention_frequency": connector.cross_every, "encoder_hidden_size": connector.in_width,
        },
    }  # fmt: skip


def parts(config: VLMConfig) -> tuple[VisionConfig, ConnectorConfig]:
    """Tower and connector; ValueError where the family cannot have what the config asks for."""
    if (
        config.vision is None
        or config.connector is None
        or config.connector.kind != "qformer"
        or not config.class_token
    ):
        raise ValueError("connector: expected a tower with its class token and a Q-Former in a blip2 checkpoint")
    if config.layer is not None:
        raise ValueError(f"layer: expected the tower's last one in a blip2 checkpoint, got {config.layer}")
    return config.vision, config.connector


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    _, connector = parts(config)
    base = decoders.BASES.get(config.decoder_family, "model.")
    return [
        *tower_rules(config, "vision_model."),
        Rule("connector.latents", "query_tokens", "squeeze:1"),
        *layer("connector.norm", "qformer.layernorm"),
        *(rule for i in range(connector.layers) for rule in _block(i, i % connector.cross_every == 0)),
        *layer("connector", "language_projection"),
        *decoder_rules(config, f"language_model.{base}", "language_model.lm_head.weight"),
    ]


def _block(i: int, crosses: bool) -> list[Rule]:
    ours, theirs = f"connector.layers.{i}.", f"{LAYER}{i}."
    return [
        *_attention(ours + "attention.", theirs + "attention."),
        *(_attention(ours + "cross.", theirs + "crossattention.") if crosses else []),
        *affine((ours + "w1", ours + "b1"), theirs + "intermediate_query.dense"),
        *affine((ours + "w2", ours + "b2"), theirs + "output_query.dense"),
        *layer(ours + "norm", theirs + "output_query.LayerNorm"),
    ]


def _attention(ours: str, theirs: str) -> list[Rule]:
    names = [f"{theirs}attention.{x}" for x in ("key", "value")]
    return [
        *affine((ours + "q", ours + "q_bias"), theirs + "attention.query"),
        Rule(ours + "kv", [f"{name}.weight" for name in names], "cat"),
        Rule(ours + "kv_bias", [f"{name}.bias" for name in names], "cat"),
        *affine((ours + "out", ours + "out_bias"), theirs + "output.dense"),
        *layer(ours + "norm", theirs + "output.LayerNorm"),
    ]


FORMAT = Format(("blip-2",), ProjectedVLM, read, write, rules)
