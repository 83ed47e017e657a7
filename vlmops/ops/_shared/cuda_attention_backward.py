"""What the CUDA backwards of the attentions share: the sizes of a block, the numbers of each row, what they take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, i32, i64
from vlmops.ops._shared.cuda_attention import THREADS, WARPS, aligned, tiles_are_few

__all__ = ["GradShape", "grad_shape", "gradient_fits", "gradient_of", "row_stats"]

MAX_HEAD_DIM = 128  # dk and dv of larger heads do not fit a warp's registers
STATS_ROWS = 32 * WARPS  # rows of a block of attention_stats


@dataclass(frozen=True)
class GradShape:
    """Sizes of a block's work.

    Args:
        atoms: times 16 rows (dq) or keys (dk and dv) of a warp.
        others: keys, or rows, of a tile that passes.
        step: of those, how many have their scores in registers at once.
    """

    atoms: int
    others: int
    step: int

    @property
    def own(self) -> int:
        """Rows or keys of a block."""
        return WARPS * 16 * self.atoms

    def shared(self, dim: int, keys: bool) -> int:
        """Bytes of shared memory; ``keys``: of dk and dv, which have two numbers of each passing row there too."""
        return 4 * (self.own + 2 * self.others) * dim + (16 * self.others if keys else 0)

    def defines(self, q: Tensor) -> tuple[tuple[str, int | str], ...]:
        """The specialisation for q [T, H, D]."""
        return (
            ("T", CTYPE[q.dtype]),
            ("D", q.shape[2]),
            ("ATOMS", self.atoms),
            ("OTHERS", self.others),
            ("STEP", self.step),
        )


def gradient_fits(q: Tensor) -> bool:
    """Whether these kernels take the gradient of an attention with queries q [T, H, D] that the forward takes."""
    return q.shape[2] <= MAX_HEAD_DIM


def grad_shape(q: Tensor, sequences: int, longest: int, keys: bool) -> GradShape:
    """The block for q [T, H, D] (dq), or with ``keys`` for keys of that shape (dk and dv).

    Args:
        sequences: how many.
        longest: rows (keys) of the longest sequence, if known on the host, or <= 0.
    """
    dim = q.shape[2]
    if tiles_are_few(q, sequences, longest) or dim > (
        64 if keys else 96
    ):  # two atoms of larger heads do not fit the registers
        return GradShape(1, 32, 32)
    return GradShape(2, 32, 32 if dim <= 64 and not keys else 16)


def row_stats(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Plan]:
    """stats float32 [H, T, 2] of each row, {log2(e) lse, rowsum(grad_out * out) - grad_lse}, and the launch that writes them.

    Args:
        out, grad_out: [T, H, D], aligned.
        lse, grad_lse: float32 [H, T]; grad_lse or None.
    """
    tokens, heads, dim = out.shape
    stats = torch.empty(heads, tokens, 2, dtype=torch.float32, device=out.device)
    plan = Plan(
        "attention_stats.cu", "attention_stats", (("T", CTYPE[out.dtype]), ("D", dim)),
        (-(-tokens // STATS_ROWS), heads, 1), THREADS,
        (out, grad_out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), Out(stats),
         i64(out.stride(0)), i64(out.stride(1)), i64(grad_out.stride(0)), i64(grad_out.stride(1)), i32(tokens)),
    )  # fmt: skip
    return stats, plan


def gradient_of(out: Tensor, grad: Tensor | None) -> Tensor:
    """The gradient of out [T, H, D] as the kernels read it; zeros for None."""
    return torch.zeros_like(out) if grad is None else aligned(grad)
