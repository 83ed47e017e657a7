"""How each architecture is put together, whatever the size of its decoder: what ``presets.py`` names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmops.images.modes import PINPOINTS
from vlmops.models.config import ConnectorConfig, CrossConfig, DecoderConfig, VisionConfig, VLMConfig, VqConfig
from vlmops.models.formats import chameleon as chameleon_format
from vlmops.models.formats import cogvlm2 as cogvlm2_format
from vlmops.models.formats import flamingo as flamingo_format
from vlmops.models.formats import fuyu as fuyu_format
from vlmops.models.formats import llava as llava_format
from vlmops.models.formats import qwen2_vl as qwen2_vl_format
from vlmops.models.language.sizes import SIZES as DECODERS
from vlmops.models.vision.sizes import SIZES as TOWERS

__all__ = [
    "blip2",
    "chameleon",
    "cogvlm2",
    "flamingo_3b",
    "fuyu",
    "idefics",
    "llava",
    "llava_next",
    "paligemma",
    "pixtral",
    "qwen1_vl",
    "qwen_vl",
]


def _tower(name: str) -> tuple[VisionConfig, str]:
    family, config = TOWERS[name]
    return config, family


def llava(decoder: DecoderConfig, decoder_family: str = "llama", vocab: int = 32064, **more: Any) -> VLMConfig:
    """LLaVA 1.5 (Liu et al. 2023): CLIP L/14-336, two layers, a vocabulary filled up to a multiple of 64."""
    vision, family = _tower("clip-l14-336")
    values: dict[str, Any] = dict(
        family="llava", image_token=32000, layer=-2, end_tokens=(2,), pad_token=32001,
        images=llava_format.image_options(vision),
    )  # fmt: skip
    return VLMConfig(
        decoder=replace(decoder, vocab=vocab), decoder_family=decoder_family, vision=vision, vision_family=family,
        connector=ConnectorConfig("mlp", vision.width, decoder.width), **{**values, **more},
    )  # fmt: skip


def llava_next(decoder: DecoderConfig, decoder_family: str = "llama", vocab: int = 32064, **more: Any) -> VLMConfig:
    """LLaVA-NeXT (Liu et al. 2024)."""
    images = dict(mode="anyres", size=336, patch_size=14, pinpoints=PINPOINTS)
    return llava(
        decoder, decoder_family, vocab, family="llava_next", newline=True, pinpoints=PINPOINTS, images=images, **more
    )


def qwen_vl(version: str, decoder: DecoderConfig, vision: VisionConfig, **more: Any) -> VLMConfig:
    """Qwen2-VL (Wang et al. 2024) and Qwen2.5-VL (Bai et al. 2025)."""
    return VLMConfig(
        version, replace(decoder, mrope=(16, 24, 24), norm_eps=1e-6), "qwen2", vision, version,
        ConnectorConfig("merger", vision.width, decoder.width, norm=vision.norm), image_token=151655, video_token=151656,
        end_tokens=(151645, 151643), pad_token=151643, images=qwen2_vl_format.image_options(vision), **more,
    )  # fmt: skip


def pixtral(decoder: DecoderConfig, vision: VisionConfig, bias: bool) -> VLMConfig:
    """Pixtral (Agrawal et al. 2024)."""
    return VLMConfig(
        "llava", decoder, "mistral", vision, "pixtral", ConnectorConfig("mlp", vision.width, decoder.width, bias=bias),
        image_token=10, layer=-1, end_tokens=(2,), pad_token=11,
        images=llava_format.image_options(vision),
    )  # fmt: skip


def paligemma(decoder: DecoderConfig) -> VLMConfig:
    """PaliGemma 2 (Steiner et al. 2024) at 224 pixels."""
    vision, family = _tower("siglip-so400m-224")
    return VLMConfig(
        "paligemma", replace(decoder, vocab=257216), "gemma2", vision, family,
        ConnectorConfig("linear", vision.width, decoder.width), image_token=257152, end_tokens=(1,),
        images=llava_format.image_options(vision),
    )  # fmt: skip


def blip2(decoder: DecoderConfig) -> VLMConfig:
    """BLIP-2 (Li et al. 2023) with OPT; the vocabulary has an image token since 2024."""
    vision, family = _tower("eva01-g-blip2")
    connector = ConnectorConfig(
        "qformer", vision.width, decoder.width, hidden=3072, norm_eps=1e-12, queries=32, layers=12, heads=12, width=768
    )
    return VLMConfig(
        "blip2", replace(decoder, vocab=50304), "opt", vision, family, connector, image_token=50265, class_token=True,
        end_tokens=(50118,), pad_token=1, images=dict(mode="fixed", size=224, patch_size=14, policy="resize"),
    )  # fmt: skip


def idefics() -> VLMConfig:
    """Idefics 9B (Laurencon et al. 2023), an open Flamingo: OpenCLIP H/14, Llama 7B with two more tokens."""
    vision = replace(_tower("clip-l14")[0], width=1280, layers=32, mlp_width=5120, activation="gelu")
    decoder = replace(DECODERS["vicuna-7b"], vocab=32002, norm_eps=1e-6)
    connector = ConnectorConfig(
        "perceiver",
        1280,
        1280,
        activation="relu",
        norm_eps=1e-5,
        queries=64,
        layers=6,
        heads=16,
        head_dim=96,
        qk_norm=True,
    )
    cross = CrossConfig(4096, 1280, 32, 128, 11008, 4, "silu", gated=True, norm="rms_norm", norm_eps=1e-6, qk_norm=True)
    return VLMConfig(
        "idefics", decoder, "llama", vision, "clip", connector, image_token=32001, layer=-1, class_token=True, cross=cross,
        added_tokens=2, end_tokens=(2,), images=dict(mode="fixed", size=224, patch_size=14, policy="resize"),
    )  # fmt: skip


def flamingo_3b() -> VLMConfig:
    """OpenFlamingo 3B (Awadalla et al. 2023): CLIP L/14, and cross-attention in front of every block of a decoder of 1.3B."""
    vision, family = _tower("clip-l14")
    decoder = replace(DECODERS["opt-2.7b"], width=2048, layers=24, heads=32, mlp_width=8192)
    return VLMConfig(
        "flamingo", decoder, "opt", vision, family, flamingo_format.perceiver(vision.width), image_token=50266, layer=-1,
        cross=flamingo_format.gated_cross(decoder.width, vision.width, 1), end_tokens=(2,), pad_token=1,
        images=dict(mode="fixed", size=224, patch_size=14, policy="crop"),
    )  # fmt: skip


def cogvlm2(decoder: DecoderConfig) -> VLMConfig:
    """CogVLM2 (Hong et al. 2024)."""
    vision, family = _tower("eva02-e-cogvlm2")
    return VLMConfig(
        "cogvlm2", decoder, "llama", vision, family, cogvlm2_format.adapter(vision, decoder), image_token=128002,
        end_tokens=(128001, 128009), pad_token=128002,
        images=dict(mode="fixed", size=1344, patch_size=14, policy="resize"),
    )  # fmt: skip


def fuyu(decoder: DecoderConfig) -> VLMConfig:
    """Fuyu (Bavishi et al. 2023): patches of 30 x 30 pixels straight into the decoder."""
    return VLMConfig(
        "fuyu", decoder, "persimmon", connector=ConnectorConfig("linear", 30 * 30 * 3, decoder.width), image_token=71011,
        end_tokens=(71013,), images={**fuyu_format.IMAGES, "patch_size": 30},
    )  # fmt: skip


def chameleon(decoder: DecoderConfig) -> VLMConfig:
    """Chameleon (Chameleon team 2024): 8192 words for 512 x 512 pixels as 32 x 32 codes."""
    vq = VqConfig()
    return VLMConfig(
        "chameleon", decoder, "chameleon", image_token=8711, vq=vq, codes=tuple(range(4, 8196)), end_tokens=(2,), pad_token=1,
        images=chameleon_format.image_options(vq),
    )  # fmt: skip


def qwen1_vl(decoder: DecoderConfig) -> VLMConfig:
    """Qwen-VL (Bai et al. 2023): 448 pixels, 256 queries."""
    vision, family = _tower("qwen-vl")
    return VLMConfig(
        "qwen_vl", decoder, "qwen", vision, family,
        ConnectorConfig("resampler", vision.width, decoder.width, queries=256, heads=32), image_token=151859,
        end_tokens=(151643, 151645), pad_token=151643, images=dict(mode="fixed", size=448, patch_size=14, policy="resize"),
    )  # fmt: skip
