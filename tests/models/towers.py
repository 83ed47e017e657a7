"""Tiny towers of transformers, and ours filled from the files they write."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as T
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmops.models.keymap import load, load_into
from vlmops.models.vision import VisionTransformer, from_json, keys

SHAPE: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
SQUARE = dict(image_size=56, patch_size=14)
NATIVE: dict[str, Any] = dict(depth=3, num_heads=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)

TOWERS = {
    "vit": lambda: T.ViTModel(T.ViTConfig(**SHAPE, **SQUARE)),
    "clip": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**SHAPE, **SQUARE)),
    "siglip": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**SHAPE, image_size=60, patch_size=14)),
    "dinov2": lambda: T.Dinov2Model(T.Dinov2Config(**SHAPE, **SQUARE, mlp_ratio=2)),
    "dinov2-g": lambda: T.Dinov2Model(T.Dinov2Config(**SHAPE, **SQUARE, mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2_with_registers": lambda: T.Dinov2WithRegistersModel(
        T.Dinov2WithRegistersConfig(**SHAPE, **SQUARE, mlp_ratio=2, num_register_tokens=3)
    ),
    "blip2": lambda: T.Blip2VisionModel(T.Blip2VisionConfig(**SHAPE, **SQUARE)),
    "pixtral": lambda: T.PixtralVisionModel(
        T.PixtralVisionConfig(**SHAPE, image_size=64, patch_size=4, hidden_act="silu")
    ),
    "qwen2_vl": lambda: _qwen(T.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel, 2),
    "qwen2_5_vl": lambda: _qwen(T.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel, 2.5),
}


def _qwen(kind: Any, version: float) -> Any:
    if version == 2:
        config = T.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
            **NATIVE, embed_dim=32, hidden_size=24, mlp_ratio=2
        )
    else:
        config = T.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
            **NATIVE,
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=24,
            window_size=16,
            fullatt_block_indexes=[1],
        )
    return kind(config)


def randomise(module: nn.Module, seed: int = 0) -> Any:
    """Every parameter matters: none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        nn.init.normal_(p, std=0.2, generator=generator)
        if p.dim() == 1 and "weight" in name:
            p.data += 1
    return module.eval()


def written(model: Any) -> dict[str, Tensor]:
    """What transformers writes to a file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def family(name: str) -> str:
    return name.split("-")[0]


def build(name: str) -> tuple[Any, VisionTransformer]:
    """Theirs with random weights, and ours with the same."""
    theirs = randomise(TOWERS[name]())
    config = from_json(theirs.config.to_dict())
    with torch.device("meta"):
        ours = VisionTransformer(config)
    checkpoint = without_merger(written(theirs))
    load_into(ours, checkpoint, keys(config, family(name)))
    return theirs, ours


def without_merger(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in checkpoint.items() if not name.startswith("merger.")}


def gradients(theirs: Any, ours: VisionTransformer, name: str) -> dict[str, Tensor]:
    """Their gradients under our names: written like weights, then read through the key map."""
    values = [p.data for p in theirs.parameters()]
    for p in theirs.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    found = without_merger(written(theirs))
    for p, value in zip(theirs.parameters(), values, strict=True):
        p.data = value
    shapes = {n: p.shape for n, p in ours.named_parameters()}
    return dict(load(found, keys(ours.config, family(name)), shapes))
