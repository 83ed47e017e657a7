"""One Triton pass: read, rotate in float32, round, write; the gradient is the same kernel with the transposed rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_math import cdiv, next_power_of_two
from vlmops.ops.rotary.triton_kernels import rotary_kernel

BLOCKS = ((1, 4), (2, 2), (2, 4), (4, 2), (4, 4), (8, 2), (8, 4), (16, 4))  # tokens, heads of a step


def configs(x: Tensor, half: int) -> list[Config]:
    """Blocks by how near they are to 16 bytes a thread and load, the nearest first."""
    wanted = 128 * 16 // x.element_size()
    pairs = next_power_of_two(half)
    ranked = sorted(BLOCKS, key=lambda b: (abs(b[0] * b[1] * pairs - wanted), -b[0]))
    return [Config.of(BT=tokens, BH=heads) for tokens, heads in ranked[:4]]


def supports(x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """Why this kernel cannot run these arguments; None if it can."""
    return triton_runtime.why_not(x)


def forward(x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[T, H, D] in x's dtype, of x and of k (empty without one)."""
    return rotate_heads(x, k, cos, sin, interleaved, False)


def rotate_heads(
    x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """x and k rotated (rotated back with ``inverse``); the attentions call it in front of their own kernels."""
    x, cos, sin = dense_rows(x), dense_rows(cos), dense_rows(sin)
    k = None if k is None else dense_rows(k)
    (tokens, heads, dim), half = x.shape, cos.shape[1] // 2
    out, out_k = x.new_empty(x.shape), x.new_empty(0 if k is None else k.shape)
    heads_k = 0 if k is None else k.shape[1]

    def run(config: Config) -> None:
        triton_runtime.launch(
            rotary_kernel, (cdiv(tokens, config["BT"]),), x, x if k is None else k, cos, sin, out, out_k, tokens,
            x.stride(0), x.stride(1), 0 if k is None else k.stride(0), 0 if k is None else k.stride(1), cos.stride(0),
            sin.stride(0), heads, heads_k, DIM=dim, HALF=half, PAIRS=next_power_of_two(half),
            TAIL=next_power_of_two(dim - 2 * half) if dim > 2 * half else 0, INTERLEAVED=interleaved, INVERSE=inverse,
            config=config,
        )  # fmt: skip

    run(triton_runtime.pick("rotary", f"{x.dtype} {heads} {heads_k} {dim}", configs(x, half), run, x.device))
    return out, out_k


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
