"""OpenFlamingo (Awadalla et al. 2023) as whole models in transformers' form, which Otter's authors published (Li et al. 2023).

CLIP's last hidden state without the class token, a Perceiver, and gated cross-attention in front of each so many blocks of a
language model. OpenFlamingo's own files hold the trained parts alone, in pickle, and are not read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmops.models.assemblies.crossed import FlamingoVLM
from vlmops.models.config import ConnectorConfig, CrossConfig, VisionConfig, VLMConfig
from vlmops.models.formats.base import Format, Json, decoder_rules, tower_rules
from vlmops.models.keymap import Rule, layer
from vlmops.models.language import families as decoders
from vlmops.models.language.to_json import to_json as decoder_json
from vlmops.models.vision import families as towers
from vlmops.models.vision.to_json import to_json as tower_json

__all__ = ["FORMAT", "gated_cross", "perceiver", "read", "rules", "write"]

ADDED = 3  # <|endofchunk|>, <image> and <PAD>, which Llama's tokenizer has not: their published files count without
HEADS, HEAD_DIM = 8, 64  # of the cross-attention and the Perceiver
LATENTS, DEPTH = 64, 6


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours. One without ``media_token_id`` is of a Llama whose vocabulary three tokens were added to."""
    if not json.get("only_attend_immediate_media", True):
        raise ValueError("only_attend_immediate_media: expected that a token sees the last image alone")
    text = dict(json["text_config"])
    decoder, family = decoders.from_json(text), decoders.MODEL_TYPES[text["model_type"]]
    token = json.get("media_token_id")
    if token is None:
        if family != "llama":
            raise ValueError(f"media_token_id: needed with a language model of type {text['model_type']!r}")
        decoder, token = replace(decoder, vocab=decoder.vocab + ADDED), decoder.vocab + 1
    vision = towers.from_json(json["vision_config"], "clip")
    every = json.get("cross_attn_every_n_layers", 4)
    if not 1 <= every <= decoder.layers:
        raise ValueError(f"cross_attn_every_n_layers: expected 1 to {decoder.layers}, got {every}")
    return VLMConfig(
        "flamingo", decoder, family, vision, "clip", perceiver(vision.width), image_token=token, layer=-1,
        cross=gated_cross(decoder.width, vision.width, every),
        images=dict(mode="fixed", size=vision.image_size, patch_size=vision.patch_size, policy="crop"),
    )  # fmt: skip


def perceiver(width: int) -> ConnectorConfig:
    """Of a tower of this width."""
    return ConnectorConfig(
        "perceiver", width, width, norm_eps=1e-5, queries=LATENTS, layers=DEPTH, heads=HEADS, head_dim=HEAD_DIM
    )


def gated_cross(width: int, context: int, every: int) -> CrossConfig:
    """In front of the last of each so many blocks."""
    return CrossConfig(width, context, HEADS, HEAD_DIM, 4 * width, every, first=every - 1)


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``."""
    vision, cross = parts(config)
    return {
        "architectures": ["FlamingoForConditionalGeneration"], "model_type": "flamingo",
        "cross_attn_every_n_layers": cross.every, "media_token_id": config.image_token, "only_attend_immediate_media": True,
        "text_config": decoder_json(config.decoder, config.decoder_family), "vision_config": tower_json(vision, "clip"),
        "tie_word_embeddings": config.decoder.tied,
    }  # fmt: skip


def parts(config: VLMConfig) -> tuple[VisionConfig, CrossConfig]:
    """Tower and cross-attention; ValueError where the family cannot have what the config asks for."""
    vision, cross = config.vision, config.cross
    if vision is None or cross is None:
        raise ValueError("cross: expected a tower and cross-attention in a flamingo checkpoint")
    if cross != gated_cross(config.decoder.width, vision.width, cross.every) or config.connector != perceiver(
        vision.width
    ):
        raise ValueError(f"family: a flamingo checkpoint cannot have {cross} and {config.connector}")
    if config.layer != -1 or config.class_token:
        raise ValueError("layer: expected -1 without the class token in a flamingo checkpoint")
    return vision, cross


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose; the language model's blocks are wrapped together with their cross-attention."""
    _, cross = parts(config)
    base = decoders.BASES.get(config.decoder_family, "model.")
    block, found = f"lang_encoder.{base}layers.", []
    for rule in decoder_rules(config, f"lang_encoder.{base}", "lang_encoder.lm_head.weight"):
        names = [n.replace(block + "{i}.", block + "{i}.decoder_layer.") for n in rule.theirs]
        found.append(replace(rule, theirs=names))
    for i in filter(cross.stands, range(config.decoder.layers)):
        ours, theirs = f"decoder.blocks.{i}.cross.", f"{block}{i}.gated_cross_attn_layer."
        found += [
            *layer(ours + "norm1", theirs + "attn.norm"),
            *(Rule(ours + a, f"{theirs}attn.to_{b}.weight") for a, b in (("q", "q"), ("kv", "kv"), ("out", "out"))),
            Rule(ours + "attention_gate", theirs + "attn_gate"),
            *_feed_forward(ours + "norm2", ours, theirs),
            Rule(ours + "mlp_gate", theirs + "ff_gate"),
        ]
    for i in range(DEPTH):
        ours, theirs = f"connector.layers.{i}.", f"perceiver.layers.{i}."
        found += [
            *layer(ours + "context_norm", theirs + "norm_media"),
            *layer(ours + "latent_norm", theirs + "norm_latents"),
            *(Rule(ours + a, f"{theirs}to_{b}.weight") for a, b in (("q", "q"), ("kv", "kv"), ("out", "out"))),
            *_feed_forward(ours + "mlp_norm", ours, theirs),
        ]
    return [
        *found,
        *tower_rules(config, "vision_encoder."),
        Rule("connector.latents", "perceiver.latents"),
        *layer("connector.norm", "perceiver.norm"),
    ]


def _feed_forward(norm: str, ours: str, theirs: str) -> list[Rule]:
    return [
        *layer(norm, theirs + "feed_forward.0"),
        Rule(ours + "w1", theirs + "feed_forward.1.weight"),
        Rule(ours + "w2", theirs + "feed_forward.3.weight"),
    ]


FORMAT = Format(("flamingo",), FlamingoVLM, read, write, rules)
