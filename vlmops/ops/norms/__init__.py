"""RMSNorm and LayerNorm over the last dimension, with the residual add before them in the same pass.

The two are one dispatcher op: LayerNorm is RMSNorm of centred rows plus a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op

__all__ = ["layer_norm", "rms_norm"]


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if weight is None or center or offset else torch.promote_types(weight.dtype, x.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(0 if residual is None else x.shape)


OP = Op(
    __name__,
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, bool center) "
    "-> (Tensor, Tensor)",
    differentiable=["x", "weight", "bias"],
    fake=_fake,
    saved_outputs=[1],
    same_gradient={"residual": "x"},
    tiny=lambda x, *_: x.numel() < 4096,
)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension.

    Args:
        x: [..., C]; float32, bfloat16, float16 (float64 on reference and torch). Statistics are float32.
        weight: [C], any of these types; None: ones.
        eps: added to the mean square.
        residual: [..., C] like x: then the norm is taken of x + residual, rounded to their common dtype.
        offset: added to the weight, 1.0 in Gemma. With 0 the row is rounded to x's dtype before it meets the weight, as
            Llama's and Qwen's norms do (a float32 weight makes the result float32); else after, as Gemma's does.

    Returns:
        normed [..., C]; with ``residual`` the pair (normed, x + residual).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.

    Source: Zhang and Sennrich 2019; transformers' ``LlamaRMSNorm`` and ``GemmaRMSNorm``.
    """
    return _norm(x, residual, weight, None, eps, offset, False)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension.

    Args:
        x: [..., C]; float32, bfloat16, float16 (float64 on reference and torch). Statistics are float32.
        weight: [C], any of these types; None: ones.
        bias: [C]; None: zeros.
        eps: added to the variance.
        residual: [..., C] like x: then the norm is taken of x + residual, rounded to their common dtype.

    Returns:
        normed [..., C] in x's dtype; with ``residual`` the pair (normed, x + residual).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.

    Source: Ba et al. 2016; ``torch.nn.LayerNorm``.
    """
    return _norm(x, residual, weight, bias, eps, 0.0, True)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    checks.check_tensor("x", x, layout="[..., C]")
    checks.check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., C] with C >= 1, got {checks.describe(x)}")
    shape = x.shape
    if residual is not None:
        checks.check_tensor("residual", residual, layout=f"{list(shape)} like x")
        checks.check_floating("residual", residual)
        checks.check_shape("residual", residual, shape, f"{list(shape)} like x")
        checks.check_same_device("residual", residual, x.device, "x")
        if residual.dtype != x.dtype:  # a low-precision branch on a float32 stream, as under autocast
            common = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(common), residual.to(common)
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            checks.check_tensor(name, p, dim=1, layout=f"[{shape[-1]}]")
            checks.check_floating(name, p)
            checks.check_shape(name, p, shape[-1:], f"[{shape[-1]}] like x's last dimension")
            checks.check_same_device(name, p, x.device, "x")
    if x.dim() != 2:
        x = x.reshape(-1, shape[-1])
        residual = None if residual is None else residual.reshape(-1, shape[-1])
    out, total = OP(x, residual, weight, bias, float(eps), float(offset), center)
    if len(shape) != 2:
        out = out.view(shape)
        total = total if residual is None else total.view(shape)
    return out if residual is None else (out, total)
