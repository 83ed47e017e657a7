"""Qwen-VL (Bai et al. 2023) in its authors' files: OpenCLIP's ViT-bigG, a resampler with 256 queries, Qwen 7B.

The table of the resampler's sine positions, which is fixed, is neither read nor written.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from vlmops.models.assemblies.qwen_vl import QwenVL
from vlmops.models.config import ConnectorConfig, VisionConfig, VLMConfig
from vlmops.models.formats.base import Format, Json, decoder_rules, parts, tower_rules
from vlmops.models.keymap import Rule, affine, layer
from vlmops.models.language import families as decoders
from vlmops.models.language.to_json import to_json as decoder_json

__all__ = ["FORMAT", "read", "rules", "write"]

PLACES = 16  # patches on a side that the tower's positions are for, whatever the image's size
HEAD = 128  # channels of a head of the resampler
POOL = "transformer.visual.attn_pool."


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours."""
    if "visual" not in json:
        raise ValueError("visual: missing, so this is the language model Qwen alone")
    seen = json["visual"]
    decoder = decoders.from_json(json, "qwen")
    if seen["output_dim"] != decoder.width:
        raise ValueError(f"output_dim: expected {decoder.width} as the language model has, got {seen['output_dim']}")
    patch, queries = seen["patch_size"], seen.get("n_queries", 256)
    vision = VisionConfig(
        seen["width"], seen["layers"], seen["heads"], int(seen["width"] * seen["mlp_ratio"]), patch, image_size=PLACES * patch,
        patch_bias=False, pre_norm=True, post_norm=False,
    )  # fmt: skip
    connector = ConnectorConfig(
        "resampler", vision.width, decoder.width, queries=queries, heads=decoder.width // HEAD,
        image_positions=math.isqrt(queries),
    )  # fmt: skip
    return VLMConfig(
        "qwen_vl", decoder, "qwen", vision, "qwen_vl", connector, image_token=seen.get("image_start_id", 151857) + 2,
        images=dict(mode="fixed", size=seen["image_size"], patch_size=patch, policy="resize"),
    )  # fmt: skip


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``, which their code reads."""
    vision, connector = parts(config, "resampler", "a resampler")
    json = {
        **decoder_json(config.decoder, "qwen"), "architectures": ["QWenLMHeadModel"],
        "visual": {
            "width": vision.width, "layers": vision.layers, "heads": vision.heads, "patch_size": vision.patch_size,
            "mlp_ratio": _ratio(vision), "image_size": config.images.get("size", 448), "output_dim": config.decoder.width,
            "image_start_id": config.image_token - 2, "n_queries": connector.queries,
        },
    }  # fmt: skip
    again = read(json)
    if (again.vision, again.connector) != (replace(vision, head_dim=None), connector):
        raise ValueError(f"family: a qwen_vl checkpoint cannot have all of {vision} and {connector}")
    return json


def _ratio(vision: VisionConfig) -> float:
    """Such that it gives the width of the MLP when it is rounded down."""
    ratio = vision.mlp_width / vision.width
    return ratio if int(vision.width * ratio) == vision.mlp_width else math.nextafter(ratio, math.inf)


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    parts(config, "resampler", "a resampler")
    visual = "transformer.visual."
    return [
        *tower_rules(config, visual),
        Rule("connector.latents", POOL + "query"),
        Rule("connector.kv_proj", POOL + "kv_proj.weight"),
        *layer("connector.q_norm", POOL + "ln_q"),
        *layer("connector.kv_norm", POOL + "ln_kv"),
        Rule("connector.qkv", POOL + "attn.in_proj_weight"),
        Rule("connector.qkv_bias", POOL + "attn.in_proj_bias"),
        *affine(("connector.out", "connector.out_bias"), POOL + "attn.out_proj"),
        *layer("connector.out_norm", visual + "ln_post"),
        Rule("connector.proj", visual + "proj"),
        Rule("", POOL + "pos_embed", "ignore"),
        *decoder_rules(config, "transformer.", "lm_head.weight"),
    ]


FORMAT = Format(("qwen",), QwenVL, read, write, rules)
