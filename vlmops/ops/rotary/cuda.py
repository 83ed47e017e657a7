"""CUDA C++: one pass over the heads of x and k (csrc/cuda/rotary.cu); the gradient is the same kernel, rotating back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, i32, i64, vector
from vlmops.ops._shared.strides import dense_rows

THREADS = 128
STAGED_BYTES = 16 << 10  # of heads in shared memory a block: a dozen blocks fit an SM
MAX_DIM = 1024


def supports(x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """Why this kernel cannot run these arguments; None if it can."""
    if x.shape[2] > MAX_DIM:
        return f"heads of {x.shape[2]} elements (at most {MAX_DIM})"
    return cuda_runtime.why_not(x)


def forward(x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[T, H, D] in x's dtype, of x and of k (empty without one)."""
    return rotate_heads(x, k, cos, sin, interleaved, False)


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x and k: the transpose of the rotation, again one pass."""
    _, _, cos, sin, interleaved = args
    wanted = [i for i, grad in enumerate(grads) if needs[i] and grad is not None]
    found: list[Tensor | None] = [None, None]
    if wanted:
        pair = [grads[i] for i in wanted] + [None]
        assert pair[0] is not None
        for i, grad in zip(wanted, rotate_heads(pair[0], pair[1], cos, sin, interleaved, True), strict=False):
            found[i] = grad
    return found


def rotate_heads(
    x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """x and k rotated (rotated back with ``inverse``)."""
    if cos.dtype != sin.dtype or cos.dtype not in (x.dtype, torch.float32):
        cos, sin = cos.float(), sin.float()
    x, cos, sin = dense_rows(x), dense_rows(cos), dense_rows(sin)
    k = None if k is None else dense_rows(k)
    out, out_k = x.new_empty(x.shape), x.new_empty(0 if k is None else k.shape)
    cuda_runtime.run([plan(x, k, cos, sin, out, out_k, interleaved, inverse)])
    return out, out_k


def plan(
    x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, out: Tensor, out_k: Tensor, interleaved: bool, inverse: bool
) -> Plan:
    """The launch. All tensors dense in their last dimension, both tables of one dtype: x's or float32."""
    (tokens, heads, dim), turned = x.shape, cos.shape[1]
    heads_k = 0 if k is None else k.shape[1]
    vec, table_vec = vector([x, k], [dim]), vector([cos, sin], [turned])
    per_head = dim // vec
    threads = max(THREADS, -(-per_head // 32) * 32)

    # Heads of a block: all of them, or as many as its shared memory holds, in equal shares.
    staged = not interleaved or vec == 1
    most = max(1, STAGED_BYTES // (dim * x.element_size())) if staged else 4096
    chunks = max(1, -(-(heads + heads_k) // most))
    chunk = max(1, -(-(heads + heads_k) // chunks))
    passes = -(-chunk // (threads // per_head))
    group = -(-chunk // passes) * per_head  # threads of a token
    per_block = max(1, min(threads // group, tokens))
    table_bytes = -(-2 * per_block * turned * cos.element_size() // 32) * 32
    return Plan(
        "rotary.cu", "rotary_heads",
        (("T", CTYPE[x.dtype]), ("C", CTYPE[cos.dtype]), ("D", dim), ("R", turned), ("VEC", vec), ("CVEC", table_vec),
         ("INTERLEAVED", interleaved)),
        (-(-tokens // per_block), chunks if heads + heads_k else 0, 1), threads,
        (x, k, cos, sin, Out(out), None if k is None else Out(out_k), i64(x.stride(0)), i64(x.stride(1)),
         i64(0 if k is None else k.stride(0)), i64(0 if k is None else k.stride(1)), i64(cos.stride(0)), i64(sin.stride(0)),
         i32(tokens), i32(heads), i32(heads_k), i32(per_block), i32(group), i32(chunk), i32(int(inverse))),
        table_bytes + (per_block * chunk * dim * x.element_size() if staged else 0),
    )  # fmt: skip
