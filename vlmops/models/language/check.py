"""Options of a decoder that do not go together, said when it is built."""

from __future__ import annotations

import re

from vlmops.models.config import DecoderConfig
from vlmops.ops._shared.activations import check_activation

__all__ = ["check"]

SCALINGS = ("linear", "llama3", "yarn", "dynamic")


def check(config: DecoderConfig) -> None:
    """ValueError naming the option that is wrong."""
    for name in ("vocab", "width", "layers", "heads", "mlp_width"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    check_activation(config.activation)
    if config.head_dim is None and config.width % config.heads:
        raise ValueError(f"heads: expected a divisor of width {config.width}, got {config.heads}")
    if config.groups < 1 or config.heads % config.groups:
        raise ValueError(f"kv_heads: expected a divisor of {config.heads} heads, got {config.kv_heads}")
    if config.dim < 2 or config.dim % 2:
        raise ValueError(f"head_dim: expected an even number for rotary positions, got {config.dim}")
    if config.mrope and (len(config.mrope) != 3 or sum(config.mrope) * 2 != config.dim):
        raise ValueError(f"mrope: expected three with a sum of {config.dim // 2}, got {config.mrope}")
    if not re.fullmatch(r"all|even|none|from:\d+", config.window_layers):
        raise ValueError(
            f'window_layers: expected "all", "even", "from:k" with a number k or "none", got {config.window_layers!r}'
        )
    if config.window is not None and config.window < 1:
        raise ValueError(f"window: expected at least 1, got {config.window}")
    for name in ("attention_softcap", "logit_softcap"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}: expected 0 or more, got {getattr(config, name)}")
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind not in SCALINGS:
        raise ValueError(f"rope_scaling: expected a kind of {', '.join(SCALINGS)}, got {scaling.kind!r}")
    if scaling is not None and (scaling.factor <= 0 or scaling.original_length < 1):
        raise ValueError(f"rope_scaling: expected a factor above 0 and an original_length of at least 1, got {scaling}")
    if scaling is not None and scaling.kind == "dynamic" and config.dim == 2:
        raise ValueError('rope_scaling: "dynamic" needs a head_dim above 2')
