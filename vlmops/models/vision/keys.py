"""What a checkpoint calls a tower's tensors.

    rules = prefixed(keys(config, "clip"), theirs="vision_model.")
    load_into(VisionTransformer(config), checkpoint, rules)

The names are those of the files that transformers writes (its modules have others in places), without the prefix a tower has
inside a larger model: "vision_model.", "vision_tower.", "visual.", in older LLaVA files "vision_tower.vision_model.". Those of
EVA-CLIP, CogVLM and Qwen-VL are their authors'.
"""

from __future__ import annotations

from vlmops.models.config import VisionConfig
from vlmops.models.keymap import Rule

__all__ = ["attention_pool_keys", "clip_head_keys", "keys", "siglip_head_keys"]

QKV = ("q", "k", "v")


def keys(config: VisionConfig, family: str) -> list[Rule]:
    """The rules of a tower.

    Args:
        config: of the tower.
        family: "vit", "clip", "siglip", "dinov2", "dinov2_with_registers", "blip2", "eva_clip", "cogvlm", "qwen_vl",
            "qwen2_vl", "qwen2_5_vl" or "pixtral".

    Raises:
        ValueError: another family.
    """
    if family not in MAPS:
        raise ValueError(f"family: expected one of {', '.join(MAPS)}, got {family!r}")
    return MAPS[family](config)


def attention_pool_keys() -> list[Rule]:
    """SigLIP's pooling head (``heads.AttentionPool``), theirs without ``vision_model.head.``."""
    return [
        Rule("probe", "probe", "squeeze:2"),
        Rule("q", "attention.in_proj_weight", "split:0"), Rule("kv", "attention.in_proj_weight", "split:1"),
        Rule("q_bias", "attention.in_proj_bias", "split:0"), Rule("kv_bias", "attention.in_proj_bias", "split:1"),
        Rule("out", "attention.out_proj.weight"), Rule("out_bias", "attention.out_proj.bias"),
        Rule("norm.weight", "layernorm.weight"), Rule("norm.bias", "layernorm.bias"),
        Rule("w1", "mlp.fc1.weight"), Rule("b1", "mlp.fc1.bias"),
        Rule("w2", "mlp.fc2.weight"), Rule("b2", "mlp.fc2.bias"),
    ]  # fmt: skip


def siglip_head_keys() -> list[Rule]:
    """``heads.SiglipHead`` in a whole SigLIP model."""
    pool = [Rule(f"pool.{r.ours}", [f"vision_model.head.{n}" for n in r.theirs], r.how) for r in attention_pool_keys()]
    return [*pool, Rule("logit_scale", "logit_scale"), Rule("logit_bias", "logit_bias")]


def clip_head_keys() -> list[Rule]:
    """``heads.ClipHead`` in a whole CLIP model."""
    return [Rule("weight", "visual_projection.weight"), Rule("logit_scale", "logit_scale")]


def _one(ours: str, theirs: str | list[str], config: VisionConfig, how: str = "") -> Rule:
    """A rule, for every block where the name has ``{i}``."""
    return Rule(ours, theirs, how, range(config.layers) if "{i}" in ours else ())


def _norm(ours: str, theirs: str, config: VisionConfig, wanted: bool = True) -> list[Rule]:
    parts = ("weight", "bias") if config.norm == "layer_norm" else ("weight",)
    return [_one(f"{ours}.{part}", f"{theirs}.{part}", config) for part in parts] if wanted else []


def _linear(ours: str, bias: str, theirs: str | list[str], config: VisionConfig, with_bias: bool) -> list[Rule]:
    """Weight and bias of one linear layer, or of several whose rows stand behind each other."""
    names, how = ([theirs], "") if isinstance(theirs, str) else (theirs, "cat")
    rules = [_one(ours, [f"{name}.weight" for name in names], config, how)]
    return rules + [_one(bias, [f"{name}.bias" for name in names], config, how)] * with_bias


def _attention(config: VisionConfig, qkv: str | list[str], out: str) -> list[Rule]:
    bias = config.attention_bias
    return [
        *_linear("blocks.{i}.qkv", "blocks.{i}.qkv_bias", qkv, config, "qkv" in bias),
        *_linear("blocks.{i}.proj", "blocks.{i}.proj_bias", out, config, "o" in bias),
    ]


def _mlp(config: VisionConfig, up: str, down: str, gate: str = "") -> list[Rule]:
    return [
        *_linear("blocks.{i}.w1", "blocks.{i}.b1", up, config, config.mlp_bias),
        *_linear("blocks.{i}.w2", "blocks.{i}.b2", down, config, config.mlp_bias),
        *(_linear("blocks.{i}.w_gate", "blocks.{i}.b_gate", gate, config, config.mlp_bias) if config.gated else []),
    ]


