"""Idefics (Laurencon et al. 2023), an open Flamingo: CLIP, a Perceiver, and gated cross-attention in front of Llama's blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmops.models import activations
from vlmops.models.assemblies.crossed import FlamingoVLM
from vlmops.models.config import ConnectorConfig, CrossConfig, VisionConfig, VLMConfig
from vlmops.models.formats.base import Format, Json, decoder_rules, tower_rules
from vlmops.models.keymap import Rule
from vlmops.models.language import families as decoders
from vlmops.models.language.to_json import to_json as decoder_json
from vlmops.models.vision import families as towers

__all__ = ["FORMAT", "read", "rules", "write"]

#: Attributes of a tower's config -> its names in a file, which are not quite CLIP's.
VISION = {
    "width": "embed_dim", "layers": "num_hidden_layers", "heads": "num_attention_heads", "mlp_width": "intermediate_size",
    "image_size": "image_size", "patch_size": "patch_size", "norm_eps": "layer_norm_eps",
}  # fmt: skip
#: A layer of cross-attention and one of the Perceiver, ours -> theirs; keys and values apart.
CROSS = {
    "norm1.weight": "input_layernorm.weight", "q": "cross_attn.q_proj.weight", "out": "cross_attn.o_proj.weight",
    "attention_gate": "alpha_cross_attn", "norm2.weight": "post_attention_layernorm.weight", "w1": "mlp.up_proj.weight",
    "w_gate": "mlp.gate_proj.weight", "w2": "mlp.down_proj.weight", "mlp_gate": "alpha_dense",
}  # fmt: skip
CROSS_NORMS = {"q_norm.weight": "cross_attn.q_layer_norm.weight", "k_norm.weight": "cross_attn.k_layer_norm.weight"}
LAYER = {"q": "0.q_proj.weight", "out": "0.output_proj.weight", "w1": "1.fc.weight", "w2": "1.c_proj.weight"}
LAYER_NORMS = {"context_norm": "0.context_layer_norm", "latent_norm": "0.latents_layer_norm", "mlp_norm": "1.ln"}


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours. Its image token is not in it: that of the published models, the second added one, is taken."""
    if json.get("alpha_type", "float") != "float":
        raise ValueError(f'alpha_type: expected "float", one gate a layer, got {json["alpha_type"]!r}')
    added = json.get("additional_vocab_size", 0)
    decoder = decoders.from_json({**json, "model_type": "llama"}, "llama")
    decoder = replace(decoder, vocab=decoder.vocab + added)
    seen = json.get("vision_config") or {}
    vision = _vision(seen)
    every = json.get("cross_layer_interval", 1)
    if decoder.layers % every:
        raise ValueError(f"cross_layer_interval: expected a divisor of {decoder.layers} layers, got {every}")
    cross = CrossConfig(
        decoder.width, vision.width, decoder.heads, decoder.dim, decoder.mlp_width, every, decoder.activation, gated=True,
        norm="rms_norm", norm_eps=decoder.norm_eps, qk_norm=json.get("qk_layer_norms", False),
    )  # fmt: skip
    connector, perceiver = None, json.get("perceiver_config") or {}
    if json.get("use_resampler"):
        connector = ConnectorConfig(
            "perceiver", vision.width, vision.width, activation="relu", norm_eps=1e-5,
            queries=perceiver.get("resampler_n_latents", 64), layers=perceiver.get("resampler_depth", 6),
            heads=perceiver.get("resampler_n_heads", 16), head_dim=perceiver.get("resampler_head_dim", 96),
            qk_norm=perceiver.get("qk_layer_norms_perceiver", False),
        )  # fmt: skip
    return VLMConfig(
        "idefics", decoder, "llama", vision, "clip", connector, image_token=decoder.vocab - added + 1, layer=-1,
        class_token=True, cross=cross, added_tokens=added,
        images=dict(mode="fixed", size=vision.image_size, patch_size=vision.patch_size, policy="resize"),
    )  # fmt: skip


