"""Elementwise functions that every Triton kernel shares: activations and their derivatives, tanh, soft-capping.

Written with ``tl`` alone (no libdevice), so that one source runs on NVIDIA, AMD and in the interpreter. Everything is
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "activate_backward", "cdiv", "next_power_of_two", "tanh"]


def cdiv(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The least power of two >= n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|), which never overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """act(x) by the project's names; "" is the identity."""
    if NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "relu":
        x = tl.where(x > 0, x, 0.0) + tl.where(x != x, x, 0.0)  # a NaN stays one
    return x


@triton.jit
def activate_backward(x, NAME: tl.constexpr):
    """act'(x)."""
    if NAME == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = tanh(u)
        d = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    elif NAME == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        d = s + 1.702 * x * s * (1.0 - s)
    elif NAME == "silu":
        s = tl.sigmoid(x)
        d = s + x * s * (1.0 - s)
    elif NAME == "relu":
        d = tl.where(x > 0, 1.0, 0.0)
    else:
        d = tl.full(x.shape, 1.0, tl.float32)
    return d
