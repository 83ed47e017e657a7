"""Chameleon (Chameleon team 2024): images as tokens of the vocabulary, by an image tokenizer that the checkpoint brings along."""

from __future__ import annotations

from typing import Any

from vlmops.models.assemblies.native import ChameleonVLM
from vlmops.models.config import VLMConfig, VqConfig
from vlmops.models.formats.base import Format, Json, decoder_rules
from vlmops.models.keymap import Rule, affine, layer, prefixed
from vlmops.models.language import families as decoders
from vlmops.models.language.to_json import to_json as decoder_json

__all__ = ["FORMAT", "image_options", "read", "rules", "write"]

#: transformers' name of a value of ``vq_config`` -> ours.
NAMES = {
    "num_embeddings": "codes", "embed_dim": "code_width", "latent_channels": "latent", "base_channels": "base",
    "num_res_blocks": "blocks", "resolution": "image_size",
}  # fmt: skip
FIXED = {"attn_type": "vanilla", "attn_resolutions": None, "double_latent": False, "in_channels": 3}
#: Bytes become x * 0.0078 - 1, which is what a processor of Chameleon does.
ONE = 1 / (255 * 0.0078)
#: A code's token is called so: its digits as letters, A for 0.
CODE, END = "IMGIMG", "Z"


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours."""
    decoder = decoders.from_json(json)
    sizes = json.get("vq_config") or {}
    for name, only in FIXED.items():
        if sizes.get(name, only) != only:
            raise ValueError(f"vq_config: expected {name} {only!r}, got {sizes[name]!r}")
    given = {ours: sizes[theirs] for theirs, ours in NAMES.items() if theirs in sizes}
    vq = VqConfig(**given, multipliers=tuple(sizes.get("channel_multiplier", VqConfig.multipliers)))
    names = json.get("vocabulary_map") or {}
    if "<image>" not in names:
        raise ValueError('vocabulary_map: expected the tokens of image codes and "<image>"')
    tokens = {code_of(name): token for name, token in names.items() if name.startswith(CODE)}
    if sorted(tokens) != list(range(vq.codes)):
        raise ValueError(f"vocabulary_map: expected a token for each of {vq.codes} image codes, got {len(tokens)}")
    return VLMConfig(
        family="chameleon", decoder=decoder, decoder_family="chameleon", image_token=names["<image>"], vq=vq,
        codes=tuple(tokens[code] for code in range(vq.codes)), images=image_options(vq),
    )  # fmt: skip


def image_options(vq: VqConfig) -> dict[str, Any]:
    """How its processor prepares an image."""
    return dict(
        mode="fixed", size=vq.image_size, patch_size=vq.reduction, policy="crop", resample="lanczos", mean=(ONE,) * 3,
        std=(ONE,) * 3,
    )  # fmt: skip


def code_of(name: str) -> int:
    """ "IMGIMGBCZ" -> 12; -1 for a name of another kind."""
    letters = name[len(CODE) : -len(END)]
    if not name.endswith(END) or not letters or not set(letters) <= set("ABCDEFGHIJ"):
        return -1
    return int("".join(str(ord(letter) - ord("A")) for letter in letters))


def name_of(code: int) -> str:
    """12 -> "IMGIMGBCZ"."""
    return CODE + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + END


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``; of the vocabulary's names those that the model itself asks for."""
    vq = tokenizer(config)
    tokens = {name_of(code): token for code, token in enumerate(config.codes)}
    return {
        **decoder_json(config.decoder, "chameleon"), "architectures": ["ChameleonForConditionalGeneration"],
        "vocabulary_map": {"<image>": config.image_token, **tokens},
        "vq_config": {
            **FIXED, **{theirs: getattr(vq, ours) for theirs, ours in NAMES.items()}, "channel_multiplier": list(vq.multipliers),
        },
    }  # fmt: skip


def tokenizer(config: VLMConfig) -> VqConfig:
    """Of images; ValueError where the family cannot have what the config asks for."""
    if config.vq is None or config.vision is not None or config.connector is not None:
        raise ValueError("vq: expected an image tokenizer in place of tower and connector in a chameleon checkpoint")
    if config.vq.groups != 32:
        raise ValueError(f"groups: expected 32 in a chameleon checkpoint, got {config.vq.groups}")
    return config.vq


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    vq = tokenizer(config)
    return [
        *prefixed(vq_rules(vq), ours="tower.", theirs="model.vqmodel."),
        *decoder_rules(config, "model.", "lm_head.weight"),
    ]


def vq_rules(vq: VqConfig) -> list[Rule]:
    """Of the image tokenizer."""
    levels, multipliers = range(len(vq.multipliers)), (1, *vq.multipliers)
    found = [*_same("conv_in"), *_same("norm_out"), *_same("conv_out"), Rule("codebook", "quantize.embedding.weight")]
    for i in levels:
        for j in range(vq.blocks):
            wider = j == 0 and multipliers[i] != multipliers[i + 1]
            found += _residual(f"levels.{i}.{j}", f"encoder.down.{i}.block.{j}", wider)
    for i in levels[:-1]:
        found += layer(f"down.{i}", f"encoder.down.{i}.downsample.conv")
    for k, name in ((0, "mid.block_1"), (2, "mid.block_2")):
        found += _residual(f"middle.{k}", f"encoder.{name}", False)
    attention = "encoder.mid.attn_1."
    for ours, theirs in (
        ("middle.1.norm", attention + "norm"),
        ("to_code", "quant_conv"),
        ("from_code", "post_quant_conv"),
    ):
        found += layer(ours, theirs)
    for ours, kind in (("middle.1.qkv", "weight"), ("middle.1.qkv_bias", "bias")):
        found.append(Rule(ours, [f"{attention}{x}.{kind}" for x in "qkv"], "cat"))
    return [*found, *affine(("middle.1.out", "middle.1.out_bias"), attention + "proj_out")]


def _same(name: str) -> list[Rule]:
    return layer(name, f"encoder.{name}")


def _residual(ours: str, theirs: str, wider: bool) -> list[Rule]:
    parts = ("norm1", "conv1", "norm2", "conv2")
    shortcut = layer(f"{ours}.shortcut", f"{theirs}.nin_shortcut") if wider else []
    return [*(rule for part in parts for rule in layer(f"{ours}.{part}", f"{theirs}.{part}")), *shortcut]


FORMAT = Format(("chameleon",), ChameleonVLM, read, write, rules)
