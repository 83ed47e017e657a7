"""y = x W^T + b with its epilogue: activation, tanh gate, row mask, residual.

The output projections of Flamingo, Idefics and Mllama gate their result; every projection of a VLM is this op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.activations import check_activation
from vlmops.ops._shared.quantisation import QuantizedWeight
from vlmops.ops._shared.registry import Op

__all__ = ["linear"]


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


OP = Op(
    __name__,
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? gate, Tensor? row_mask, Tensor? residual, "
    "bool inference) -> Tensor",
    differentiable=["x", "weight", "bias", "gate", "residual"],
    fake=_fake,
    autocast=["x", "weight", "bias", "gate", "residual"],
)


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + row_mask * tanh(gate) * act(x W^T + b); each part only if given.

    Args:
        x: [..., K] floating point.
        weight: [N, K], as ``nn.Linear`` holds it; or one of ``quantize_weight``, then this is ``quantized_linear``.
        bias: [N] or None.
        activation: "gelu", "gelu_tanh", "quick_gelu", "silu", "relu" or None.
        gate: scalar (0-d or [1]) or [N]; its tanh multiplies the product (Flamingo, Mllama).
        row_mask: bool [...]; rows that are False contribute 0 (Idefics: text without an image).
        residual: [..., N], added last.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.

    Source: tanh gates as in Flamingo (Alayrac et al., 2022).
    """
    if isinstance(weight, QuantizedWeight):
        from vlmops.ops.quantized_linear import quantized_linear

        return quantized_linear(x, weight, bias, activation=activation, gate=gate, row_mask=row_mask, residual=residual)
    checks.check_tensor("x", x, layout="[..., K]")
    checks.check_tensor("weight", weight, dim=2, layout="[N, K]")
    checks.check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected [..., {weight.shape[1]}] for weight {list(weight.shape)}, got {checks.describe(x)}"
        )
    n, rows = weight.shape[0], x.shape[:-1]
    cast = torch.is_autocast_enabled(x.device.type)
    for name, t, shape in (("weight", weight, weight.shape), ("bias", bias, (n,)), ("residual", residual, (*rows, n))):
        check_part(name, t, shape, x, cast)
    if gate is not None:
        checks.check_tensor("gate", gate)
        check_part("gate", gate, gate.shape, x, cast)
        if gate.numel() != 1 and gate.shape != (n,):
            raise ValueError(f"gate: expected a scalar or [{n}], got {checks.describe(gate)}")
    if row_mask is not None:
        checks.check_tensor("row_mask", row_mask)
        checks.check_shape("row_mask", row_mask, rows)
        checks.check_same_device("row_mask", row_mask, x.device, "x")
        if row_mask.dtype != torch.bool:
            raise TypeError(f"row_mask: expected bool, got {checks.describe(row_mask)}")
    inference = no_grad_wanted(x, weight, bias, gate, residual)
    return OP(x, weight, bias, check_activation(activation), gate, row_mask, residual, inference)


def check_part(name: str, t: Tensor | None, shape: tuple[int, ...], x: Tensor, cast: bool) -> None:
    """A tensor argument's shape, device and (outside autocast) dtype against x."""
    if t is None:
        return
    if isinstance(t, Tensor) and t.shape == shape and t.dtype == x.dtype and t.device == x.device:
        return  # the usual case costs one comparison each, the message of what is wrong is worked out below
    checks.check_tensor(name, t)
    checks.check_shape(name, t, shape)
    checks.check_same_device(name, t, x.device, "x")
    if not cast:
        checks.check_dtype(name, t, x.dtype, "x")


def no_grad_wanted(*tensors: Tensor | None) -> bool:
    """True where nobody will ask for a gradient, so that weights may be packed."""
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