def _norms(config: VisionConfig, first: str, second: str) -> list[Rule]:
    return [*_norm("blocks.{i}.norm1", first, config), *_norm("blocks.{i}.norm2", second, config)]


def _patch(config: VisionConfig, theirs: str) -> list[Rule]:
    return _linear("patch", "patch_bias", theirs, config, config.patch_bias)


def _clip(config: VisionConfig) -> list[Rule]:
    """CLIP and SigLIP differ in what they have, not in names."""
    block = "encoder.layers.{i}."
    return [
        *_patch(config, "embeddings.patch_embedding"),
        *([Rule("class_token", "embeddings.class_embedding")] if config.class_token else []),
        Rule("position", "embeddings.position_embedding.weight"),
        *_norm("pre_norm", "pre_layrnorm", config, config.pre_norm),
        *_norms(config, block + "layer_norm1", block + "layer_norm2"),
        *_attention(config, [f"{block}self_attn.{x}_proj" for x in QKV], block + "self_attn.out_proj"),
        *_mlp(config, block + "mlp.fc1", block + "mlp.fc2"),
        *_norm("post_norm", "post_layernorm", config, config.post_norm),
        Rule(
            "", ["embeddings.position_ids", *(f"head.{n}" for r in attention_pool_keys() for n in r.theirs)], "ignore"
        ),
    ]


def _vit(config: VisionConfig) -> list[Rule]:
    block = "encoder.layer.{i}."
    return [
        *_tokens(config),
        *_norms(config, block + "layernorm_before", block + "layernorm_after"),
        *_bert_attention(config),
        *_mlp(config, block + "intermediate.dense", block + "output.dense"),
        *_norm("post_norm", "layernorm", config),
        Rule("", ["embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"], "ignore"),
    ]


def _dinov2(config: VisionConfig) -> list[Rule]:
    block, layers = "encoder.layer.{i}.", range(config.layers)
    if config.gated:  # one tensor, the gate's rows first
        mlp = [
            Rule(f"blocks.{{i}}.{ours}", f"{block}mlp.weights_in.{kind}", f"split:{k}", layers)
            for kind, names in (("weight", ("w_gate", "w1")), ("bias", ("b_gate", "b1")))
            for k, ours in enumerate(names)
        ] + _linear("blocks.{i}.w2", "blocks.{i}.b2", block + "mlp.weights_out", config, True)
    else:
        mlp = _mlp(config, block + "mlp.fc1", block + "mlp.fc2")
    return [
        *_tokens(config),
        *([Rule("registers", "embeddings.register_tokens", "squeeze:1")] if config.registers else []),
        *_norms(config, block + "norm1", block + "norm2"),
        *_bert_attention(config),
        Rule("blocks.{i}.scale1", block + "layer_scale1.lambda1", layers=layers),
        Rule("blocks.{i}.scale2", block + "layer_scale2.lambda1", layers=layers),
        *mlp,
        *_norm("post_norm", "layernorm", config),
        Rule("", "embeddings.mask_token", "ignore"),
    ]


def _tokens(config: VisionConfig) -> list[Rule]:
    """Patches, class token and positions as ViT and DINOv2 have them."""
    return [
        *_patch(config, "embeddings.patch_embeddings.projection"),
        Rule("class_token", "embeddings.cls_token", "squeeze:2"),
        Rule("position", "embeddings.position_embeddings", "squeeze:1"),
    ]


def _bert_attention(config: VisionConfig) -> list[Rule]:
    """BERT's names, which ViT and DINOv2 took over."""
    block = "encoder.layer.{i}.attention."
    names = [f"{block}attention.{x}" for x in ("query", "key", "value")]
    return _attention(config, names, block + "output.dense")


def _blip2(config: VisionConfig) -> list[Rule]:
    block = "encoder.layers.{i}."
    return [
        *_patch(config, "embeddings.patch_embedding"),
        Rule("class_token", "embeddings.class_embedding", "squeeze:2"),
        Rule("position", "embeddings.position_embedding", "squeeze:1"),
        *_norms(config, block + "layer_norm1", block + "layer_norm2"),
        *_attention(config, block + "self_attn.qkv", block + "self_attn.projection"),
        *_mlp(config, block + "mlp.fc1", block + "mlp.fc2"),
        *_norm("post_norm", "post_layernorm", config),
    ]


