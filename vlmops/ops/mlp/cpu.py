"""Two or three packed oneDNN products over chunks of rows, so that the hidden rows stay in the cache."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlmops.ops._shared.gemm_cpu import gemm, why_not_gemm
from vlmops.ops.mlp.layout import gather_rows

#: Hidden bytes of a chunk. Below it the whole product runs at once: chunks cost a copy of the result.
CHUNK_BYTES = 24 << 20


def supports(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> str | None:  # fmt: skip
    """Why this backend cannot run these arguments; None if it can."""
    if not inference:
        return "a gradient is wanted (packed weights have none)"
    return why_not_gemm(x, *(w for w in (w1, w2, w_gate) if w is not None))


def normalise(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's fused norms: small beside the products."""
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps) if kind == "rms_norm" else x


def forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    rows = gather_rows(normalise(x, norm, norm_weight, norm_bias, norm_eps), gather, height, width)
    shape = (*rows.shape[:-1], w2.shape[0])
    rows = rows.reshape(-1, rows.shape[-1]).contiguous()
    rest = None if residual is None else residual.reshape(-1, w2.shape[0])
    step = max(512, CHUNK_BYTES // (w1.shape[0] * rows.element_size()))

    def chunk(part: Tensor, add: Tensor | None) -> Tensor:
        if w_gate is None:
            h = gemm(part, w1, b1, activation)
        else:
            h = gemm(part, w_gate, b_gate, activation)
            h *= gemm(part, w1, b1)
        h = normalise(h, mid_norm, mid_weight, mid_bias, mid_eps)
        if layer_scale is None:
            return gemm(h, w2, b2, "", add)
        y = gemm(h, w2, b2)
        y *= layer_scale
        return y if add is None else y.add_(add)

    if len(rows) <= step:
        return chunk(rows, rest).view(shape)
    out = x.new_empty(len(rows), w2.shape[0])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        out[part] = chunk(rows[part], None if rest is None else rest[part])
    return out.view(shape)
