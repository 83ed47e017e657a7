"""Matrix products on the CPU through oneDNN with packed weights, as torch's own compiler uses it.

float32 and bfloat16 run in their own precision. float16 has no matrix instructions on most CPUs (torch falls to about
a tenth of float32 speed): its weights are packed as float32, which is exact, and the result is rounded once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vlmops.backends import native
from vlmops.ops._shared.activations import activate
from vlmops.ops._shared.packing import STORE

__all__ = ["gemm", "why_not_gemm"]

ROWS_HINT = 512  # one packed layout serves every row count (measured equal from 1 to 4096 rows)
#: What oneDNN fuses into the product: name -> (attr, algorithm).
FUSED = {"": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", ""), "relu": ("relu", "")}

native.define("quick_gelu_(Tensor(a!) x) -> ()")


@lru_cache(maxsize=1)
def _has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def why_not_gemm(x: Tensor, *weights: Tensor) -> str | None:
    """Why ``gemm`` cannot run; None if it can."""
    if x.device.type != "cpu":
        return f"a tensor on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(x.dtype)[6:]} (float32, bfloat16 and float16 only)"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "torch has no oneDNN"
    if x.dtype == torch.bfloat16 and not _has_bf16():
        return "oneDNN has no bfloat16 on this CPU"
    if x.numel() == 0:
        return "no rows"
    for w in weights:
        if w.dtype != x.dtype or not w.is_contiguous() or w.is_meta or min(w.shape[0], w[0].numel()) < 16:
            return f"a weight that is not contiguous, not {str(x.dtype)[6:]} or under 16 wide: {list(w.shape)}"
    return None


def _pack(weight: Tensor) -> Tensor:
    weight = weight.flatten(1)  # a convolution whose kernel is its stride is a product, too
    weight = weight.float() if weight.dtype == torch.float16 else weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "", residual: Tensor | None = None) -> Tensor:
    """residual + act(x W^T + b) with a packed weight; no gradient.

    Args:
        x: [rows, K] contiguous; float32, bfloat16, or float16.
        weight: [N, K] parameter (or [N, ...] with K elements a row), same dtype.
        bias: [N] or None.
        activation: a name of ``ACTIVATIONS`` or "".
        residual: [rows, N] or None; only together with activation "" is it part of the product's own epilogue.

    Returns:
        [rows, N] in x's dtype.
    """
    half = x.dtype == torch.float16
    packed = STORE.get(weight, "onednn", _pack)
    if half:
        x, bias = x.float(), None if bias is None else bias.float()
        residual = None if residual is None else residual.float()
    fused = activation in FUSED
    if residual is not None and activation == "":
        y = torch.ops.mkldnn._linear_pointwise.binary(x, residual.contiguous(), packed, bias, "add")
    else:
        attr, algorithm = FUSED[activation] if fused else FUSED[""]
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, attr, [], algorithm)
        if not fused:
            y = apply_quick_gelu(y) if activation == "quick_gelu" else activate(y, activation)
        if residual is not None:
            y += residual
    return y.half() if half else y


def apply_quick_gelu(y: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), in place by one vectorised pass (oneDNN's fused set does not have it)."""
    if native.available():
        torch.ops.vlmops_cpu.quick_gelu_(y)
        return y
    return activate(y, "quick_gelu")
