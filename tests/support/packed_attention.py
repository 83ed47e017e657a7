"""Packed inputs of the attentions, and the options every kernel of varlen_attention is tried with."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["VARLEN_CASES", "cu", "make", "prefix"]


def cu(lengths) -> Tensor:
    """The cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def prefix(*lengths) -> Tensor:
    """A prefix_lens."""
    return torch.tensor(lengths, dtype=torch.int32)


def make(lengths_q, lengths_k=None, heads=2, kv_heads=2, dim=16, grad=True):
    """q, k, v and their two cu_seqlens; keys as long as the queries by default."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    q = torch.randn(sum(lengths_q), heads, dim, requires_grad=grad)
    k, v = (torch.randn(sum(lengths_k), kv_heads, dim, requires_grad=grad) for _ in range(2))
    return q, k, v, cu(lengths_q), cu(lengths_k)


#: Shapes for ``make``, options of the op.
VARLEN_CASES = {
    "ragged": (dict(lengths_q=[5, 1, 0, 40]), {}),
    "long": (dict(lengths_q=[150, 70], heads=1, kv_heads=1), {}),
    "causal": (dict(lengths_q=[5, 140], heads=1, kv_heads=1), dict(causal=True)),
    "causal, more keys": (dict(lengths_q=[3, 1, 70], lengths_k=[8, 4, 90]), dict(causal=True)),
    "causal, more queries": (dict(lengths_q=[6, 2, 90], lengths_k=[3, 2, 70]), dict(causal=True)),
    "no keys": (dict(lengths_q=[3, 2], lengths_k=[0, 4]), {}),
    "window": (dict(lengths_q=[9, 150], heads=1, kv_heads=1), dict(window=(20, 10))),
    "left window": (dict(lengths_q=[9, 100]), dict(window=(3, -1))),
    "right window": (dict(lengths_q=[9, 100]), dict(window=(-1, 3))),
    "causal window": (dict(lengths_q=[9, 100]), dict(window=(30, 5), causal=True)),
    "prefix": (dict(lengths_q=[9, 100]), dict(causal=True, prefix_lens=prefix(4, 77))),
    "prefix over all": (dict(lengths_q=[9, 40]), dict(causal=True, prefix_lens=prefix(400, 0))),
    "prefix and window": (dict(lengths_q=[9, 100]), dict(window=(5, 5), prefix_lens=prefix(2, 50))),
    "prefix without mask": (dict(lengths_q=[9, 10]), dict(prefix_lens=prefix(2, 5))),
    "softcap": (dict(lengths_q=[9, 40]), dict(softcap=2.0)),
    "softcap causal": (dict(lengths_q=[9, 70]), dict(softcap=2.0, causal=True)),
    "grouped": (dict(lengths_q=[9, 40], heads=4, kv_heads=2), {}),
    "grouped causal": (dict(lengths_q=[9, 40], heads=6, kv_heads=1), dict(causal=True)),
    "equal windows": (dict(lengths_q=[16] * 5), dict(max_seqlen_q=16, max_seqlen_k=16)),
    "many sequences": (dict(lengths_q=[(7 * i) % 5 for i in range(150)], heads=1, kv_heads=1, dim=8), {}),
    "scale": (dict(lengths_q=[7]), dict(scale=0.3)),
    "head 5": (dict(lengths_q=[7, 3], dim=5), {}),
    "head 72": (dict(lengths_q=[7, 70], dim=72, heads=1, kv_heads=1), {}),
    "head 80": (dict(lengths_q=[33], dim=80), {}),
    "head 88": (dict(lengths_q=[33], dim=88), dict(causal=True)),
    "head 96": (dict(lengths_q=[33], dim=96), {}),
    "head 128": (dict(lengths_q=[33], dim=128), {}),
    "head 256": (dict(lengths_q=[33], dim=256, heads=1, kv_heads=1), {}),
    "empty": (dict(lengths_q=[0, 0]), {}),
    "nothing": (dict(lengths_q=[]), {}),
}  # fmt: skip
