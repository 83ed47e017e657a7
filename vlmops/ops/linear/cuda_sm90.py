"""The launch of csrc/cuda/linear_sm90.cu: TMA and wgmma, for GPUs of capability 9.0. Experimental (``_shared/cuda_sm90.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_plan import Scalar
from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, TensorMap
from vlmops.ops._shared import cuda_sm90

__all__ = ["columns", "plan", "wanted"]

ROWS, STEP, MOST_STAGES = 128, 64, 4
FLAT = 16  # rows up to which linear.cu's flat tile pads less


def wanted(x: Tensor, weight: Tensor, m: int, n: int, k: int) -> bool:
    """Whether this kernel is asked for and takes these operands: 16-bit, rows 16-byte aligned, more than 16 of them."""
    return (
        cuda_sm90.asked(x) and x.dtype in (torch.bfloat16, torch.float16) and m > FLAT and k > 0
        and TensorMap.why_not(x) is None and TensorMap.why_not(weight) is None
        and -(-m // ROWS) * -(-n // 128) < 2**31
    )  # fmt: skip


def columns(m: int, n: int, processors: int) -> int:
    """Of a tile: 256, where that still leaves every SM one."""
    return 256 if -(-m // ROWS) * (n // 256) >= processors else 128


def plan(
    x: Tensor, weight: Tensor, others: tuple[Tensor | Out | None, ...], scalars: tuple[Scalar, ...], activation: str, scale: bool,
    each: int,
) -> Plan:  # fmt: skip
    """The launch; ``others``: bias, gate, mask, residual, out; ``scalars``: the residual's stride, m, n, k, the gate's step."""
    m, n = x.shape[0], weight.shape[0]
    processors = cuda_runtime.processors(x)
    bn = columns(m, n, processors)
    size = (ROWS + bn) * STEP * x.element_size()
    count = cuda_sm90.stages(x, size, MOST_STAGES)
    tiles = -(-m // ROWS) * -(-n // bn)
    return Plan(
        "linear_sm90.cu", "linear_gemm_sm90",
        (("T", CTYPE[x.dtype]), ("ACT", activation or "none"), ("SCALE", scale), ("BN", bn), ("STAGES", count), ("OUT", each)),
        (min(tiles, processors), 1, 1), cuda_sm90.THREADS,
        (TensorMap(x, (ROWS, STEP)), TensorMap(weight, (bn, STEP)), *others, *scalars), cuda_sm90.ALIGN + count * size, "sm90a",
    )  # fmt: skip
