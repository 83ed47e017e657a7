"""Triton: logits by tiles that end as two numbers a row; gradients from a bounded piece of them, turned in place.

Without gradients no logit is ever written: a program runs over a row tile and a share of the vocabulary, and keeps a
running maximum and sum (online softmax, Milakov & Gimelshein 2018); O(T) numbers are left. With gradients a piece of
[``chunk_rows``, V] exponentials in the inputs' dtype is held and turned into the logits' gradient in place: three products in
all, as Liger Kernel has it.

Memory beside the results, at T tokens: O(T) without gradients. With them one piece, at most half of the tokens (rounded up to
256) and at most max(256 MiB, 256 rows, the weight) however many come; a tenth of that at most for maxima and sums; the
piece's hidden rows; and, where there are three pieces or more, a float32 sum of the weight's gradient. Tokens that do not count
are sorted behind the others on the device: they cost no product, and nothing computes with their rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_math import cdiv, next_power_of_two
from vlmops.ops.linear_cross_entropy.triton_kernels import (
    combine_kernel,
    dlogits_kernel,
    logits_kernel,
    product_kernel,
    rows_kernel,
)

CHUNK_BYTES = 1 << 28  # logits held at once, where the weight is smaller
LEAST_ROWS = 256  # in a piece: two row tiles
SPLITS = 16  # shares of the vocabulary, at least: their programs fill a GPU and share rows in its L2 cache


def supports(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str,
    softcap: float, label_smoothing: float, z_loss: float, eager_grads: list[bool],
) -> str | None:  # fmt: skip
    """Why these kernels cannot run these arguments; None if they can."""
    return triton_runtime.why_not(hidden)


def chunk_rows(tokens: int, words: int, channels: int, size: int) -> int:
    """Tokens in one piece of logits of ``size`` bytes each; a multiple of ``LEAST_ROWS`` unless all fit.

    As many as the weight has columns keep a piece no larger than the weight, and the passes over its gradient cheap.
    """
    most = max(CHUNK_BYTES // (words * size), channels) // LEAST_ROWS * LEAST_ROWS
    half = cdiv(tokens, 2 * LEAST_ROWS) * LEAST_ROWS
    return min(tokens, max(LEAST_ROWS, min(most, half)))


def tiles(x: Tensor, rows: int, columns: int, depth: int) -> list[Config]:
    """Blocks of a product [rows, depth] x [depth, columns], the default first. x: the hidden rows [T, K]."""
    where, wide = triton_runtime.target(x), x.element_size() == 4
    if wide:
        found, bk = [(64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)], 32
    elif where.backend == "hip":
        found, bk = [(128, 128, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2)], 32
    else:
        found, bk = [(128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4)], 64
    if x.shape[1] % 8:  # no 16-byte loads: their many addresses need the registers of a large tile
        found.insert(0, found.pop())
    bk = max(16, min(bk, next_power_of_two(depth)))
    configs: list[Config] = []
    for bm, bn, warps, stages in found:
        bm, bn = (max(16, min(b, next_power_of_two(n))) for b, n in ((bm, rows), (bn, columns)))
        config = Config.of(BM=bm, BN=bn, BK=bk, GROUP=8, warps=warps if bm * bn > 2048 else 4, stages=stages)
        if config not in configs:
            configs.append(config)
    return configs


def _unit(*sizes: int) -> tuple[int, ...]:
    """Of each size the power of two, up to 16, that divides it."""
    return tuple(math.gcd(16, n) for n in sizes)


class _Problem:
    """One call's arguments, and the kernels on pieces of its tokens."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str,
        softcap: float, label_smoothing: float, z_loss: float, grad: Tensor | None,
    ) -> None:  # fmt: skip
        """``grad``: d loss / d result: None for 1, a number, or [T] for "none"."""
        self.hidden, self.weight = dense_rows(hidden), dense_rows(weight)
        self.bias = None if bias is None else bias.contiguous()
        self.targets = targets.contiguous()
        self.softcap, self.smoothing, self.z_loss = softcap, label_smoothing, z_loss
        self.tokens, self.channels, self.words = hidden.shape[0], hidden.shape[1], weight.shape[0]
        self.width = cdiv(self.words, 16)  # of a row of stored logits, in 16 numbers
        self.grad = None if grad is None else grad.contiguous()
        self.row_grad = self.grad if reduction == "none" else None
        self.loss, self.top = self._numbers(self.tokens), self._numbers(1)
        self.rows, self.count = (hidden.new_empty(n, dtype=torch.int32) for n in (self.tokens, 1))
        triton_runtime.launch(
            rows_kernel, (1,), self.targets, self.top if self.grad is None else self.grad, self.rows, self.count, self.top,
            self.tokens, ignore_index, REDUCTION=reduction, HAS_GRAD=self.grad is not None,
            BLOCK=min(2048, next_power_of_two(self.tokens)), warps=8,
        )  # fmt: skip

    def _numbers(self, *shape: int) -> Tensor:
        return self.hidden.new_empty(shape, dtype=torch.float32)

    def key(self, kernel: str) -> str:
        """What the speed of a product depends on."""
        return (
            f"{kernel} {self.hidden.dtype} {self.channels} {self.words} {self.softcap > 0} {self.tokens.bit_length()}"
        )

    def logits(self, config: Config, first: int, rows: int, stored: Tensor | None) -> list[Tensor]:
        """Losses of tokens [first, first + rows) of the sorted ones.

        Args:
            stored: [rows, 16 * width], to be filled with exponentials of the logits; None: nothing is stored.

        Returns:
            What turns them into a gradient: row maxima [tiles, rows] of each tile, maxima and sums [2, rows] of each
            row, the targets' logits [rows].
        """
        tiles_m, tiles_n = cdiv(rows, config["BM"]), cdiv(self.words, config["BN"])
        per_split = 1
        if stored is None:
            shares = max(SPLITS, cdiv(2 * triton_runtime.processors(self.hidden), tiles_m))
            per_split = cdiv(tiles_n, min(tiles_n, shares))
        splits = cdiv(tiles_n, per_split)
        maxima, sums, norms, picked = (self._numbers(*s) for s in ((splits, rows), (splits, rows), (2, rows), (rows,)))
        totals = self._numbers(splits, rows) if self.smoothing else norms
        units = _unit(self.channels, self.hidden.stride(0), self.weight.stride(0))
        triton_runtime.launch(
            logits_kernel, (tiles_m * splits,), self.hidden, self.weight, self.weight if self.bias is None else self.bias,
            self.targets, self.rows, self.count, maxima if stored is None else stored, maxima, sums, totals, picked, first,
            rows, self.words, self.channels // units[0], self.hidden.stride(0) // units[1],
            self.weight.stride(0) // units[2], self.width, splits, per_split, self.softcap, K_UNIT=units[0],
            H_UNIT=units[1], W_UNIT=units[2], HAS_BIAS=self.bias is not None, SOFTCAP=self.softcap > 0,
            SMOOTH=self.smoothing > 0, STORE=stored is not None, EVEN_K=self.channels % config["BK"] == 0, config=config,
        )  # fmt: skip
        block = min(32, next_power_of_two(rows))
        triton_runtime.launch(
            combine_kernel, (cdiv(rows, block),), maxima, sums, totals, picked, self.rows, self.count, self.loss, norms, first,
            rows, self.words, splits, self.smoothing, self.z_loss, SMOOTH=self.smoothing > 0, BR=block,
            BS=min(32, next_power_of_two(splits)), warps=4,
        )  # fmt: skip
        return [maxima, norms, picked]

    def to_gradient(
        self, config: Config, first: int, rows: int, stored: Tensor, parts: Sequence[Tensor], dbias: Tensor | None
    ) -> None:
        """What ``logits`` stored becomes d loss / d logits; its sums over tokens go to dbias [V]."""
        block, bias = 16, dbias is not None
        down = 1 if bias else cdiv(rows, 4 * block)
        triton_runtime.launch(
            dlogits_kernel, (cdiv(self.words, config["BN"]), down), stored, *parts, self.targets, self.rows, self.count,
            self.top if self.row_grad is None else self.row_grad, self.top, self.top if dbias is None else dbias, first,
            rows, self.words, self.width, self.softcap, self.smoothing, self.z_loss, SOFTCAP=self.softcap > 0,
            HAS_GRAD=self.row_grad is not None, NEED_BIAS=bias, MORE=bias and first > 0, BN=config["BN"], BR=block, warps=4,
        )  # fmt: skip

    def product(
        self, config: Config, first: int, rows: int, stored: Tensor, other: Tensor, total: Tensor, out: Tensor,
        weight: bool,
    ) -> None:  # fmt: skip
        """A piece's share of the gradient of hidden, or of the weight: added to ``total`` after the first, put into out."""
        height = self.words if weight else rows
        units = _unit(self.channels, other.stride(0))
        triton_runtime.launch(
            product_kernel, (cdiv(height, config["BM"]) * cdiv(self.channels, config["BN"]),), stored, other, total, out,
            self.rows, self.count, self.top, first, rows, self.words, self.channels // units[0], self.width,
            other.stride(0) // units[1], WEIGHT=weight, MORE=weight and first > 0,
            LAST=weight and 0 < first == self.tokens - rows, N_UNIT=units[0], B_UNIT=units[1], config=config,
        )  # fmt: skip

    def pick(self, kernel: str, configs: list[Config], run: Any) -> Config:
        """``triton_runtime.pick`` for one of the products."""
        return triton_runtime.pick("linear_cross_entropy", self.key(kernel), configs, run, self.hidden.device)


