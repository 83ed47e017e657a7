"""e4m3 in Triton kernels: by the hardware's own type where there is one, else by arithmetic on the same numbers.

``NATIVE`` kernels hold float8e4nv (NVIDIA from sm_89 on). Elsewhere (sm_80; AMD's gfx942, whose own e4m3 has another bias and
no negative zero) weights are decoded from their bytes, and numbers are rounded to e4m3's in float32 and kept in float16, which
holds each exactly: the same answers at float16's speed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmops.backends import triton_runtime

__all__ = ["decode", "finite_max", "native", "power_of_two_scale", "round_e4m3"]


def native(x: Tensor) -> bool:
    """Whether kernels on x's GPU may hold float8e4nv."""
    return triton_runtime.capability(x) >= 89


@triton.jit
def decode(bits):
    """float16 of e4m3 bytes (uint8) without NaN: the exponents' biases differ by 8, subnormals included."""
    wide = bits.to(tl.int16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def finite_max(x, AXIS: tl.constexpr):
    """Largest magnitude along an axis, float32; NaN and infinities count as 0."""
    size = tl.abs(x)
    return tl.max(tl.where(size < float("inf"), size, 0.0), AXIS)


@triton.jit
def power_of_two_scale(largest):
    """The least power of two (at least 2^-126) that brings float32 magnitudes to 448, and its reciprocal."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)  # 448 = 1.75 * 2^8; biased by 127
    exponent = tl.maximum(exponent, 1)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_e4m3(x, NATIVE: tl.constexpr):
    """float32 x (within +-448) to the nearest e4m3 number, as float8e4nv or float16; infinities become NaN."""
    x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))
    if NATIVE:
        low = x.to(tl.float8e4nv)
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three bits of fraction, to nearest even
        fine = (x + 24576.0) - 24576.0  # below 2^-6 in steps of 2^-9: float32's own at 1.5 * 2^14
        near = tl.where(tl.abs(x) < 0.015625, fine, bits.to(tl.float32, bitcast=True))
        low = tl.where(x == x, near, x).to(tl.float16)
    return low
