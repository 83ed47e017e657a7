"""Matrix products on the CPU through oneDNN with packed weights, as torch's own compiler uses it.

float32 runs in its own precision, bfloat16 too where oneDNN has it. float16 has no matrix instructions on most CPUs, and
bfloat16 has none on those with AVX2 only (torch falls to a fifth of float32 speed or less): such weights are packed as
float32, which is exact, and the result is rounded once.

Up to ``FEW_ROWS`` rows are a stream of the weight and nothing else: a native kernel reads the parameter itself, in order,
and widens its elements in registers, so bfloat16 costs half of float32 on every processor and nothing is packed.

oneDNN can also add or multiply by a second matrix in the product, but that is 3 to 10% slower than one more pass over
the product (measured, 1 thread, float32 and bfloat16), so ``finish`` is that pass.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vlmops.backends import native
from vlmops.ops._shared.activations import activate
from vlmops.ops._shared.packing import STORE

__all__ = ["FEW_ROWS", "chunks", "finish", "gemm", "product", "streams", "why_not_gemm", "widened"]

ROWS_HINT = 512  # one packed layout serves every row count (measured equal or better from 1 to 4096 rows)
SMALLEST = 16  # a weight with a side under this is not worth a packed copy
#: What oneDNN fuses into the product: name -> (attr, algorithm). Not its relu, which makes 0 of NaN.
FUSED = {
    "": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}

#: The same for few rows: name -> number (csrc/cpu/few_rows.h).
STREAMED = {"": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}
#: Rows up to which a product is a stream of the weight.
FEW_ROWS = 8

native.define("few_rows(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor(a!) out) -> ()")
native.define(
    "epilogue(Tensor product, Tensor(a!) out, bool quick_gelu, Tensor? scale, Tensor? row_mask, Tensor? residual) -> ()"
)


@lru_cache(maxsize=1)
def _has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widened(dtype: torch.dtype) -> bool:
    """Whether products of this dtype run in float32, on weights packed as float32."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not _has_bf16())


def why_not_gemm(x: Tensor, *weights: Tensor) -> str | None:
    """Why ``gemm`` cannot run; None if it can."""
    if x.device.type != "cpu":
        return f"a tensor on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(x.dtype)[6:]} (float32, bfloat16 and float16 only)"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "torch has no oneDNN"
    if x.numel() == 0:
        return "no rows"
    for w in weights:
        if w.dtype != x.dtype or not w.is_contiguous() or w.is_meta or min(w.shape[0], w[0].numel()) < SMALLEST:
            return f"a weight that is not contiguous, not {str(x.dtype)[6:]} or under {SMALLEST} wide: {list(w.shape)}"
    return None


def _pack(weight: Tensor) -> Tensor:
    weight = weight.flatten(1)  # a convolution whose kernel is its stride is a product, too
    return torch.ops.mkldnn._reorder_linear_weight(weight.float() if widened(weight.dtype) else weight, ROWS_HINT)


def streams(x: Tensor) -> bool:
    """Whether a product of x [rows, K] is a stream of the weight: few rows, and a processor that widens in registers."""
    return x.shape[0] <= FEW_ROWS and native.available() and native.isa() != "generic"


def _stream(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """``product`` of few rows, in float32 or the weight's dtype. x: float32 or the weight's dtype."""
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    torch.ops.vlmops_cpu.few_rows.default(x, weight.detach().flatten(1), bias, STREAMED[activation], out)
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    """act(x W^T + b) with a packed weight; no gradient.

    Args:
        x: [rows, K] contiguous in weight's dtype; float32 where that is ``widened``.
        weight: [N, K], or [N, ...] with K elements a row.
        bias: [N] in weight's dtype, or None.
        activation: one of ``FUSED``.

    Returns:
        [rows, N] in x's dtype.
    """
    if streams(x):
        return _stream(x, weight, bias, activation, x.dtype)
    packed = STORE.get(weight, "onednn", _pack)
    if packed is None:
        packed = weight.detach().flatten(1)
    if widened(weight.dtype):
        packed = packed.float() if packed.dtype == weight.dtype else packed
        bias = None if bias is None else bias.float()
    attr, algorithm = FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, attr, [], algorithm)


def finish(
    y: Tensor, out: Tensor, activation: str = "", scale: Tensor | None = None, row_mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out = residual + row_mask * scale * act(y), in one pass.

    Args:
        y: [rows, N] contiguous, overwritten.
        out: [rows, N] contiguous, float16 or bfloat16 where y is float32, else like y; may be y.
        activation: "quick_gelu", "relu" or "".
        scale: scalar or [N].
        row_mask: bool [rows].
        residual: [rows, N] in out's dtype.
    """
    if activation == "relu":
        torch.relu_(y)
        activation = ""
        if y is out and scale is None and row_mask is None and residual is None:
            return out
    if native.available():
        torch.ops.vlmops_cpu.epilogue.default(y, out, activation == "quick_gelu", scale, row_mask, residual)
        return out
    y = activate(y, activation)
    if scale is not None:
        y *= scale
    if row_mask is not None:
        y.masked_fill_(~row_mask[:, None], 0.0)
    if residual is not None:
        y += residual
    return out if y is out else out.copy_(y)


def chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """Equal (first, last) runs of at most ``most`` rows."""
    count = max(1, -(-rows // most))
    return [(rows * i // count, rows * (i + 1) // count) for i in range(count)]


#: Rows of a widened product at once: bounds its float32 copies.
HALF_ROWS = 1024


def gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "", residual: Tensor | None = None,
    *, scale: Tensor | None = None, row_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + row_mask * scale * act(x W^T + b) with a packed weight; no gradient.

    Args:
        x: [rows, K] contiguous; float32, bfloat16, or float16.
        weight: [N, K] parameter, same dtype.
        bias: [N] or None.
        activation: a name of ``ACTIVATIONS`` or "".
        residual: [rows, N] or None.
        scale: scalar or [N], or None.
        row_mask: bool [rows] or None.

    Returns:
        [rows, N] in x's dtype.
    """
    fused, late = (activation, "") if activation in FUSED else ("", activation)
    plain = not late and residual is None and scale is None and row_mask is None
    if streams(x):
        if plain:
            return _stream(x, weight, bias, fused, x.dtype)
        y = _stream(x, weight, bias, fused, torch.float32)
        return finish(
            y, y if x.dtype == torch.float32 else torch.empty_like(y, dtype=x.dtype), late, scale, row_mask, residual
        )
    if not widened(x.dtype):
        y = product(x, weight, bias, fused)
        return y if plain else finish(y, y, late, scale, row_mask, residual)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for first, last in chunks(x.shape[0], HALF_ROWS):
        y = product(x[first:last].float(), weight, bias, fused)
        finish(
            y, out[first:last], late, scale, None if row_mask is None else row_mask[first:last],
            None if residual is None else residual[first:last],
        )  # fmt: skip
    return out
