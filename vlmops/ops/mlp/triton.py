"""Triton: two or three products whose epilogues hold bias, activation, gating, LayerScale and residual; gathers in place.

Norms run as their own pass in front (vlmops/ops/norms): a row's statistics are known only after all of it was read, so a norm
inside the product would need a statistics pass anyway, would put every tile of A through registers (no TMA, no wgmma
straight from shared memory), and would repeat the work for each tile of columns. The pass costs 4 bytes of traffic an element
at bfloat16 beside 2 H products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_gemm_launch import (
    Epilogue,
    Gathered,
    Product,
    flatten,
    gather_rows,
    gemm,
    why_not_gemm,
)
from vlmops.ops._shared.triton_math import cdiv
from vlmops.ops.linear.triton import scale_gradient, weight_gradient
from vlmops.ops.mlp.triton_kernels import hidden_gradient_gemm, hidden_pass_kernel
from vlmops.ops.norms import triton as norms


def supports(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> str | None:  # fmt: skip
    """Why these kernels cannot run these arguments; None if they can."""
    for kind, size in ((norm, x.shape[-1]), (mid_norm, w1.shape[0])):
        if kind and size > norms.MAX_WIDTH:
            return f"a norm over {size} elements (at most {norms.MAX_WIDTH})"
    return why_not_gemm(
        x, w1, b1, w2, b2, w_gate, b_gate, residual, norm_weight, norm_bias, mid_weight, mid_bias, layer_scale
    )


def _norm(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, contiguous; x itself for ""."""
    if kind == "":
        return x
    return norms.forward(flatten(x), None, weight, bias, eps, 0.0, kind == "layer_norm")[0].view(x.shape)


