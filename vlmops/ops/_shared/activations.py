"""The five activations, by the names transformers uses, and their derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "activate", "activation_backward", "check_activation"]

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")


def check_activation(name: str | None) -> str:
    """The schema's name ("" for none); ValueError for an unknown one."""
    if name is None or name == "":
        return ""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)} or None, got {name!r}")
    return name


def activate(x: Tensor, name: str) -> Tensor:
    """Apply an activation by name ("" = identity), elementwise, any dtype."""
    if name == "":
        return x
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    raise ValueError(f"unknown activation {name!r}")


def activation_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """grad * activation'(x), elementwise, in the dtype of ``grad``."""
    if name == "":
        return grad
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    if name == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    if name == "quick_gelu":
        s = torch.sigmoid(1.702 * x)
        return grad * (s + 1.702 * x * s * (1 - s))
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if name == "relu":
        return grad * (x > 0)
    raise ValueError(f"unknown activation {name!r}")