def _losses(problem: _Problem) -> None:
    """Fill problem.loss, without gradients."""

    def run(config: Config) -> None:
        problem.logits(config, 0, problem.tokens, None)

    run(problem.pick("loss", tiles(problem.hidden, problem.tokens, problem.words, problem.channels), run))


def _gradients(problem: _Problem, wants: Sequence[bool]) -> list[Tensor]:
    """Fill problem.loss; the gradients of hidden, weight and bias, empty where not wanted."""
    p = problem
    rows = chunk_rows(p.tokens, p.words, p.channels, p.hidden.element_size())
    stored = p.hidden.new_empty(rows, 16 * p.width)
    dhidden = p.hidden.new_empty((p.tokens, p.channels) if wants[0] else 0)
    dweight = p.weight.new_empty((p.words, p.channels) if wants[1] else 0)
    dbias = p._numbers(p.words) if wants[2] else None
    # Two roundings of a sum of two pieces are what a float32 sum would save; more pieces get one.
    many = wants[1] and cdiv(p.tokens, rows) > 2 and dweight.dtype != torch.float32
    total = p._numbers(p.words, p.channels) if many else dweight
    config = p.pick(
        "logits", tiles(p.hidden, rows, p.words, p.channels), lambda config: p.logits(config, 0, rows, stored)
    )
    chosen: list[Config | None] = [None, None]
    for first in range(0, p.tokens, rows):
        here = min(rows, p.tokens - first)
        p.to_gradient(config, first, here, stored, p.logits(config, first, here, stored), dbias)
        last = first + here == p.tokens
        jobs = []
        if wants[0]:
            jobs.append((0, p.weight, dhidden, dhidden, here, p.words))
        if wants[1]:
            picked = p.hidden.index_select(0, p.rows[first : first + here])
            jobs.append((1, picked, total, dweight if last else total, p.words, here))
        for which, other, before, out, height, depth in jobs:

            def run(config: Config, other=other, before=before, out=out, which=which, first=first, here=here) -> None:
                p.product(config, first, here, stored, other, before, out, which == 1)

            found = chosen[which]
            if found is None:  # at the first piece, which adds to nothing and may run twice
                name = ("dhidden", "dweight")[which]
                found = chosen[which] = p.pick(name, tiles(p.hidden, height, p.channels, depth), run)
            run(found)
    bias = p.hidden.new_empty(0) if dbias is None else dbias.to(p.hidden.dtype)
    return [dhidden, dweight, bias]