def _norm_backward(
    grad: Tensor, x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x [rows, C], weight and bias, where wanted."""
    if kind == "":
        return [grad, None, None]
    args = (x, None, weight, bias, eps, 0.0, kind == "layer_norm")
    return norms.backward([grad, None], [x, x], args, needs)


def forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    rows = gather_rows(_norm(x, norm, norm_weight, norm_bias, norm_eps), gather, height, width)
    h = gemm(rows, w1, Epilogue(bias=b1, activation=activation, weight_gate=w_gate, bias_gate=b_gate))
    h = _norm(h, mid_norm, mid_weight, mid_bias, mid_eps)
    rest = None if residual is None else flatten(residual)
    y = gemm(h, w2, Epilogue(bias=b2, scale=layer_scale, residual=rest))
    if gather == "merge2x2":
        return y
    return y.view(*((x.shape[0], x.shape[1] // 4) if gather else x.shape[:-1]), w2.shape[0])


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients in the schema's order of differentiable arguments; only the inputs are kept, the rest is computed again."""
    (x, w1, b1, w2, b2, w_gate, b_gate, activation, _, norm, norm_weight, norm_bias, norm_eps, mid_norm, mid_weight,
     mid_bias, mid_eps, layer_scale, gather, height, width, _) = args  # fmt: skip
    (need_x, need_w1, need_b1, need_w2, need_b2, need_wg, need_bg, need_residual, need_nw, need_nb, need_mw, need_mb,
     need_scale) = needs  # fmt: skip
    (grad,) = grads
    assert grad is not None
    found: list[Tensor | None] = [None] * len(needs)
    found[7] = grad.clone() if need_residual else None  # an op may not return its own argument
    flat = dense_rows(flatten(grad))
    before = need_x or need_nw or need_nb  # whether anything in front of the first product wants a gradient
    inside = before or need_w1 or need_b1 or need_wg or need_bg
    through = inside or need_mw or need_mb
    need_sums = need_b2 or (need_scale and b2 is not None)
    _, scaled, sums = scale_gradient(flat, None, layer_scale, "scale", through and layer_scale is not None, need_sums)
    if need_b2 and sums is not None:
        found[4] = sums if layer_scale is None else sums * layer_scale
    if not (through or need_w2 or need_scale):
        return found

    rows = gather_rows(_norm(x, norm, norm_weight, norm_bias, norm_eps), gather, height, width)
    first = gemm(rows, w1, Epilogue(bias=b1))
    gate = None if w_gate is None else gemm(rows, w_gate, Epilogue(bias=b_gate))
    hidden = Hidden(first, gate, activation, need_b1, need_bg)
    if mid_norm or not inside:
        h = hidden.value()
        mid: Tensor | None = _norm(h, mid_norm, mid_weight, mid_bias, mid_eps)
        if through:
            grad_h, found[10], found[11] = _norm_backward(
                gemm(scaled, w2.t()), h, mid_norm, mid_weight, mid_bias, mid_eps, (inside, need_mw, need_mb)
            )
            if inside and grad_h is not None:
                hidden.differentiate(grad_h)
    else:
        mid = hidden.differentiate_product(scaled, w2, need_w2 or need_scale)
    if mid is not None:
        found[3], found[12] = weight_gradient(flat, mid, w2, layer_scale, "scale", need_w2, need_scale)
    if found[12] is not None and sums is not None and b2 is not None:
        found[12] = found[12] + sums * b2
    if not inside:
        return found
    found[2], found[6] = hidden.sums
    found[1] = weight_gradient(hidden.d_first, rows, w1, None, "", need_w1, False)[0]
    if w_gate is not None:
        found[5] = weight_gradient(hidden.d_gate, rows, w_gate, None, "", need_wg, False)[0]
    if before:
        more = None if w_gate is None else (hidden.d_gate, w_gate.t())
        grad_x = x.new_empty(x.shape)
        rows_x = grad_x.view(first.shape[0], w1.shape[1]) if gather != "pixel_shuffle" else None
        into = Gathered(grad_x, gather, height, width) if rows_x is None else rows_x
        gemm(hidden.d_first, w1.t(), more=more, out=into)
        found[0], found[8], found[9] = _norm_backward(
            flatten(grad_x),
            flatten(x) if norm else x,
            norm,
            norm_weight,
            norm_bias,
            norm_eps,
            (need_x, need_nw, need_nb),
        )
        found[0] = found[0].view(x.shape) if need_x and found[0] is not None else None
    return found


class Hidden:
    """h = act(gate) first or act(first), [M, H], and the gradients of both from that of h.

    Args:
        need_first, need_gate: whether the column sums of those gradients are wanted (the biases').
    """

    def __init__(self, first: Tensor, gate: Tensor | None, activation: str, need_first: bool, need_gate: bool) -> None:
        self.first, self.gate, self.activation = first, gate, activation
        self.needs = (need_first, need_gate)
        self.d_first = self.d_gate = first
        self.sums: list[Tensor | None] = [None, None]

    def _parts(self, count: int) -> list[Tensor]:
        width = self.first.shape[1]
        return [self.first.new_empty(count if need else 0, width, dtype=torch.float32) for need in self.needs]

    def _allocate(self) -> None:
        self.d_first = torch.empty_like(self.first)
        self.d_gate = self.d_first if self.gate is None else torch.empty_like(self.first)

    def _add(self, parts: list[Tensor]) -> None:
        self.sums = [norms.column_sum(part) if need else None for part, need in zip(parts, self.needs, strict=True)]

    def differentiate_product(self, grad: Tensor, w2: Tensor, need_h: bool) -> Tensor | None:
        """From grad W2 without writing that; h itself where it is wanted."""
        p = Product(grad, w2.t())
        self._allocate()
        h = torch.empty_like(self.first) if need_h else None

        def run(config: Config) -> list[Tensor]:
            parts = self._parts(cdiv(p.m, config["BM"]))
            triton_runtime.launch(
                hidden_gradient_gemm, (p.tiles(config),), *p.operands(config), self.first,
                self.first if self.gate is None else self.gate, self.first if h is None else h, self.d_first, self.d_gate,
                *parts, p.m, p.n, *p.steps, *p.picture, ACTIVATION=self.activation, GATED=self.gate is not None,
                NEED_H=need_h, NEED_FIRST=self.needs[0], NEED_GATE=self.needs[1], config=config, **p.constants(config),
            )  # fmt: skip
            return parts

        key = f"{p.key} {self.activation} {self.gate is not None}"
        self._add(run(triton_runtime.pick("mlp_hidden", key, p.configs(extra=2), run, grad.device)))
        return h

    def value(self) -> Tensor:
        """h."""
        h = torch.empty_like(self.first)
        self._pass(None, h)
        return h

    def differentiate(self, grad: Tensor) -> None:
        """From the gradient of h in memory."""
        self._allocate()
        self._add(self._pass(dense_rows(grad), None))

    def _pass(self, grad: Tensor | None, h: Tensor | None) -> list[Tensor]:
        (m, n), first = self.first.shape, self.first
        br, bc = 8, 256
        wanted = max(1, 4 * triton_runtime.processors(first) // max(1, cdiv(n, bc)))
        chunk = br * max(1, cdiv(cdiv(m, br), wanted))
        programs = max(1, cdiv(m, chunk))
        parts = self._parts(programs if grad is not None else 0)
        triton_runtime.launch(
            hidden_pass_kernel, (programs, cdiv(n, bc)), first if grad is None else grad, first,
            first if self.gate is None else self.gate, first if h is None else h, self.d_first, self.d_gate, *parts, m, n,
            chunk, ACTIVATION=self.activation, GATED=self.gate is not None, NEED_H=h is not None, NEED_D=grad is not None,
            NEED_FIRST=grad is not None and self.needs[0], NEED_GATE=grad is not None and self.needs[1], BR=br, BC=bc,
            warps=4,
        )  # fmt: skip
        return parts
