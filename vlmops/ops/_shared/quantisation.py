"""Weights kept in 8 or 4 bits, and the e4m3 rounding that the fp8 options share.

Formats: symmetric int8 with one scale an output row (LLM.int8, Dettmers et al. 2022) or a group of columns; int4 with a scale
and a zero-point for each group (GPTQ, Frantar et al. 2022; AWQ, Lin et al. 2023); fp8 e4m3 with one scale an output row
(Micikevicius et al. 2022). All round to nearest; nothing here calibrates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.cost import nbytes

__all__ = [
    "BLOCK",
    "E4M3_MAX",
    "KINDS",
    "QuantizedWeight",
    "dequantized",
    "power_of_two_scale",
    "quantize_weight",
    "round_e4m3",
]

KINDS = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
#: Rows are padded to a multiple of this many columns: what a kernel reads at once, and what one int4 block holds.
BLOCK = 128
E4M3_MAX = 448.0


def padded(columns: int) -> int:
    """Columns of a stored row: the next multiple of BLOCK, at least one."""
    return max(1, -(-columns // BLOCK)) * BLOCK


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] in few bits: row n, column k stands for (code - zero) * scale. Made by ``quantize_weight``.

    Args:
        kind: "int8", "int4" or "fp8".
        data: the codes, contiguous; a row holds K' columns, K rounded up to a multiple of 128, of which those past K are 0.
            int8 [N, K'] int8; fp8 [N, K'] float8_e4m3fn; int4 [N, K' / 2] uint8: byte 64 b + j holds column 128 b + j in its
            low half and column 128 b + 64 + j in its high half, so that both halves are runs of consecutive columns.
        scale: float32 [groups, N] (each group's scales lie together: kernels read them for a run of rows).
        zero: uint8 [groups, N] of 0 .. 15 for an asymmetric int4 weight; None: 8 for int4, 0 for the others.
        group_size: columns that share a scale; None: all (one group).
        shape: (N, K).
        dtype: of the weight it was made from.

    Raises:
        TypeError, ValueError: parts that do not fit each other.
    """

    kind: str
    data: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int | None
    shape: tuple[int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_kind(self.kind)
        n, k = self.shape
        checks.check_tensor("data", self.data, dim=2)
        if self.data.dtype != KINDS[self.kind]:
            raise TypeError(
                f"data: expected {str(KINDS[self.kind])[6:]} for {self.kind}, got {checks.describe(self.data)}"
            )
        checks.check_shape("data", self.data, (n, padded(k) // (2 if self.kind == "int4" else 1)))
        groups = check_group_size(self.group_size, k)
        checks.check_tensor("scale", self.scale)
        if self.scale.dtype != torch.float32:
            raise TypeError(f"scale: expected float32, got {checks.describe(self.scale)}")
        checks.check_shape("scale", self.scale, (groups, n), f"[{groups}, {n}] ([groups, N])")
        checks.check_same_device("scale", self.scale, self.data.device, "data")
        if self.zero is not None:
            checks.check_tensor("zero", self.zero)
            if self.kind != "int4" or self.zero.dtype != torch.uint8:
                raise TypeError(
                    f"zero: expected uint8, with int4 only, got {checks.describe(self.zero)} with {self.kind}"
                )
            checks.check_shape("zero", self.zero, (groups, n), f"[{groups}, {n}] ([groups, N])")
            checks.check_same_device("zero", self.zero, self.data.device, "data")

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero-points."""
        return nbytes(self.data, self.scale, self.zero)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), zero=zero)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[N, K] in ``dtype``; None: the dtype it was made from."""
        return dequantized(self.data, self.scale, self.zero, self.kind, self.group_size or 0, self.shape[1]).to(
            self.dtype if dtype is None else dtype
        )


def check_kind(kind: str) -> None:
    """ValueError unless one of the three."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")


def check_group_size(size: int | None, columns: int) -> int:
    """Groups a row has, those of the padding included; ValueError unless a block is whole groups or a group whole blocks."""
    if size is None:
        return 1
    if size not in (32, 64) and (size <= 0 or size % BLOCK):
        raise ValueError(f"group_size: expected 32, 64, a multiple of {BLOCK} or None, got {size}")
    return -(-padded(columns) // size)


def codes(data: Tensor, kind: str) -> Tensor:
    """[N, K'] codes of packed data (fp8 also as bytes): int4 as uint8 0 .. 15."""
    if kind != "int4":
        return data.view(KINDS[kind])
    n, width = data.shape
    blocks = data.view(n, 2 * width // BLOCK, BLOCK // 2)
    return torch.stack((blocks & 15, blocks >> 4), dim=2).view(n, 2 * width)


def dequantized(
    data: Tensor, scale: Tensor, zero: Tensor | None, kind: str, group_size: int, columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """[N, K] (codes - zero) * scale, computed in ``dtype`` (float32 or float64). ``group_size`` 0: one group."""
    numbers = codes(data, kind).to(dtype)  # [N, K']
    groups, n = scale.shape
    size = group_size or numbers.shape[1]
    if numbers.shape[1] % size:  # a last group that reaches past the padding
        numbers = torch.nn.functional.pad(numbers, (0, groups * size - numbers.shape[1]))
    numbers = numbers.view(n, groups, size)
    if kind == "int4":
        numbers = numbers - (8.0 if zero is None else zero.t().to(dtype)[..., None])
    return (numbers * scale.t().to(dtype)[..., None]).view(n, groups * size)[:, :columns]


def quantize_weight(
    weight: Tensor, kind: str, *, group_size: int | None = None, symmetric: bool = False
) -> QuantizedWeight:
    """A weight in 8 or 4 bits, each code the nearest. An accuracy option: the product with it is not exact.

    The largest error of an element is half a step: 1/254 of the largest magnitude of its row or group with int8, 1/30 of the
    range of its group (0 always inside) with int4, 1/14 of its largest magnitude with symmetric int4. With fp8 it is 1/16 of
    the element itself, or 1/2^18 of the row's largest magnitude where that is more.

    Args:
        weight: [N, K] float32, bfloat16, float16 or float64, as ``nn.Linear`` holds it. On a GPU this call waits for it.
        kind: "int8", "int4" or "fp8" (e4m3).
        group_size: columns that share a scale: 32, 64 or a multiple of 128; K need not be a multiple (the last group is
            shorter). None: the kind's own: the whole row with int8 and fp8, 128 with int4. Nothing else with fp8.
        symmetric: int4 only: no zero-points, codes -7 .. 7.

    Returns:
        QuantizedWeight on weight's device.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape; NaN or infinity in the weight.

    Source: the formats named in this module's first lines.
    """
    check_kind(kind)
    checks.check_tensor("weight", weight, dim=2, layout="[N, K]")
    checks.check_floating("weight", weight)
    if kind == "fp8" and group_size is not None:
        raise ValueError(f"group_size: expected None with fp8 (one scale an output row), got {group_size}")
    if symmetric and kind != "int4":
        raise ValueError(f"symmetric: int4 only ({kind} always is)")
    if kind == "int4" and group_size is None:
        group_size = BLOCK
    n, k = weight.shape
    groups = check_group_size(group_size, k)
    w = weight.detach()
    if not bool(torch.isfinite(w).all()):
        raise ValueError(f"weight: NaN or infinity in {checks.describe(weight)}, which no code stands for")
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    width = groups * group_size if group_size else padded(k)
    parts = torch.nn.functional.pad(w, (0, width - k)).view(n, groups, width // groups)  # [N, groups, size]
    zero = None
    if kind == "int4" and not symmetric:
        low, high = parts.amin(2).clamp(max=0.0), parts.amax(2).clamp(min=0.0)
        scale = _step(high - low, 15.0)
        zero = (-low / scale).round().clamp(0, 15)  # [N, groups]
        found = ((parts / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    else:
        most = {"int8": 127.0, "int4": 7.0, "fp8": E4M3_MAX}[kind]
        scale = _step(parts.abs().amax(2), most)
        found = (parts / scale[..., None]).clamp(-most, most)
        found = found if kind == "fp8" else found.round() + (8 if kind == "int4" else 0)
    data = found.view(n, width)[:, : padded(k)].to(KINDS[kind])
    if kind == "int4":
        halves = data.reshape(n, padded(k) // BLOCK, 2, BLOCK // 2)
        data = (halves[:, :, 0] | halves[:, :, 1] << 4).view(n, padded(k) // 2)
    return QuantizedWeight(
        kind, data.contiguous(), scale.t().contiguous(), None if zero is None else zero.t().to(torch.uint8).contiguous(),
        group_size, (n, k), weight.dtype,
    )  # fmt: skip


def _step(size: Tensor, codes: float) -> Tensor:
    """float32 size / codes, never 0: a group of zeros, or of numbers too small for a step, has 1."""
    step = (size / codes).float()
    return torch.where(step < torch.finfo(torch.float32).tiny, 1.0, step)


# -- e4m3 for numbers that are not known ahead -------------------------------------------------------------------------


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The least power of two (at least 2^-126) that brings these magnitudes to e4m3's 448, in their dtype.

    A power of two, because e4m3 is a floating format: dividing by it rounds nothing, so every backend finds the same codes.
    """
    fraction, exponent = torch.frexp(largest)
    exponent = exponent - 9 + (fraction > 0.875).to(exponent.dtype)  # 448 = 0.875 * 2^9
    return torch.ldexp(torch.ones_like(largest), exponent.clamp(min=-126))


def finite_max(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Largest magnitude among the finite elements, 0 where there are none."""
    if x.numel() == 0:
        return x.new_zeros(x.abs().sum(dim, keepdim=keepdim).shape)
    return torch.where(x.isfinite(), x, 0.0).abs().amax(dim, keepdim=keepdim)


def round_e4m3(x: Tensor) -> Tensor:
    """x (within +-448) to the nearest e4m3 number, in x's dtype; an infinity becomes NaN, as e4m3 has none."""
    return torch.where(x.isfinite(), x, float("nan")).to(torch.float8_e4m3fn).to(x.dtype)
