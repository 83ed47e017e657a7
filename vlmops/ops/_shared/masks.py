"""Which key a query sees: causal, window and prefix rules shared by the plain-PyTorch attentions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_mask", "has_mask", "safe_softmax"]


def has_mask(causal: bool, left: int, right: int) -> bool:
    """Whether any rule hides a key (a prefix only shows more)."""
    return causal or left >= 0 or right >= 0


def attention_mask(
    len_q: int, len_k: int, causal: bool, left: int, right: int, prefix: int, device: torch.device
) -> Tensor:
    """Visible keys of one sequence, bool [len_q, len_k].

    Query i sits at key position i + len_k - len_q (bottom-right alignment). ``left``/``right`` are -1 for
    unbounded; ``prefix`` keys are seen by every query whatever the other rules say.
    """
    q = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
    k = torch.arange(len_k, device=device)[None, :]
    visible = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if causal:
        visible &= k <= q
    if right >= 0:
        visible &= k <= q + right
    if left >= 0:
        visible &= k >= q - left
    if prefix > 0:
        visible |= k < prefix
    return visible


def safe_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-sum-exp; a row of only -inf gives zeros and -inf, and no NaN gradient.

    Args:
        scores: [..., Lq, Lk], hidden keys at -inf.

    Returns:
        probabilities like ``scores``, lse [..., Lq].
    """
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    top = scores.detach().amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    lse = (top + torch.log(safe)).masked_fill(empty, float("-inf"))
    return weights / safe, lse.squeeze(-1)
