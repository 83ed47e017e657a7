"""CogVLM2 (Hong et al. 2024) in its authors' files: EVA02-E, a gated adapter, Llama 3 with a visual expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmops.models.assemblies.expert import CogVLM2
from vlmops.models.config import ConnectorConfig, DecoderConfig, VisionConfig, VLMConfig
from vlmops.models.formats.base import Format, Json, parts, tower_rules
from vlmops.models.keymap import Rule, affine, layer

__all__ = ["FORMAT", "adapter", "read", "rules", "write"]

IMAGE_TOKEN = 128002  # also the padding, which an attention mask tells apart
THETA = 500000.0  # of the rotary angles: in the authors' code, not in their files
TEXT = {
    "vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "mlp_width", "num_multi_query_heads": "kv_heads", "rms_norm_eps": "norm_eps",
    "hidden_act": "activation", "tie_word_embeddings": "tied",
}  # fmt: skip
VISION = {
    "hidden_size": "width", "num_hidden_layers": "layers", "num_heads": "heads", "intermediate_size": "mlp_width",
    "patch_size": "patch_size", "image_size": "image_size", "hidden_act": "activation", "layer_norm_eps": "norm_eps",
}  # fmt: skip


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours."""
    if "num_multi_query_heads" not in json:
        raise ValueError("num_multi_query_heads: missing, so this is the first CogVLM, which is not here")
    decoder = DecoderConfig(**{ours: json[theirs] for theirs, ours in TEXT.items() if theirs in json}, rope_theta=THETA)
    seen = json["vision_config"]
    vision = VisionConfig(
        **{ours: seen[theirs] for theirs, ours in VISION.items()}, class_token=True, norm_after=True, post_norm=False
    )
    places = (seen["image_size"] // vision.patch_size) ** 2 + 1
    if seen.get("num_positions", places) != places:
        raise ValueError(
            f"num_positions: expected {places} for {seen['image_size']} pixels, got {seen['num_positions']}"
        )
    return VLMConfig(
        "cogvlm2", decoder, "llama", vision, "cogvlm", adapter(vision, decoder), image_token=IMAGE_TOKEN,
        images=dict(mode="fixed", size=vision.image_size, patch_size=vision.patch_size, policy="resize"),
    )  # fmt: skip


def adapter(vision: VisionConfig, decoder: DecoderConfig) -> ConnectorConfig:
    """What stands between these two."""
    return ConnectorConfig(
        "glu", vision.width, decoder.width, hidden=decoder.mlp_width, activation="silu", norm_eps=1e-5
    )


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``, which their code reads."""
    vision, _ = parts(config, "glu", "one of kind glu")
    side = (vision.image_size or 0) // vision.patch_size
    json: dict[str, Any] = {
        "architectures": ["CogVLMForCausalLM"], **{theirs: getattr(config.decoder, ours) for theirs, ours in TEXT.items()},
        "num_multi_query_heads": config.decoder.groups, "template_version": "chat",
        "vision_config": {
            **{theirs: getattr(vision, ours) for theirs, ours in VISION.items()}, "in_channels": 3, "dropout_prob": 0.0,
            "num_positions": side * side + 1,
        },
    }  # fmt: skip
    again = read(json)
    if (again.decoder, again.vision, again.connector) != (_plain(config.decoder), vision, config.connector):
        raise ValueError(f"family: a cogvlm2 checkpoint cannot have all of {config}")
    return json


def _plain(config: DecoderConfig) -> DecoderConfig:
    return replace(
        config, kv_heads=config.groups, head_dim=None if config.dim * config.heads == config.width else config.dim
    )


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    parts(config, "glu", "one of kind glu")
    vision, layers = "model.vision.", range(config.decoder.layers)
    ours, theirs = "decoder.blocks.{i}.", "model.layers.{i}."
    found = [
        Rule("decoder.embedding", "model.embed_tokens.weight"),
        Rule("decoder.norm.weight", "model.norm.weight"),
        Rule("", "lm_head.weight", "ignore") if config.decoder.tied else Rule("decoder.head", "lm_head.weight"),
        Rule(ours + "norm1.weight", theirs + "input_layernorm.weight", layers=layers),
        Rule(ours + "norm2.weight", theirs + "post_attention_layernorm.weight", layers=layers),
        Rule(ours + "expert.qkv_bias", theirs + "self_attn.vision_expert_query_key_value.bias", layers=layers),
        Rule("", theirs + "self_attn.rotary_emb.inv_freq", "ignore", layers),
    ]
    for kind, prefix in (("language", ours), ("vision", ours + "expert.")):
        found += [
            Rule(prefix + "qkv", f"{theirs}self_attn.{kind}_expert_query_key_value.weight", layers=layers),
            Rule(prefix + "o", f"{theirs}self_attn.{kind}_expert_dense.weight", layers=layers),
            *(
                Rule(f"{prefix}w_{x}", f"{theirs}mlp.{kind}_mlp.{x}_proj.weight", layers=layers)
                for x in ("gate", "up", "down")
            ),
        ]
    return [
        *found,
        *tower_rules(config, vision),
        *affine(("connector.conv", "connector.conv_bias"), vision + "conv"),
        Rule("connector.proj", vision + "linear_proj.linear_proj.weight"),
        *layer("connector.norm", vision + "linear_proj.norm1"),
        Rule("connector.w_up", vision + "linear_proj.dense_h_to_4h.weight"),
        Rule("connector.w_gate", vision + "linear_proj.gate_proj.weight"),
        Rule("connector.w_down", vision + "linear_proj.dense_4h_to_h.weight"),
        Rule("connector.begin", vision + "boi", "squeeze:2"),
        Rule("connector.end", vision + "eoi", "squeeze:2"),
    ]


FORMAT = Format(("CogVLMForCausalLM",), CogVLM2, read, write, rules)
