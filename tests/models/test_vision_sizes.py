"""The real towers on the meta device: parameters as published, and the configs transformers' files describe."""

import pytest
import torch
import transformers as T

from vlmops.models.config import ConnectorConfig
from vlmops.models.connectors import connect
from vlmops.models.keymap import expand
from vlmops.models.vision import SIZES, AttentionPool, ClipHead, VisionTransformer, from_json, keys, named

#: Millions of parameters. CLIP, SigLIP, EVA: open_clip, docs/model_profile.csv (image_mparams), with projection or pooling head.
#: ViT (with its classifier), DINOv2 and PaliGemma's so400m (without a head): timm, results/benchmark-infer-amp-nchw-*.csv.
MILLIONS = {
    "vit-b16": 86.57, "vit-l16": 304.33, "clip-b32": 87.85, "clip-b16": 86.19, "clip-l14": 303.97, "clip-l14-336": 304.29,
    "siglip-b16-224": 92.88, "siglip-b16-256": 92.93, "siglip-b16-384": 93.18, "siglip-b16-512": 93.52,
    "siglip-l16-256": 315.96, "siglip-l16-384": 316.28, "siglip-so400m-224": 427.68, "siglip-so400m-384": 428.23,
    "siglip-so400m-448": 413.33, "siglip-so400m-896": 416.87,
    "eva01-g": 1012.59, "eva02-l": 304.11, "eva02-l-336": 304.43, "eva02-e": 4350.56,
    "dinov2-s": 22.06, "dinov2-b": 86.58, "dinov2-l": 304.37, "dinov2-g": 1136.48,
    "dinov2-s-reg": 22.06, "dinov2-b-reg": 86.58, "dinov2-l-reg": 304.37, "dinov2-g-reg": 1136.48,
}  # fmt: skip
#: Tower and merger of the 7B models: all parameters of their checkpoints without Qwen2.5-7B's; 675M in Qwen2-VL's paper.
EXACT = {"qwen2-vl": 8_291_375_616 - 7_615_616_512, "qwen2.5-vl": 8_292_166_656 - 7_615_616_512}
#: In their papers, to one or two digits: Pixtral (Agrawal et al. 2024), CogVLM's EVA02-E (Wang et al. 2023), Qwen-VL's
#: ViT-bigG (Bai et al. 2023), BLIP-2's EVA01-g (Sun et al. 2023).
ROUGH = {"pixtral-12b": 400e6, "eva02-e-cogvlm2": 4.4e9, "qwen-vl": 1.9e9, "eva01-g-blip2": 1.0e9}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def count(name):
    """A tower with the head that its published figure includes."""
    family, config = named(name)
    with torch.device("meta"):
        total = parameters(VisionTransformer(config))
        if family == "clip":
            total += parameters(ClipHead(config.width, 512 if config.width == 768 else 768)) - 1
        elif family == "dinov2_with_registers":
            total -= config.width  # timm gives the class token no position
        elif family == "siglip" and not name.endswith(("448", "896")):
            total += parameters(AttentionPool(config))
        elif family == "eva_clip":  # a linear layer with a bias
            total += (config.width + 1) * (768 if "eva02-l" in name else 1024)
        elif family == "vit":
            total += (config.width + 1) * 1000
        elif family.startswith("qwen2"):
            total += parameters(connect(ConnectorConfig("merger", 1280, 3584, norm=config.norm)))
    return total


def test_every_tower_has_a_figure():
    assert MILLIONS.keys() | EXACT.keys() | ROUGH.keys() == SIZES.keys()


@pytest.mark.parametrize("name", MILLIONS)
def test_published_to_two_digits(name):
    assert round(count(name) / 1e6, 2) == pytest.approx(MILLIONS[name], abs=0.0051)


def test_published_otherwise():
    for name, figure in EXACT.items():
        assert count(name) == figure, name
    for name, figure in ROUGH.items():
        assert count(name) == pytest.approx(figure, rel=0.04), name


@pytest.mark.parametrize("name", SIZES)
def test_every_parameter_has_a_name_in_the_checkpoint(name):
    family, config = named(name)
    with torch.device("meta"):
        state = VisionTransformer(config).state_dict()
    rules = [r for r in expand(keys(config, family)) if r.ours]
    assert sorted(r.ours for r in rules) == sorted(state)


VIT_B, VIT_L = dict(), dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
SO400M = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, patch_size=14)
REGISTERS = dict(num_register_tokens=4, image_size=518, patch_size=14)
DESCRIBED = {
    "vit-b16": T.ViTConfig(),
    "clip-b32": T.CLIPVisionConfig(),
    "clip-l14-336": T.CLIPVisionConfig(**VIT_L, patch_size=14, image_size=336),
    "siglip-b16-224": T.SiglipVisionConfig(),
    "siglip-so400m-384": T.SiglipVisionConfig(**SO400M, image_size=384),
    "dinov2-b": T.Dinov2Config(image_size=518),
    "dinov2-s": T.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518),
    "dinov2-g": T.Dinov2Config(
        hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True, image_size=518
    ),
    "dinov2-b-reg": T.Dinov2WithRegistersConfig(**REGISTERS),
    "eva01-g-blip2": T.Blip2VisionConfig(),
    "qwen2-vl": T.Qwen2VLConfig().vision_config,
    "qwen2.5-vl": T.Qwen2_5_VLConfig(vision_config=dict(hidden_size=1280)).vision_config,
    "pixtral-12b": T.PixtralVisionConfig(hidden_act="silu"),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_config_file_describes_the_tower(name):
    """From all values, and from those alone that differ from transformers' defaults, as older files have it."""
    config = DESCRIBED[name]
    assert from_json(config.to_dict()) == named(name)[1]
    short = {k: v for k, v in config.to_diff_dict().items() if k != "rope_parameters"}
    assert from_json({**short, "model_type": config.model_type}) == named(name)[1]


def test_unknown_name():
    with pytest.raises(ValueError, match="name: expected one of vit-b16"):
        named("resnet-50")
