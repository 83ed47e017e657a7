"""Two or three packed oneDNN products over chunks of rows, so that the hidden matrix never takes more than its share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlmops.ops._shared.gemm_cpu import FUSED, chunks, finish, product, why_not_gemm, widened
from vlmops.ops.mlp.layout import gather_rows
from vlmops.ops.norms import cpu as norms

#: Hidden bytes of a chunk, and rows under which a chunk is never cut: the second product of few rows and a long inner
#: dimension reads its weight more often than it gains from a hidden matrix that stays in the cache (measured: chunks
#: of 512 rows of 4096 are 15% slower than no chunks, 2048 are equal).
CHUNK_BYTES = 32 << 20
LEAST_ROWS = 2048


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
    """LayerNorm or RMSNorm over the last dimension ("" for none): the native pass where it can run."""
    if kind == "":
        return x
    rows = x.reshape(-1, x.shape[-1])
    args = (rows, None, weight, bias, eps, 0.0, kind == "layer_norm")
    if norms.supports(*args) is None:
        return norms.forward(*args)[0].view(x.shape)
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def mid_normalise(h: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm in the middle, whose parameters may be of 16 bits beside float32 rows."""
    if kind == "":
        return h
    return normalise(
        h, kind, None if weight is None else weight.to(h.dtype), None if bias is None else bias.to(h.dtype), eps
    )


def forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    rows = gather_rows(normalise(x, norm, norm_weight, norm_bias, norm_eps), gather, height, width)
    n, hidden = w2.shape
    shape = (*rows.shape[:-1], n)
    rows = rows.reshape(-1, rows.shape[-1]).contiguous()
    rest = None if residual is None else residual.reshape(-1, n)
    half = widened(x.dtype)
    width_bytes = hidden * (4 if half else x.element_size()) * (1 if w_gate is None else 2)
    parts = chunks(len(rows), max(LEAST_ROWS, CHUNK_BYTES // width_bytes))
    fused, late = (activation, "") if activation in FUSED else ("", activation)
    out = x.new_empty(len(rows), n) if half or len(parts) > 1 else None
    for first, last in parts:
        part = rows[first:last].float() if half else rows[first:last]
        h = product(part, w1 if w_gate is None else w_gate, b1 if w_gate is None else b_gate, fused)
        if late:
            finish(h, h, late)
        if w_gate is not None:
            h *= product(part, w1, b1)
        y = product(mid_normalise(h, mid_norm, mid_weight, mid_bias, mid_eps), w2, b2)
        del h
        add = None if rest is None else rest[first:last]
        if out is not None:
            finish(y, out[first:last], "", layer_scale, None, add)
        elif layer_scale is not None or add is not None:
            finish(y, y, "", layer_scale, None, add)
    return (y if out is None else out).view(shape)
