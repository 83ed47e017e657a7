"""The oracle: the whole logits matrix, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str,
    softcap: float, label_smoothing: float, z_loss: float, eager_grads: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss, and three tensors of zeros: nothing is kept for the backward, which runs this again."""
    counts = targets != ignore_index
    outside = counts & ((targets < 0) | (targets >= weight.shape[0]))
    if bool(outside.any()):
        raise ValueError(
            f"targets: expected 0 <= target < {weight.shape[0]} or {ignore_index}, got {int(targets[outside][0])}"
        )
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(dim=-1)
    picked = logits.gather(1, targets.masked_fill(~counts, 0).long()[:, None]).squeeze(1)
    loss = lse - (1 - label_smoothing) * picked + z_loss * lse.square()
    if label_smoothing:  # 0 times the mean of a vocabulary with a masked word (bias -inf) would be NaN
        loss = loss - label_smoothing * logits.mean(dim=-1)
    loss = loss.masked_fill(~counts, 0.0)
    if reduction == "mean":
        loss = loss.sum() / counts.sum()
    elif reduction == "sum":
        loss = loss.sum()
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    like = (hidden, weight, hidden if bias is None else bias)
    unused = [x.new_zeros(x.shape if want else 0) for x, want in zip(like, eager_grads, strict=True)]
    return loss.to(work), *unused
