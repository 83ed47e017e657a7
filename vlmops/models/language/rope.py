"""A decoder's rotary tables: which angle each token's query and key turn by.

One position a token, or three (time, row and column: Qwen2-VL's M-RoPE), and the four ways a model is stretched past the
contexts it was trained on.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from vlmops.models.config import DecoderConfig, RopeScaling
from vlmops.ops._shared.checks import describe

__all__ = ["inverse_frequencies", "rotary_tables"]


def rotary_tables(config: DecoderConfig, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of every token, as ``ops.varlen_attention`` and ``ops.rotary`` take them.

    Args:
        config: of the decoder.
        positions: integers [T]; or [3, T] (time, row, column) where the config has ``mrope``. There, [T] stands for three
            equal ones: text.
        lengths: integers [T]: tokens so far in each token's sequence, cached ones included. With "dynamic" scaling the angles
            depend on it; None: no sequence is longer than those of the training.

    Returns:
        cos, sin: float32 [T, R] on the device of ``positions``, for pairs (i, i + R / 2), R the config's ``rotary_dim``.

    Raises:
        ValueError: positions of another shape.

    Source: RoFormer (Su et al. 2021); M-RoPE: Qwen2-VL (Wang et al. 2024).
    """
    if positions.dim() not in (1, 2) or (positions.dim() == 2 and (positions.shape[0] != 3 or not config.mrope)):
        raise ValueError(f"positions: expected [T]{' or [3, T]' * bool(config.mrope)}, got {describe(positions)}")
    inverse, factor = inverse_frequencies(config, positions.device)
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic" and lengths is not None:
        inverse = _dynamic(config, config.rope_scaling, lengths)
    angles = positions[..., None].float() * inverse  # [T, R / 2] or [3, T, R / 2]
    if positions.dim() == 2:
        angles = torch.cat([part[axis] for axis, part in enumerate(angles.split(list(config.mrope), dim=-1))], dim=-1)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos() * factor, both.sin() * factor


def inverse_frequencies(config: DecoderConfig, device: torch.device) -> tuple[Tensor, float]:
    """Angle a position of every pair of channels, float32 [rotary_dim / 2], and what both tables are multiplied by.

    Source: linear: Chen et al. 2023; yarn: Peng et al. 2023; llama3: Llama 3.1's reference code. "dynamic" is as plain here.
    """
    if torch.compiler.is_compiling():
        return _inverse(config, device)
    return _kept(config, device)


@lru_cache(maxsize=32)
def _kept(config: DecoderConfig, device: torch.device) -> tuple[Tensor, float]:
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used in training later
        return _inverse(config, device)


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim


def _inverse(config: DecoderConfig, device: torch.device) -> tuple[Tensor, float]:
    inverse = 1.0 / config.rope_theta ** _exponents(config.rotary_dim, device)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":
        return inverse, 1.0
    if scaling.kind == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return _yarn(config, scaling, inverse), factor


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow angles are divided by the factor, fast ones stay, those between are blended by their turns in a context."""
    turns = scaling.original_length * inverse / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * inverse / scaling.factor + kept * inverse


def _yarn(config: DecoderConfig, scaling: RopeScaling, inverse: Tensor) -> Tensor:
    """As ``_llama3``, but blended along the channels: linearly between the two that make these many turns."""
    dim = config.rotary_dim

    def channel(turns: float) -> float:
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = math.floor(channel(scaling.beta_fast)), math.ceil(channel(scaling.beta_slow))
    low, high = max(low, 0), min(high, dim - 1)
    index = torch.arange(inverse.shape[0], dtype=torch.float32, device=inverse.device)
    stretched = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return inverse / scaling.factor * stretched + inverse * (1 - stretched)


def _dynamic(config: DecoderConfig, scaling: RopeScaling, lengths: Tensor) -> Tensor:
    """[T, R / 2]: the base grows with the sequence (NTK-aware scaling); made on the device of ``lengths``."""
    dim, over = config.rotary_dim, lengths.float().clamp(min=scaling.original_length) / scaling.original_length
    base = config.rope_theta * (scaling.factor * over - (scaling.factor - 1)) ** (dim / (dim - 2))
    return 1.0 / base[:, None] ** _exponents(dim, lengths.device)
