"""Qwen2.5-VL (Bai et al. 2025): Qwen2-VL with windows in its tower, RMSNorm, and videos timed in seconds."""

from __future__ import annotations

from typing import Any

from vlmops.models.assemblies.projected import ProjectedVLM
from vlmops.models.config import VLMConfig
from vlmops.models.formats import qwen2_vl
from vlmops.models.formats.base import Format, Json

__all__ = ["FORMAT", "read", "write"]


def read(json: Json) -> VLMConfig:
    """``config.json`` -> ours."""
    speed = (json.get("vision_config") or {}).get("tokens_per_second", 4)
    return VLMConfig(**qwen2_vl.values(json, "qwen2_5_vl", "rms_norm"), tokens_per_second=speed)


def write(config: VLMConfig) -> dict[str, Any]:
    """Ours -> ``config.json``."""
    found = qwen2_vl.write(config)
    return {**found, "vision_config": {**found["vision_config"], "tokens_per_second": config.tokens_per_second}}


FORMAT = Format(("qwen2_5_vl",), ProjectedVLM, read, write, qwen2_vl.rules, qwen2_vl.RENAMES)
