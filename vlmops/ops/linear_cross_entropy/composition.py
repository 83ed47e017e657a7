"""Plain PyTorch: logits in pieces of tokens, each piece turned into its own gradient in place.

A piece costs one matrix product for the logits and one for each gradient, and reads the whole weight, so pieces
are as large as a fixed budget allows. Tokens that do not count (the prompt, the image) are left out on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 27  # float32 logits held at once, where the weight gets no gradient


def chunk_rows(tokens: int, words: int, channels: int, weight_grad: bool) -> int:
    """Tokens in one piece: what the budget holds, and never more than half of a long batch.

    With a weight gradient each piece also passes over float32 sums of the weight's size; its logits may then be half as
    large as those, which are held anyway.
    """
    rows = max(1, CHUNK_BYTES // (4 * words))
    if weight_grad:
        rows = max(rows, channels // 2)
    return max(1, min(tokens, rows, max(64, -(-tokens // 2))))


def _log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of one piece: log-softmax [rows, V] in float32 (float64 for float64); capped / softcap if capped; lse if wanted.

    The product itself is in the inputs' dtype, as in nn.Linear.
    """
    x = torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    share = None
    if softcap > 0:
        share = x.div_(softcap).tanh_()
        x = share * softcap
    return torch.log_softmax(x, dim=-1), share, torch.logsumexp(x, dim=-1) if z_loss else None


def _losses(logp: Tensor, lse: Tensor | None, target: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Loss of each row of a piece."""
    loss = (label_smoothing - 1) * logp.gather(1, target[:, None]).squeeze(1)
    if label_smoothing:
        loss = loss - label_smoothing * logp.mean(dim=-1)
    return loss if lse is None else loss + z_loss * lse.square()


def _to_gradient(
    logp: Tensor, share: Tensor | None, lse: Tensor | None, target: Tensor, label_smoothing: float, z_loss: float
) -> Tensor:
    """d loss / d (hidden @ weight^T + bias) of each row, in the place of ``logp``."""
    grad = logp.exp_()
    if lse is not None:
        grad.mul_((1 + 2 * z_loss * lse)[:, None])
    if label_smoothing:
        grad.sub_(label_smoothing / grad.shape[1])
    grad.scatter_add_(1, target[:, None], grad.new_full((grad.shape[0], 1), label_smoothing - 1))
    return grad if share is None else grad.mul_(share.square_().neg_().add_(1.0))


class _Sums:
    """Gradients of hidden, weight and bias, gathered piece by piece; sums over several pieces in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, wants: Sequence[bool]) -> None:
        self.hidden, self.weight, self.wants = hidden, weight, wants
        self.dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wants[0] else None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None

    def add(self, grad: Tensor, factor: Tensor, first: int, last: int) -> None:
        """Take the gradient [last - first, V] of these tokens' logits, ``factor`` [last - first] times.

        The factor goes to the narrow sides of the products, which saves a pass over the wide one.
        """
        if self.wants[2]:
            dbias = factor @ grad
            self.dbias = dbias if self.dbias is None else self.dbias.add_(dbias)
        grad = grad.to(self.hidden.dtype)
        if self.dhidden is not None:
            self.dhidden[first:last] = torch.mm(grad, self.weight) * factor[:, None]
        if not self.wants[1]:
            return
        if grad.dtype == factor.dtype:
            scaled = self.hidden[first:last] * factor[:, None]
            self.dweight = grad.t() @ scaled if self.dweight is None else self.dweight.addmm_(grad.t(), scaled)
            return
        # A low-precision product is rounded before it is added: scaled to at most 1, lest float16 underflow.
        top = factor.abs().amax()
        top = torch.where(top > 0, top, 1.0)
        part = grad.t() @ (self.hidden[first:last] * (factor / top)[:, None]).to(grad.dtype)
        if last - first == self.hidden.shape[0]:
            self.dweight = part.mul_(top)
        elif self.dweight is None:
            self.dweight = part.to(factor.dtype).mul_(top)
        else:
            self.dweight.add_(part.mul_(top))

    def results(self, like: Sequence[Tensor]) -> list[Tensor]:
        """The three gradients in the inputs' dtype; empty where not wanted, zeros where no token came."""
        found = (self.dhidden, self.dweight, self.dbias)
        return [
            x.new_empty(0) if not want else torch.zeros_like(x) if grad is None else grad.to(x.dtype)
            for x, grad, want in zip(like, found, self.wants, strict=True)
        ]


