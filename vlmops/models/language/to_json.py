"""``families.from_json``'s inverse: a decoder as the text part of a transformers 5 ``config.json``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmops.models import activations
from vlmops.models.config import DecoderConfig, RopeScaling, check_same
from vlmops.models.language.families import FAMILIES, MODEL_TYPES, from_json

__all__ = ["to_json"]

Json = dict[str, Any]

SIZES = {
    "vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "mlp_width", "tie_word_embeddings": "tied",
}  # fmt: skip


def to_json(
    config: DecoderConfig, family: str, *, model_type: str | None = None, max_positions: int | None = None
) -> Json:
    """A decoder's config as transformers 5 writes it.

    Args:
        config: of the decoder.
        family: of ``families.FAMILIES``.
        model_type: one of the family's; None: the family's name, for Qwen 2 with M-RoPE "qwen2_vl_text".
        max_positions: tokens of a context, which transformers asks for and the decoder does not; None: those that the scaled
            angles are for, or transformers' default.

    Returns:
        What ``from_json`` reads the config from again.

    Raises:
        ValueError: a family or model type that is not known, or an option of the config that the family does not have.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    kind = model_type or ("qwen2_vl_text" if family == "qwen2" and config.mrope else family)
    if MODEL_TYPES.get(kind) != family:
        known = ", ".join(name for name, of in MODEL_TYPES.items() if of == family)
        raise ValueError(f"model_type: expected one of {known} of family {family}, got {kind!r}")
    if bool(config.mrope) != ("vl" in kind):
        raise ValueError(f"mrope: model type {kind} has {'some' if 'vl' in kind else 'none'}, got {config.mrope}")
    json = _plain(config, family) if family != "qwen" else _qwen(config)
    json = {"model_type": kind, **json}
    if max_positions is not None:
        json["max_position_embeddings"] = max_positions
    check_same(_normal(config), _normal(from_json(json, family)), family)
    return json


def _plain(config: DecoderConfig, family: str) -> Json:
    """Of every family but Qwen 1."""
    json: Json = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    activation = activations.theirs(config.activation)
    if family == "opt":
        json["ffn_dim"] = json.pop("intermediate_size")
        return json | dict(
            activation_function=activation, do_layer_norm_before=True, word_embed_proj_dim=config.width,
            enable_bias=config.qkv_bias, max_position_embeddings=config.learned_positions,
        )  # fmt: skip
    json |= {"hidden_activation" if family == "gemma2" else "hidden_act": activation, **_rope(config)}
    if family == "persimmon":
        json["rope_parameters"]["partial_rotary_factor"] = config.rotary_factor
        return json | dict(layer_norm_eps=config.norm_eps, qk_layernorm=config.qk_norm == "shared")
    json |= dict(num_key_value_heads=config.groups, rms_norm_eps=config.norm_eps, **_window(config, family))
    if config.head_dim is not None or family == "gemma2":
        json["head_dim"] = config.dim
    if family in ("llama", "gemma2", "chameleon"):
        json["attention_bias"] = config.qkv_bias and config.o_bias
    if family in ("llama", "chameleon"):
        json["mlp_bias"] = config.mlp_bias
    if family == "chameleon":
        json["swin_norm"] = config.norm_after
    if family == "gemma2":
        json |= dict(
            query_pre_attn_scalar=round(_query_scale(config) ** -2), attn_logit_softcapping=config.attention_softcap or None,
            final_logit_softcapping=config.logit_softcap or None,
        )  # fmt: skip
    return json


def _rope(config: DecoderConfig) -> Json:
    """``rope_parameters``, and the length of contexts where the scaling goes by it."""
    rope: Json = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.mrope:
        rope["mrope_section"] = list(config.mrope)
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_parameters": rope}
    rope |= dict(rope_type=scaling.kind, factor=scaling.factor)
    if scaling.kind in ("linear", "dynamic"):  # of the training: dynamic scaling sets in behind it
        return {"rope_parameters": rope, "max_position_embeddings": scaling.original_length}
    rope["original_max_position_embeddings"] = scaling.original_length
    rope |= _blend(scaling)
    return {"rope_parameters": rope, "max_position_embeddings": int(scaling.factor * scaling.original_length)}


def _blend(scaling: RopeScaling) -> Json:
    """Which angles are stretched, of "llama3" and "yarn"."""
    if scaling.kind == "llama3":
        return dict(low_freq_factor=scaling.low_freq_factor, high_freq_factor=scaling.high_freq_factor)
    given = {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    return dict(beta_fast=scaling.beta_fast, beta_slow=scaling.beta_slow, **given)


def _window(config: DecoderConfig, family: str) -> Json:
    """Sliding windows, which Llama does not have, Mistral in all layers, and Qwen 2 in its last."""
    if family in ("llama", "chameleon"):
        return {}
    json: Json = {"sliding_window": config.window}
    if family == "mistral":
        return json
    windowed = [config.windowed(i) for i in range(config.layers)]
    json["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windowed]
    if family == "qwen2":
        json |= dict(use_sliding_window=config.window is not None, max_window_layers=config.layers - sum(windowed))
    return json


def _qwen(config: DecoderConfig) -> Json:
    """Qwen 1 in its authors' names; its treatment of long contexts, which is not here, is off."""
    return dict(
        vocab_size=config.vocab, hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        kv_channels=config.dim, intermediate_size=2 * config.mlp_width, layer_norm_epsilon=config.norm_eps,
        rotary_emb_base=config.rope_theta, rotary_pct=1.0, no_bias=True, scale_attn_weights=True, use_dynamic_ntk=False,
        use_logn_attn=False, tie_word_embeddings=config.tied,
    )  # fmt: skip


def _normal(config: DecoderConfig) -> DecoderConfig:
    """Of the ways to say the same, one."""
    windowed = [config.windowed(i) for i in range(config.layers)]
    return replace(
        config, kv_heads=config.groups, head_dim=config.dim, query_scale=_query_scale(config),
        window=config.window if any(windowed) else None, window_layers="".join(".w"[w] for w in windowed),
    )  # fmt: skip


def _query_scale(config: DecoderConfig) -> float:
    return config.dim**-0.5 if config.query_scale is None else config.query_scale
