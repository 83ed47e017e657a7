"""CUDA C++ for the sm_80 class: cross attention's gradients (csrc/cuda/cross_attention_backward.cu), without atomics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import Out, Plan, f32, i32, i64
from vlmops.ops._shared.cuda_attention import THREADS, aligned, score_scales
from vlmops.ops._shared.cuda_attention_backward import (
    grad_shape,
    gradient_fits,
    gradient_of,
    row_stats,
)
from vlmops.ops.cross_attention import composition
from vlmops.ops.cross_attention.key_ranges import key_ranges
from vlmops.ops.varlen_attention import cuda_backward as packed

__all__ = ["backward"]

RUN_BYTES = 8  # of a row's run, in shared memory
ROWS = 32  # of a tile that passes keys: a lane looks at each row's run
FAR = 2**31 - 1


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v; also takes a gradient of lse. Larger heads than these kernels take: the ``torch`` backend's."""
    q, k, v, cu_q, cu_k, media_index, scale = args
    if not gradient_fits(q):
        return composition.backward(grads, outs, args, needs)
    if media_index is None:
        packed_args = [q, k, v, cu_q, cu_k, -1, -1, scale, False, -1, -1, None, 0.0, None, None, None, None, False]
        return packed.backward(grads, outs, packed_args, needs)
    out, lse = outs
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    q, k, v, grad_out = aligned(q), aligned(k), aligned(v), gradient_of(out, grads[0])
    stats, first = row_stats(aligned(out), grad_out, lse, grads[1])
    runs = torch.stack(key_ranges(media_index, cu_k), 1).int()
    strides = [i64(x.stride(i)) for x in (q, k, v, grad_out) for i in (0, 1)]
    numbers = (i32(tq), i32(tk), i32(heads // kv_heads), f32(scale), f32(score_scales(scale, 0.0)[0]))
    dq, dk, dv = q.new_empty(tq, heads, dim), k.new_empty(tk, kv_heads, dim), v.new_empty(tk, kv_heads, dim)
    plans = [first]
    if needs[1] or needs[2]:
        block = grad_shape(k, 1, -1, True)
        plans.append(Plan(
            "cross_attention_backward.cu", "cross_attention_dkdv", block.defines(q), (-(-tk // block.own), kv_heads, 1),
            THREADS, (q, k, v, grad_out, stats, Out(dk), Out(dv), runs, hulls(runs), *strides, *numbers),
            block.shared(dim, True) + 2 * RUN_BYTES * ROWS,
        ))  # fmt: skip
    if needs[0]:
        block = grad_shape(q, 1, -1, False)
        plans.append(Plan(
            "cross_attention_backward.cu", "cross_attention_dq", block.defines(q), (-(-tq // block.own), heads, 1), THREADS,
            (q, k, v, grad_out, stats, Out(dq), runs, *strides, *numbers), block.shared(dim, False) + RUN_BYTES * block.own,
        ))  # fmt: skip
    cuda_runtime.run(plans)
    return [dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None]


def hulls(runs: Tensor) -> Tensor:
    """int32 [tiles, 2]: from the first key to behind the last that some row of each tile of ROWS sees, of runs [Tq, 2]."""
    begin, end = runs.unbind(1)
    some = begin < end
    room = -runs.shape[0] % ROWS
    begin = functional.pad(torch.where(some, begin, FAR), (0, room), value=FAR).view(-1, ROWS).amin(1)
    end = functional.pad(torch.where(some, end, 0), (0, room)).view(-1, ROWS).amax(1)
    return torch.stack((begin, end), 1)
