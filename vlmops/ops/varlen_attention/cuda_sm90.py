"""The launch of csrc/cuda/varlen_attention_sm90.cu: TMA and wgmma, for GPUs of capability 9.0. Experimental
(``_shared/cuda_sm90.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, TensorMap, f32, i32
from vlmops.ops._shared import cuda_sm90
from vlmops.ops._shared.cuda_attention import sequence_slots

__all__ = ["DIMS", "plan", "wanted"]

ROWS, KEYS, WIDE, MOST_STAGES = 128, 128, 64, 2
#: Of a head: what csrc/cuda/mma/sm90.cuh has a product for.
DIMS = (64, 72, 80, 88, 96, 128)


def wanted(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this kernel is asked for and takes these operands: 16-bit, a known head size, rows 16-byte aligned."""
    return (
        cuda_sm90.asked(q) and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in DIMS
        and all(TensorMap.why_not(t) is None for t in (q, k, v))
    )  # fmt: skip


def plan(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    prefix_lens: Tensor | None, max_seqlen_q: int, bounds: list[int], softcap: bool, scaled: tuple[float, float],
) -> Plan:  # fmt: skip
    """The launch; ``cu_seqlens`` and ``prefix_lens`` are int32 and dense, ``bounds``: the window, ``scaled``: as in cuda.py."""
    (tokens, heads, dim), n = q.shape, cu_seqlens_q.shape[0] - 1
    slots, per_sequence = sequence_slots(tokens, n, max_seqlen_q, ROWS)
    row = -(-dim // WIDE) * WIDE * q.element_size()  # bytes of a token in shared memory
    count = cuda_sm90.stages(q, 2 * KEYS * row, MOST_STAGES, ROWS * row)
    return Plan(
        "varlen_attention_sm90.cu", "varlen_attention_sm90",
        (("T", CTYPE[q.dtype]), ("D", dim), ("BN", KEYS), ("STAGES", count), ("SOFTCAP", softcap)),
        (slots, heads if n else 0, 1), cuda_sm90.THREADS,
        (TensorMap(q, (ROWS, 1, WIDE)), TensorMap(k, (KEYS, 1, WIDE)), TensorMap(v, (KEYS, 1, WIDE)), Out(out), Out(lse),
         cu_seqlens_q, cu_seqlens_k, prefix_lens, i32(tokens), i32(k.shape[0]), i32(n), i32(heads // k.shape[1]),
         i32(per_sequence), i32(bounds[0]), i32(bounds[1]), f32(scaled[0]), f32(scaled[1])),
        cuda_sm90.ALIGN + ROWS * row + count * 2 * KEYS * row, "sm90a",
    )  # fmt: skip
