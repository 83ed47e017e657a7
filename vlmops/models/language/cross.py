"""Gated cross-attention: how Flamingo lets a frozen decoder see."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import CrossConfig
from vlmops.models.norm import Norm

__all__ = ["GatedCrossAttention"]


class GatedCrossAttention(nn.Module):
    """x += tanh(a) attention(norm(x), media); x += tanh(b) feed-forward(norm(x)).

    Both gates start at 0, so that training begins with the language model as it was. Source: Flamingo (Alayrac et al. 2022);
    Idefics (Laurencon et al. 2023) with RMSNorm, norms of queries and keys, and a gated MLP.
    """

    def __init__(self, config: CrossConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads, self.dim, self.activation = config.heads, config.head_dim, config.activation
        self.norm1 = Norm(config.width, config.norm_eps, config.norm)
        self.q = nn.Parameter(torch.empty(inner, config.width))
        self.kv = nn.Parameter(torch.empty(2 * inner, config.context_width))  # keys, then values
        self.q_norm = Norm(config.head_dim, config.norm_eps, "rms_norm") if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.norm_eps, "rms_norm") if config.qk_norm else None
        self.out = nn.Parameter(torch.empty(config.width, inner))
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.norm2 = Norm(config.width, config.norm_eps, config.norm)
        self.w1 = nn.Parameter(torch.empty(config.mlp_width, config.width))
        self.w_gate = nn.Parameter(torch.empty(config.mlp_width, config.width)) if config.gated else None
        self.w2 = nn.Parameter(torch.empty(config.width, config.mlp_width))
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """media [Tm, context_width] -> k and v [Tm, heads, head_dim]: once for a prompt, however many tokens are generated."""
        k, v = ops.linear(media, self.kv).view(-1, 2, self.heads, self.dim).unbind(1)
        return (k if self.k_norm is None else self.k_norm(k)), v

    def forward(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], cu_seqlens: Tensor, cu_media: Tensor, media_index: Tensor
    ) -> Tensor:
        """x [T, width] -> the same.

        Args:
            x: packed text tokens.
            keys_values: of all images of the batch (``keys_values``).
            cu_seqlens: int32 [n + 1], where each text begins.
            cu_media: int32 [m + 1], where each image begins.
            media_index: int32 [T], the image each token sees, -1 for none; or [T, 2], a range of images.
        """
        q = ops.linear(self.norm1(x), self.q).view(-1, self.heads, self.dim)
        q = q if self.q_norm is None else self.q_norm(q)
        seen = ops.cross_attention(q, *keys_values, cu_seqlens, cu_media, media_index=media_index)
        assert isinstance(seen, Tensor)
        x = ops.linear(seen.flatten(1), self.out, gate=self.attention_gate, residual=x)
        scale = self.mlp_gate.tanh().expand(x.shape[1])
        return ops.mlp(
            x, self.w1, None, self.w2, None, activation=self.activation, w_gate=self.w_gate, norm=self.norm2.spec,
            layer_scale=scale, residual=x,
        )  # fmt: skip