def _eva_clip(config: VisionConfig) -> list[Rule]:
    block, layers = "blocks.{i}.", range(config.layers)
    fused = not config.sub_norm  # towers with inner norms keep three projections
    mlp = ("mlp.w2", "mlp.w3", "mlp.w1") if config.gated else ("mlp.fc1", "mlp.fc2", "")
    rotary = [f"{where}rope.freqs_{x}" for where in ("", block + "attn.") for x in ("cos", "sin")]
    qkv: str | list[str] = block + "attn.qkv" if fused else [f"{block}attn.{x}_proj" for x in QKV]
    return [
        *_patch(config, "patch_embed.proj"),
        Rule("class_token", "cls_token", "squeeze:2"),
        Rule("position", "pos_embed", "squeeze:1"),
        *_norms(config, block + "norm1", block + "norm2"),
        *_attention(config, qkv, block + "attn.proj"),
        Rule("blocks.{i}.q_bias", block + "attn.q_bias", layers=layers),
        Rule("blocks.{i}.v_bias", block + "attn.v_bias", layers=layers),
        *_norm("blocks.{i}.inner_norm", block + "attn.inner_attn_ln", config, config.sub_norm),
        *_norm("blocks.{i}.mid_norm", block + "mlp.ffn_ln", config, config.sub_norm),
        *_mlp(config, block + mlp[0], block + mlp[1], block + mlp[2]),
        *_norm("post_norm", "norm", config),
        Rule("", rotary, "ignore", layers),
        Rule("", ["head.weight", "head.bias"], "ignore"),
    ]


def _cogvlm(config: VisionConfig) -> list[Rule]:
    block = "transformer.layers.{i}."
    return [
        *_patch(config, "patch_embedding.proj"),
        Rule("class_token", "patch_embedding.cls_embedding", "squeeze:1"),
        Rule("position", "patch_embedding.position_embedding.weight"),
        *_norms(config, block + "input_layernorm", block + "post_attention_layernorm"),
        *_attention(config, block + "attention.query_key_value", block + "attention.dense"),
        *_mlp(config, block + "mlp.fc1", block + "mlp.fc2"),
    ]


def _qwen_vl(config: VisionConfig) -> list[Rule]:
    """Qwen-VL's tower, an OpenCLIP ViT-bigG; its ``attn_pool`` is the connector's, ``ln_post`` and ``proj`` stand behind that."""
    block = "transformer.resblocks.{i}."
    heads, layers = f"heads:{config.heads}", range(config.layers)
    return [
        *_patch(config, "conv1"),
        Rule("position", "positional_embedding"),
        *_norm("pre_norm", "ln_pre", config),
        *_norms(config, block + "ln_1", block + "ln_2"),
        Rule("blocks.{i}.qkv", block + "attn.in_proj.weight", heads, layers),
        Rule("blocks.{i}.qkv_bias", block + "attn.in_proj.bias", heads, layers),
        *_linear("blocks.{i}.proj", "blocks.{i}.proj_bias", block + "attn.out_proj", config, True),
        *_mlp(config, block + "mlp.c_fc", block + "mlp.c_proj"),
    ]


def _qwen(config: VisionConfig) -> list[Rule]:
    """Qwen2-VL and Qwen2.5-VL; their merger is the connector's."""
    block = "blocks.{i}."
    mlp = ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj") if config.gated else ("mlp.fc1", "mlp.fc2", "")
    return [
        *_patch(config, "patch_embed.proj"),
        *_norms(config, block + "norm1", block + "norm2"),
        *_attention(config, block + "attn.qkv", block + "attn.proj"),
        *_mlp(config, block + mlp[0], block + mlp[1], block + mlp[2]),
    ]


def _pixtral(config: VisionConfig) -> list[Rule]:
    block = "transformer.layers.{i}."
    return [
        *_patch(config, "patch_conv"),
        *_norm("pre_norm", "ln_pre", config),
        *_norms(config, block + "attention_norm", block + "ffn_norm"),
        *_attention(config, [f"{block}attention.{x}_proj" for x in QKV], block + "attention.o_proj"),
        *_mlp(config, *(f"{block}feed_forward.{x}_proj" for x in ("up", "down", "gate"))),
    ]


MAPS = {
    "vit": _vit, "clip": _clip, "siglip": _clip, "dinov2": _dinov2, "dinov2_with_registers": _dinov2, "blip2": _blip2,
    "eva_clip": _eva_clip, "cogvlm": _cogvlm, "qwen_vl": _qwen_vl, "qwen2_vl": _qwen, "qwen2_5_vl": _qwen, "pixtral": _pixtral,
}  # fmt: skip