def _vision(json: Json) -> VisionConfig:
    """The tower; what the file leaves out has transformers' default."""
    base = dict(
        embed_dim=768, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, image_size=224, patch_size=14,
        layer_norm_eps=1e-5, hidden_act="gelu",
    )  # fmt: skip
    json = {**base, **{name: value for name, value in json.items() if value is not None}}
    return towers.from_json({**json, "hidden_size": json["embed_dim"]}, "clip")


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``."""
    vision, cross, connector = parts(config)
    text = decoder_json(replace(config.decoder, vocab=config.decoder.vocab - config.added_tokens), "llama")
    for name in (
        "num_key_value_heads",
        "attention_bias",
        "mlp_bias",
        "head_dim",
    ):  # Idefics has Llama's first form alone
        text.pop(name, None)
    json = {
        **text, "architectures": ["IdeficsForVisionText2Text"], "model_type": "idefics",
        "additional_vocab_size": config.added_tokens, "cross_layer_interval": cross.every, "qk_layer_norms": cross.qk_norm,
        "alpha_type": "float", "use_resampler": connector is not None, "perceiver_config": _perceiver(connector),
        "vision_config": {
            "model_type": "idefics_vision", "hidden_act": activations.theirs(vision.activation),
            **{theirs: getattr(vision, ours) for ours, theirs in VISION.items()},
        },
    }  # fmt: skip
    again = replace(read(json), **{n: getattr(config, n) for n in ("image_token", "end_tokens", "pad_token", "images")})
    if _plain(again) != _plain(config):
        raise ValueError(f"family: an idefics checkpoint cannot have all of {config}")
    return json


def _plain(config: VLMConfig) -> VLMConfig:
    decoder = replace(config.decoder, kv_heads=config.decoder.groups, head_dim=config.decoder.dim)
    return replace(config, decoder=decoder)


def _perceiver(connector: ConnectorConfig | None) -> dict[str, Any]:
    if connector is None:
        return {"use_resampler": False}
    return {
        "use_resampler": True, "resampler_n_latents": connector.queries, "resampler_depth": connector.layers,
        "resampler_n_heads": connector.heads, "resampler_head_dim": connector.head_dim,
        "qk_layer_norms_perceiver": connector.qk_norm,
    }  # fmt: skip


def parts(config: VLMConfig) -> tuple[VisionConfig, CrossConfig, ConnectorConfig | None]:
    """Tower, cross-attention and connector; ValueError where the family cannot have what the config asks for."""
    kind = "perceiver" if config.connector is None else config.connector.kind
    if config.vision is None or config.cross is None or kind != "perceiver":
        raise ValueError(
            "connector: expected a tower, cross-attention and a Perceiver or nothing in an idefics checkpoint"
        )
    return config.vision, config.cross, config.connector


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    _, cross, connector = parts(config)
    sizes = f"cat:{config.decoder.vocab - config.added_tokens},{config.added_tokens}"
    added = {
        "decoder.embedding": ["model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"],
        "decoder.head": ["lm_head.weight", "lm_head.additional_fc.weight"],
    }
    found = decoder_rules(config, "model.", "lm_head.weight")
    if config.added_tokens:
        found = [Rule(r.ours, added[r.ours], sizes) if r.ours in added else r for r in found]
    found += tower_rules(config, "model.vision_model.")
    numbers = [i for i in range(config.decoder.layers) if cross.stands(i)]
    for j, i in enumerate(numbers):  # theirs are counted by themselves
        ours, theirs = f"decoder.blocks.{i}.cross.", f"model.gated_cross_attn_layers.{j}."
        names = {**CROSS, **(CROSS_NORMS if cross.qk_norm else {})}
        found += [Rule(ours + a, theirs + b) for a, b in names.items()]
        found.append(Rule(ours + "kv", [f"{theirs}cross_attn.{x}_proj.weight" for x in "kv"], "cat"))
    return found + ([] if connector is None else _perceiver_rules(connector))


def _perceiver_rules(connector: ConnectorConfig) -> list[Rule]:
    ours, theirs, layers = "connector.layers.{i}.", "model.perceiver_resampler.blocks.{i}.", range(connector.layers)
    norms = {**LAYER_NORMS, **({x + "_norm": f"0.{x}_layer_norm" for x in "qk"} if connector.qk_norm else {})}
    names = {**LAYER, **{f"{a}.{part}": f"{b}.{part}" for a, b in norms.items() for part in ("weight", "bias")}}
    return [
        Rule("connector.latents", "model.perceiver_resampler.latents"),
        *(Rule(f"connector.norm.{x}", f"model.perceiver_resampler.layer_norm.{x}") for x in ("weight", "bias")),
        *(Rule(ours + a, theirs + b, layers=layers) for a, b in names.items()),
        Rule(ours + "kv", [f"{theirs}0.{x}_proj.weight" for x in "kv"], "cat", layers),
    ]


FORMAT = Format(("idefics",), FlamingoVLM, read, write, rules)
