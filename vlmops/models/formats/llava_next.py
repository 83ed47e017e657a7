"""LLaVA-NeXT (Liu et al. 2024): LLaVA with AnyRes tiles and a learned token at the end of their rows."""

from __future__ import annotations

from typing import Any

from vlmops.images.modes import PINPOINTS
from vlmops.models.assemblies.projected import ProjectedVLM
from vlmops.models.config import VLMConfig
from vlmops.models.formats import llava
from vlmops.models.formats.base import Format, Json
from vlmops.models.keymap import Rule

__all__ = ["FORMAT", "read", "rules", "write"]


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours."""
    values = llava.base_values(json)
    vision = values["vision"]
    points = tuple((int(h), int(w)) for h, w in json.get("image_grid_pinpoints") or PINPOINTS)
    images = dict(mode="anyres", size=vision.image_size, patch_size=vision.patch_size, pinpoints=points)
    return VLMConfig(family="llava_next", **{**values, "images": images}, newline=True, pinpoints=points)


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``."""
    return {
        **llava.write(config), "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "image_grid_pinpoints": [list(point) for point in config.pinpoints], "use_image_newline_parameter": True,
    }  # fmt: skip


def rules(config: VLMConfig) -> list[Rule]:
    """Whose tensor is whose."""
    return [*llava.rules(config), Rule("newline", "image_newline")]


FORMAT = Format(("llava_next",), ProjectedVLM, read, write, rules, llava.RENAMES)
