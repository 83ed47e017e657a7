"""oneDNN with packed weights; activation and residual in the product's epilogue where oneDNN has them."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared.gemm_cpu import gemm, why_not_gemm


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
             residual: Tensor | None, inference: bool) -> str | None:  # fmt: skip
    """Why this backend cannot run these arguments; None if it can."""
    if not inference:
        return "a gradient is wanted (packed weights have none)"
    return why_not_gemm(x, weight)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
    residual: Tensor | None, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    n, k = weight.shape
    flat = x.reshape(-1, k).contiguous()
    plain = gate is None and row_mask is None
    rest = None if residual is None else residual.reshape(-1, n)
    y = gemm(flat, weight, bias, activation, rest if plain else None)
    if not plain:
        if gate is not None:
            y *= torch.tanh(gate)
        if row_mask is not None:
            y.masked_fill_(~row_mask.reshape(-1, 1), 0.0)
        if rest is not None:
            y += rest
    return y.view(*x.shape[:-1], n)