def _valid(targets: Tensor, ignore_index: int, words: int) -> tuple[Tensor, Tensor]:
    """Targets as int64 within [0, words) and which count. ValueError on a CPU for one outside; clamped elsewhere."""
    counts = targets != ignore_index
    safe = targets.masked_fill(~counts, 0).long()
    if targets.device.type == "cpu" and safe.numel() and (int(safe.min()) < 0 or int(safe.max()) >= words):
        bad = int(safe[(safe < 0) | (safe >= words)][0])
        raise ValueError(f"targets: expected 0 <= target < {words} or {ignore_index}, got {bad}")
    return safe.clamp_(0, words - 1), counts


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, factor: Tensor | None, softcap: float,
    label_smoothing: float, z_loss: float, wants: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Losses [T] of tokens that all count, and ``factor`` [T] times the gradients that ``wants`` asks for."""
    tokens = hidden.shape[0]
    loss = torch.empty(tokens, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    sums = _Sums(hidden, weight, wants)
    rows = chunk_rows(tokens, weight.shape[0], hidden.shape[1], wants[1])
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens)
        logp, share, lse = _log_probs(hidden[first:last], weight, bias, softcap, z_loss)
        loss[first:last] = _losses(logp, lse, target[first:last], label_smoothing, z_loss)
        if factor is not None and any(wants):
            grad = _to_gradient(logp, share, lse, target[first:last], label_smoothing, z_loss)
            if hidden.device.type != "cpu":  # on a CPU the tokens that do not count are not here
                grad.masked_fill_((factor[first:last] == 0)[:, None], 0.0)
            sums.add(grad, factor[first:last], first, last)
    return loss, sums.results((hidden, weight, hidden if bias is None else bias))


def _counted(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, counts: Tensor, factor: Tensor | None,
    softcap: float, label_smoothing: float, z_loss: float, wants: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """``_run`` with loss and gradient 0 for tokens that do not count: left out where the host may know them."""
    options = (softcap, label_smoothing, z_loss, wants)
    if hidden.device.type != "cpu":
        loss, grads = _run(hidden, weight, bias, target, factor, *options)
        loss = loss.masked_fill_(~counts, 0.0)
        if wants[0]:
            grads[0].masked_fill_(~counts[:, None], 0.0)
        return loss, grads
    if bool(counts.all()):
        return _run(hidden, weight, bias, target, factor, *options)
    keep = counts.nonzero().squeeze(1)
    part, grads = _run(hidden[keep], weight, bias, target[keep], None if factor is None else factor[keep], *options)
    loss = part.new_zeros(hidden.shape[0]).index_copy_(0, keep, part)
    if wants[0]:
        grads[0] = grads[0].new_zeros(hidden.shape).index_copy_(0, keep, grads[0])
    return loss, grads


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str,
    softcap: float, label_smoothing: float, z_loss: float, eager_grads: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss, and the gradients of hidden, weight and bias that ``eager_grads`` asks for."""
    target, counts = _valid(targets, ignore_index, weight.shape[0])
    factor = _factor(counts, reduction, hidden) if any(eager_grads) else None
    loss, grads = _counted(hidden, weight, bias, target, counts, factor, softcap, label_smoothing, z_loss, eager_grads)
    if reduction == "none":
        return loss, *grads
    return loss.sum() / counts.sum() if reduction == "mean" else loss.sum(), *grads


def _factor(counts: Tensor, reduction: str, hidden: Tensor) -> Tensor:
    """d result / d loss of each token."""
    factor = counts.to(torch.promote_types(hidden.dtype, torch.float32))
    return factor / factor.sum().clamp(min=1.0) if reduction == "mean" else factor


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients made in the forward times the loss's own, or the pieces again for ``reduction="none"``."""
    hidden, weight, bias, targets, ignore_index, reduction, softcap, label_smoothing, z_loss, eager_grads = args
    grad = grads[0]
    if grad is None:
        return [None, None, None]
    if all(eager or not need for need, eager in zip(needs, eager_grads, strict=True)):
        return [x * grad if need else None for x, need in zip(outs, needs, strict=True)]
    target, counts = _valid(targets, ignore_index, weight.shape[0])
    factor = grad * _factor(counts, reduction, hidden)
    _, found = _counted(hidden, weight, bias, target, counts, factor, softcap, label_smoothing, z_loss, needs)
    return [x if need else None for x, need in zip(found, needs, strict=True)]
