"""oneDNN with packed weights; what it does not fuse is one native pass over the product."""

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
    y = gemm(
        x.reshape(-1, k).contiguous(), weight, bias, activation, None if residual is None else residual.reshape(-1, n),
        scale=None if gate is None else torch.tanh(gate.float()), row_mask=None if row_mask is None else row_mask.reshape(-1),
    )  # fmt: skip
    return y.view(*x.shape[:-1], n)
