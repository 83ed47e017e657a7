"""The machine's measured peak: the rate of one large packed oneDNN product, timed beside what is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmops.ops._shared.gemm_cpu import widened
from vlmops.profiling.bars import PEAK_SHAPE, random_tensor
from vlmops.profiling.timing import Work

__all__ = ["PEAK_WORK", "packed_linear", "packed_sequence", "peak_call"]

PEAK_WORK = Work(2.0 * PEAK_SHAPE[0] * PEAK_SHAPE[1] * PEAK_SHAPE[2])


def packed_linear(weight: Tensor, rows: int, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b with W packed once by oneDNN; plain ``F.linear`` where oneDNN cannot.

    A 16-bit type that oneDNN has no products of is packed as float32, the fastest there is: a peak of emulated products
    would make every bar easy.

    Args:
        weight: [N, K].
        rows: rows x will have.
        bias: [N] or None.
    """
    if not torch.backends.mkldnn.is_available() or weight.dtype == torch.float64:
        return lambda x: F.linear(x, weight, bias)
    if widened(weight.dtype):
        wide = packed_linear(weight.float(), rows, None if bias is None else bias.float())
        return lambda x: wide(x.float()).to(weight.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@lru_cache(maxsize=4)
def peak_call(dtype: torch.dtype) -> Callable[[], Tensor]:
    """The product whose rate is called G."""
    m, k, n = PEAK_SHAPE
    x = random_tensor(m, k, dtype=dtype, seed=1)
    product = packed_linear(random_tensor(n, k, dtype=dtype, seed=2), m)
    return lambda: product(x)


def packed_sequence(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> tuple[Callable[[], Tensor], Work]:
    """A model's packed products alone, one behind the other: the time no kernel around them can beat.

    Args:
        shapes: (rows, K, N) of each product; each gets a weight of its own, as the layers of a model have.
        dtype: of all.

    Returns:
        The call, and its work.
    """
    inputs = {(m, k): random_tensor(m, k, dtype=dtype, seed=m + k) for m, k, _ in shapes}
    calls = [
        (packed_linear(random_tensor(n, k, dtype=dtype, seed=i, scale=k**-0.5), m), inputs[m, k])
        for i, (m, k, n) in enumerate(shapes)
    ]

    def run() -> Tensor:
        for product, x in calls:
            out = product(x)
        return out

    return run, Work(float(sum(2 * m * k * n for m, k, n in shapes)))
