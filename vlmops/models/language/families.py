"""The families of decoders: how ``config.json`` describes each, and what its checkpoint calls the tensors.

    config = from_json(json.load(open("config.json")))
    load_into(Decoder(config), checkpoint, keys(config, "llama"))

Qwen 1's files (``transformer.h.0.attn.c_attn``) are read too, for contexts of at most its ``seq_length``: what it does to longer
ones (``use_dynamic_ntk``, ``use_logn_attn``) is not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlmops.models import activations
from vlmops.models.config import DecoderConfig, RopeScaling
from vlmops.models.keymap import Rule, affine, layer

__all__ = ["FAMILIES", "MODEL_TYPES", "from_json", "keys"]

Json = Mapping[str, Any]

#: transformers' ``model_type`` -> family. Llama's covers Vicuna and Llama 3; Qwen 2's covers 1.5, 2.5 and the text of Qwen2-VL.
MODEL_TYPES = {
    "llama": "llama", "mistral": "mistral", "qwen": "qwen", "qwen2": "qwen2", "qwen2_vl": "qwen2", "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2", "qwen2_5_vl_text": "qwen2", "gemma2": "gemma2", "opt": "opt", "persimmon": "persimmon",
    "chameleon": "chameleon",
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen", "qwen2", "gemma2", "opt", "persimmon", "chameleon")
#: transformers' name of a value -> ours.
NAMES = {
    "vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "intermediate_size": "mlp_width", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied", "mlp_bias": "mlp_bias",
}  # fmt: skip
#: Families whose files may ask for biases everywhere in the attention, and in the MLP.
BIASES = {"attention_bias": ("llama", "gemma2", "chameleon"), "mlp_bias": ("llama", "chameleon")}
#: What transformers takes where a file leaves something out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008),
    "mistral": dict(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, sliding_window=4096, max_position_embeddings=131072,
    ),
    "qwen2": dict(
        vocab_size=151936, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=22016,
        max_position_embeddings=32768, sliding_window=4096, max_window_layers=28,
    ),
    "gemma2": dict(
        vocab_size=256000, hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
        intermediate_size=9216, hidden_activation="gelu_pytorch_tanh", max_position_embeddings=8192, tie_word_embeddings=True,
        query_pre_attn_scalar=256, sliding_window=4096, final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
    ),
    "opt": dict(
        vocab_size=50272, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072,
        activation_function="relu", enable_bias=True, tie_word_embeddings=True,
    ),
    "persimmon": dict(
        vocab_size=262144, hidden_size=4096, num_hidden_layers=36, num_attention_heads=64, intermediate_size=16384,
        hidden_act="relu2", layer_norm_eps=1e-5, qk_layernorm=True, partial_rotary_factor=0.5, max_position_embeddings=16384,
    ),
    "chameleon": dict(
        vocab_size=65536, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008,
        rms_norm_eps=1e-5, max_position_embeddings=4096, swin_norm=False,
    ),
}  # fmt: skip
QWEN2_VL = dict(
    vocab_size=152064, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    intermediate_size=29568, max_window_layers=80, rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip


def from_json(json: Json, family: str | None = None) -> DecoderConfig:
    """A ``config.json`` (its text part, in a VLM's) as ours; what the file leaves out has transformers' default.

    Args:
        json: the file's values, of transformers 4 or 5.
        family: of ``FAMILIES``; None: by the file's ``model_type``.

    Raises:
        ValueError: a family or model type that is not known, or an option the decoder does not have.
    """
    kind = json.get("model_type", "")
    if family is None:
        if kind not in MODEL_TYPES:
            raise ValueError(f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {kind!r}")
        family = MODEL_TYPES[kind]
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if family == "qwen":
        return _qwen(json)
    nothing = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")  # null says that there is none
    given = {name: value for name, value in json.items() if value is not None or name in nothing}
    base = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048, **DEFAULTS[family]}
    json = {**base, **(QWEN2_VL if "vl" in kind else {}), **given}
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if json.get(name) and family not in BIASES.get(name, ()):
            raise ValueError(f"{name}: family {family} has none, got {json[name]!r}")
    values: dict[str, Any] = {ours: json[theirs] for theirs, ours in NAMES.items() if theirs in json}
    activation = json.get("hidden_activation") or json.get("hidden_act") or json.get("activation_function") or "silu"
    values |= dict(activation=activations.ours(activation))
    if json.get("attention_bias"):
        values |= dict(qkv_bias=True, o_bias=True)
    if family == "opt":
        return DecoderConfig(**{**values, **_opt(json)})
    values["rope_theta"], values["rope_scaling"], values["mrope"] = _rope(json, family)
    values |= _window(json, family, values["layers"])
    if family == "qwen2":
        values |= dict(qkv_bias=True)
    if family == "gemma2":
        values |= dict(
            norm_offset=1.0, sandwich=True, embed_scale=values["width"] ** 0.5,
            query_scale=json["query_pre_attn_scalar"] ** -0.5,
            attention_softcap=json["attn_logit_softcapping"] or 0.0, logit_softcap=json["final_logit_softcapping"] or 0.0,
        )  # fmt: skip
    if family == "persimmon":
        values |= _persimmon(json)
    if family == "chameleon":
        values |= dict(qk_norm="heads", norm_after=bool(json["swin_norm"]))
    return DecoderConfig(**values)


def _opt(json: Json) -> dict[str, Any]:
    """What OPT (Zhang et al. 2022) names differently or has fixed."""
    if json.get("do_layer_norm_before") is False or json.get("_remove_final_layer_norm"):
        raise ValueError(
            "do_layer_norm_before: expected norms in front of attention and MLP and a last one (not opt-350m's)"
        )
    if json.get("word_embed_proj_dim") not in (None, json["hidden_size"]):
        raise ValueError(
            f"word_embed_proj_dim: expected hidden_size {json['hidden_size']} (opt-350m's projections are not here), "
            f"got {json['word_embed_proj_dim']}"
        )
    if json.get("layer_norm_elementwise_affine") is False:
        raise ValueError("layer_norm_elementwise_affine: expected norms with weights (not Galactica's)")
    bias = bool(json["enable_bias"])
    return dict(
        mlp_width=json["ffn_dim"], norm="layer_norm", norm_eps=1e-5, gated=False, qkv_bias=bias, o_bias=bias, mlp_bias=bias,
        learned_positions=json["max_position_embeddings"], position_offset=2,
    )  # fmt: skip


def _persimmon(json: Json) -> dict[str, Any]:
    """What Persimmon (Elsen et al. 2023) names differently or has fixed."""
    eps = json["layer_norm_eps"]
    rope = json.get("rope_parameters") or {}
    return dict(
        norm="layer_norm", norm_eps=eps, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, kv_heads=None,
        qk_norm="shared" if json["qk_layernorm"] else "", qk_norm_eps=eps,
        rotary_factor=rope.get("partial_rotary_factor", json["partial_rotary_factor"]),
    )  # fmt: skip


def _rope(json: Json, family: str) -> tuple[float, RopeScaling | None, tuple[int, ...]]:
    """Base, scaling and M-RoPE sections, out of ``rope_parameters`` (transformers 5) or ``rope_scaling`` (4)."""
    has = json.get("rope_parameters") or json.get("rope_scaling") or {}
    theta = float(has.get("rope_theta") or json.get("rope_theta") or 10000.0)
    mrope = tuple(has.get("mrope_section") or ())
    kind = has.get("rope_type") or has.get("type") or "default"
    if family != "persimmon" and has.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor: expected 1, got {has['partial_rotary_factor']}")
    if kind in ("default", "mrope"):
        return theta, None, mrope
    factor, length = float(has["factor"]), json["max_position_embeddings"]
    if kind in ("linear", "dynamic"):
        return theta, RopeScaling(kind, factor, original_length=length), mrope
    length = has.get("original_max_position_embeddings") or length
    if kind == "llama3":
        low, high = float(has["low_freq_factor"]), float(has["high_freq_factor"])
        return theta, RopeScaling(kind, factor, low, high, length), mrope
    if kind != "yarn" or has.get("truncate") is False:
        raise ValueError(f"rope_type: expected default, mrope, linear, dynamic, llama3 or yarn, got {has}")
    attention, scale, scale_all = (has.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None and scale and scale_all:
        attention = (
            (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1) if factor > 1 else 1.0
        )
    fast, slow = float(has.get("beta_fast") or 32), float(has.get("beta_slow") or 1)
    scaling = RopeScaling(
        kind, factor, original_length=length, beta_fast=fast, beta_slow=slow, attention_factor=attention
    )
    return theta, scaling, mrope


def _window(json: Json, family: str, layers: int) -> dict[str, Any]:
    """``window`` and ``window_layers``."""
    window = json.get("sliding_window")
    if window is None or family == "llama" or (family == "qwen2" and not json.get("use_sliding_window")):
        return {}
    if family == "mistral":
        return dict(window=window, window_layers="all")
    start = json.get("max_window_layers", 0)
    default = [i >= start if family == "qwen2" else i % 2 == 0 for i in range(layers)]
    given = [name == "sliding_attention" for name in json.get("layer_types") or ()] or default
    return dict(window=window, window_layers=_pattern(given))


def _pattern(windowed: Sequence[bool]) -> str:
    """``window_layers`` of which layers have a window."""
    first = windowed.index(True) if True in windowed else len(windowed)
    if first == len(windowed):
        return "none"
    if all(windowed[first:]):
        return f"from:{first}" if first else "all"
    if all(w == (i % 2 == 0) for i, w in enumerate(windowed)):
        return "even"
    raise ValueError(f"layer_types: expected windows in all, the even, or the last layers, got {list(windowed)}")


def _qwen(json: Json) -> DecoderConfig:
    """Qwen 1 (Bai et al. 2023), whose files have names of their own; the defaults are those of Qwen-7B."""
    return DecoderConfig(
        vocab=json.get("vocab_size", 151936), width=json.get("hidden_size", 4096), layers=json.get("num_hidden_layers", 32),
        heads=json.get("num_attention_heads", 32), head_dim=json.get("kv_channels", 128),
        mlp_width=json.get("intermediate_size", 22016) // 2, norm_eps=json.get("layer_norm_epsilon", 1e-6),
        rope_theta=float(json.get("rotary_emb_base", 10000)), qkv_bias=True, tied=json.get("tie_word_embeddings", False),
    )  # fmt: skip


def keys(config: DecoderConfig, family: str, *, base: str | None = None, head: str = "lm_head.weight") -> list[Rule]:
    """The rules of a decoder.

    Args:
        config: of the decoder.
        family: of ``FAMILIES``.
        base: their prefix of everything but the output projection: "model." (Qwen 1: "transformer.", OPT: "model.decoder."),
            another in a VLM.
        head: their name of the output projection.

    Raises:
        ValueError: another family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    base = BASES.get(family, "model.") if base is None else base
    rules = KEYS.get(family, _llama_keys)(config, base)
    rules = [Rule(r.ours, r.theirs, r.how, range(config.layers) if "{i}" in r.theirs[0] else ()) for r in rules]
    # Files of a tied model may hold the embedding a second time.
    return [*rules, Rule("", head, "ignore") if config.tied else Rule("head", head)]


def _llama_keys(config: DecoderConfig, base: str) -> list[Rule]:
    block = base + "layers.{i}."
    inner, outer = config.heads * config.dim, config.groups * config.dim
    cat, qkv = f"cat:{inner},{outer},{outer}", [f"{block}self_attn.{x}_proj" for x in "qkv"]
    norms = ("norm1", "post_norm1", "norm2", "post_norm2") if config.sandwich else ("norm1", "norm2")
    norms = ("post_norm1", "post_norm2") if config.norm_after else norms
    theirs = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    attention, mlp = block + "self_attn.", block + "mlp."
    return [
        Rule("embedding", base + "embed_tokens.weight"),
        *(
            Rule(f"blocks.{{i}}.{a}.weight", f"{block}{b}_layernorm.weight")
            for a, b in zip(norms, theirs, strict=False)
        ),
        Rule("blocks.{i}.qkv", [f"{name}.weight" for name in qkv], cat),
        *([Rule("blocks.{i}.qkv_bias", [f"{name}.bias" for name in qkv], cat)] if config.qkv_bias else []),
        *affine(("blocks.{i}.o", "blocks.{i}.o_bias"), attention + "o_proj", config.o_bias),
        *(r for x in ("gate", "up", "down") for r in _mlp(x, f"{mlp}{x}_proj", config.mlp_bias)),
        *(r for x in "qk" * bool(config.qk_norm) for r in layer(f"blocks.{{i}}.{x}_norm", f"{attention}{x}_norm")),
        Rule("norm.weight", base + "norm.weight"),
        Rule("", block + "self_attn.rotary_emb.inv_freq", "ignore"),  # in files of early Llamas
    ]


def _mlp(ours: str, theirs: str, has_bias: bool) -> list[Rule]:
    return affine((f"blocks.{{i}}.w_{ours}", f"blocks.{{i}}.b_{ours}"), theirs, has_bias)


def _opt_keys(config: DecoderConfig, base: str) -> list[Rule]:
    block, bias = base + "layers.{i}.", config.qkv_bias
    qkv = [f"{block}self_attn.{x}_proj" for x in "qkv"]
    return [
        Rule("embedding", base + "embed_tokens.weight"),
        Rule("position_embedding", base + "embed_positions.weight"),
        *layer("blocks.{i}.norm1", block + "self_attn_layer_norm"),
        Rule("blocks.{i}.qkv", [f"{name}.weight" for name in qkv], "cat"),
        *([Rule("blocks.{i}.qkv_bias", [f"{name}.bias" for name in qkv], "cat")] if bias else []),
        *affine(("blocks.{i}.o", "blocks.{i}.o_bias"), block + "self_attn.out_proj", bias),
        *layer("blocks.{i}.norm2", block + "final_layer_norm"),
        *_mlp("up", block + "fc1", bias),
        *_mlp("down", block + "fc2", bias),
        *layer("norm", base + "final_layer_norm"),
    ]


def _persimmon_keys(config: DecoderConfig, base: str) -> list[Rule]:
    block, attention = base + "layers.{i}.", base + "layers.{i}.self_attn."
    return [
        Rule("embedding", base + "embed_tokens.weight"),
        *layer("blocks.{i}.norm1", block + "input_layernorm"),
        *affine(("blocks.{i}.qkv", "blocks.{i}.qkv_bias"), attention + "query_key_value", how=f"heads:{config.heads}"),
        *(r for x in "qk" * bool(config.qk_norm) for r in layer(f"blocks.{{i}}.{x}_norm", f"{attention}{x}_layernorm")),
        *affine(("blocks.{i}.o", "blocks.{i}.o_bias"), attention + "dense"),
        *layer("blocks.{i}.norm2", block + "post_attention_layernorm"),
        *_mlp("up", block + "mlp.dense_h_to_4h", True),
        *_mlp("down", block + "mlp.dense_4h_to_h", True),
        *layer("norm", base + "final_layernorm"),
        Rule("", attention + "rotary_emb.inv_freq", "ignore"),  # in early files
    ]


def _qwen_keys(config: DecoderConfig, base: str) -> list[Rule]:
    block = base + "h.{i}."
    return [
        Rule("embedding", base + "wte.weight"),
        Rule("blocks.{i}.norm1.weight", block + "ln_1.weight"),
        Rule("blocks.{i}.qkv", block + "attn.c_attn.weight"),
        Rule("blocks.{i}.qkv_bias", block + "attn.c_attn.bias"),
        Rule("blocks.{i}.o", block + "attn.c_proj.weight"),
        Rule("blocks.{i}.norm2.weight", block + "ln_2.weight"),
        Rule("blocks.{i}.w_up", block + "mlp.w1.weight"),
        Rule("blocks.{i}.w_gate", block + "mlp.w2.weight"),
        Rule("blocks.{i}.w_down", block + "mlp.c_proj.weight"),
        Rule("norm.weight", base + "ln_f.weight"),
        Rule("", base + "rotary_emb.inv_freq", "ignore"),
    ]


#: Whose keys are not Llama's, and whose prefix is not "model.".
KEYS = {"qwen": _qwen_keys, "opt": _opt_keys, "persimmon": _persimmon_keys}
BASES = {"qwen": "transformer.", "opt": "model.decoder."}
