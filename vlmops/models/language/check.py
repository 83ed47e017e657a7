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
    check_activation("relu" if config.activation == "relu2" else config.activation)
    if config.activation == "relu2" and config.gated:
        raise ValueError('gated: "relu2" is not an activation of a gated MLP here')
    if config.head_dim is None and config.width % config.heads:
        raise ValueError(f"heads: expected a divisor of width {config.width}, got {config.heads}")
    if config.groups < 1 or config.heads % config.groups:
        raise ValueError(f"kv_heads: expected a divisor of {config.heads} heads, got {config.kv_heads}")
    _check_norms(config)
    _check_positions(config)
    if not re.fullmatch(r"all|even|none|from:\d+", config.window_layers):
        raise ValueError(
            f'window_layers: expected "all", "even", "from:k" with a number k or "none", got {config.window_layers!r}'
        )
    if config.window is not None and config.window < 1:
        raise ValueError(f"window: expected at least 1, got {config.window}")
    for name in ("attention_softcap", "logit_softcap"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}: expected 0 or more, got {getattr(config, name)}")


def _check_norms(config: DecoderConfig) -> None:
    if config.norm not in ("rms_norm", "layer_norm"):
        raise ValueError(f'norm: expected "rms_norm" or "layer_norm", got {config.norm!r}')
    if config.norm == "layer_norm" and config.norm_offset:
        raise ValueError(f"norm_offset: of a layer_norm expected 0, got {config.norm_offset}")
    if config.qk_norm not in ("", "shared", "heads"):
        raise ValueError(f'qk_norm: expected "", "shared" or "heads", got {config.qk_norm!r}')
    if config.sandwich and config.norm_after:
        raise ValueError("sandwich: has the norms of norm_after already, expected one of the two")


def _check_positions(config: DecoderConfig) -> None:
    for name in ("learned_positions", "position_offset"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}: expected 0 or more, got {getattr(config, name)}")
    if config.learned_positions:
        for name, value in (("rope_scaling", config.rope_scaling), ("mrope", config.mrope)):
            if value:
                raise ValueError(f"{name}: expected none where positions are learned, got {value}")
        return
    turned = config.rotary_dim
    if turned < 2 or turned % 2 or turned > config.dim:
        what = "head_dim" if config.rotary_factor == 1.0 else f"rotary_factor: of head_dim {config.dim}"
        raise ValueError(f"{what}: expected an even number for rotary positions, got {turned}")
    if config.mrope and (len(config.mrope) != 3 or sum(config.mrope) * 2 != turned):
        raise ValueError(f"mrope: expected three with a sum of {turned // 2}, got {config.mrope}")
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind not in SCALINGS:
        raise ValueError(f"rope_scaling: expected a kind of {', '.join(SCALINGS)}, got {scaling.kind!r}")
    if scaling is not None and (scaling.factor <= 0 or scaling.original_length < 1):
        raise ValueError(f"rope_scaling: expected a factor above 0 and an original_length of at least 1, got {scaling}")
    if scaling is not None and scaling.kind == "dynamic" and turned == 2:
        raise ValueError('rope_scaling: "dynamic" needs a head_dim above 2')
