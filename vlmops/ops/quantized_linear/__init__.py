"""``linear`` with a weight in int8, int4 or fp8: less memory to read, at a stated loss of accuracy.

A decoding step reads every weight once for a few rows, so its time is the weights' bytes. Never chosen by itself: the caller
quantises (``quantize_weight``) and passes the result here, or to ``linear``, which forwards it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.activations import check_activation
from vlmops.ops._shared.quantisation import QuantizedWeight
from vlmops.ops._shared.registry import Op

__all__ = ["quantized_linear"]


def _fake(x: Tensor, data: Tensor, *args: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], data.shape[0])


OP = Op(
    __name__,
    "(Tensor x, Tensor data, Tensor scale, Tensor? zero, str kind, int group_size, int columns, Tensor? bias, "
    "str activation, Tensor? gate, Tensor? row_mask, Tensor? residual, bool quantize_activations) -> Tensor",
    differentiable=["x", "bias", "gate", "residual"],
    fake=_fake,
    autocast=["x", "bias", "gate", "residual"],
)  # data holds fp8 codes as uint8: torch's tools (opcheck, compiled graphs) compare arguments, which e4m3 tensors cannot


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
    residual: Tensor | None = None,
    quantize_activations: bool = False,
) -> Tensor:
    """residual + row_mask * tanh(gate) * act(x W^T + b) with W the dequantised weight; each part only if given.

    Args:
        x: [..., K] floating point.
        weight: [N, K] in few bits, from ``quantize_weight``; on x's device.
        bias: [N] or None.
        activation: "gelu", "gelu_tanh", "quick_gelu", "silu", "relu" or None.
        gate: scalar (0-d or [1]) or [N]; its tanh multiplies the product.
        row_mask: bool [...]; rows that are False contribute 0.
        residual: [..., N], added last.
        quantize_activations: fp8 weights only: round each row of x to e4m3 too, with a power of two as its scale, so that the
            product runs on fp8 tensor cores. A NaN or infinity makes its own row NaN.

    Returns:
        [..., N] in x's dtype. x, bias, gate and residual have gradients, through the dequantised weight and as if x had
        not been rounded (straight-through); the weight has none.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.

    Source: LLM.int8 (Dettmers et al. 2022), GPTQ (Frantar et al. 2022), FP8 formats (Micikevicius et al. 2022).
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(
            f"weight: expected a QuantizedWeight (quantize_weight makes one), got {checks.describe(weight)}"
        )
    checks.check_tensor("x", x, layout="[..., K]")
    checks.check_floating("x", x)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x: expected [..., {k}] for weight {[n, k]}, got {checks.describe(x)}")
    checks.check_same_device("weight", weight.data, x.device, "x")
    if quantize_activations and weight.kind != "fp8":
        raise ValueError(f"quantize_activations: expected an fp8 weight, got {weight.kind}")
    rows = x.shape[:-1]
    cast = torch.is_autocast_enabled(x.device.type)
    for name, t, shape in (("bias", bias, (n,)), ("residual", residual, (*rows, n)), ("gate", gate, None)):
        if t is None:
            continue
        checks.check_tensor(name, t)
        if shape is not None:
            checks.check_shape(name, t, shape)
        elif t.numel() != 1 and t.shape != (n,):
            raise ValueError(f"{name}: expected a scalar or [{n}], got {checks.describe(t)}")
        checks.check_same_device(name, t, x.device, "x")
        if not cast:
            checks.check_dtype(name, t, x.dtype, "x")
    if row_mask is not None:
        checks.check_tensor("row_mask", row_mask)
        checks.check_shape("row_mask", row_mask, rows)
        checks.check_same_device("row_mask", row_mask, x.device, "x")
        if row_mask.dtype != torch.bool:
            raise TypeError(f"row_mask: expected bool, got {checks.describe(row_mask)}")
    data = weight.data.view(torch.uint8) if weight.kind == "fp8" else weight.data
    return OP(
        x, data, weight.scale, weight.zero, weight.kind, weight.group_size or 0, k, bias,
        check_activation(activation), gate, row_mask, residual, quantize_activations,
    )  # fmt: skip