def _check_targets(targets: Tensor, ignore_index: int, words: int) -> None:
    """ValueError for a target that is out of range, where the host may look; a GPU clamps it."""
    if targets.device.type != "cpu":
        return
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= words))
    if bool(outside.any()):
        bad = int(targets[outside][0])
        raise ValueError(f"targets: expected 0 <= target < {words} or {ignore_index}, got {bad}")


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str,
    softcap: float, label_smoothing: float, z_loss: float, eager_grads: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss, and the gradients of hidden, weight and bias that ``eager_grads`` asks for."""
    _check_targets(targets, ignore_index, weight.shape[0])
    if hidden.shape[0] == 0:
        loss = hidden.new_full((), math.nan if reduction == "mean" else 0.0, dtype=torch.float32)
        return (hidden.new_empty(0, dtype=torch.float32) if reduction == "none" else loss), *_zeros(
            hidden, weight, bias, eager_grads
        )
    problem = _Problem(hidden, weight, bias, targets, ignore_index, reduction, softcap, label_smoothing, z_loss, None)
    if any(eager_grads):
        grads = _gradients(problem, eager_grads)
    else:
        _losses(problem)
        grads = [hidden.new_empty(0) for _ in range(3)]
    if reduction == "none":
        return problem.loss, *grads
    total = problem.loss.sum()
    return total / problem.count[0] if reduction == "mean" else total, *grads


def _zeros(hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: Sequence[bool]) -> list[Tensor]:
    like = (hidden, weight, hidden if bias is None else bias)
    return [x.new_zeros(x.shape if want else 0) for x, want in zip(like, wants, strict=True)]


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients made in the forward times the loss's own, or the pieces again for ``reduction="none"``."""
    hidden, weight, bias, targets, ignore_index, reduction, softcap, smoothing, z_loss, eager_grads = args
    grad = grads[0]
    if grad is None:
        return [None, None, None]
    if all(eager or not need for need, eager in zip(needs, eager_grads, strict=True)):
        return [x * grad if need else None for x, need in zip(outs, needs, strict=True)]
    if hidden.shape[0] == 0:
        found = _zeros(hidden, weight, bias, needs)
    else:
        problem = _Problem(hidden, weight, bias, targets, ignore_index, reduction, softcap, smoothing, z_loss, grad)
        found = _gradients(problem, needs)
    return [x if need else None for x, need in zip(found, needs, strict=True)]
