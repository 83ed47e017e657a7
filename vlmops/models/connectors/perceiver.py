"""A fixed number of latents that read the image again and again: Flamingo's Perceiver Resampler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import ConnectorConfig
from vlmops.models.norm import Norm

__all__ = ["PerceiverResampler"]


class PerceiverLayer(nn.Module):
    """latents += attention(latents over [context; latents]); latents += feed-forward(latents); norms in front of each."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width, self.heads = config.in_width, config.heads
        self.dim = config.head_dim or width // config.heads
        inner, hidden = self.heads * self.dim, config.hidden or 4 * width
        self.activation = config.activation
        self.context_norm, self.latent_norm = Norm(width, config.norm_eps), Norm(width, config.norm_eps)
        self.mlp_norm = Norm(width, config.norm_eps)
        self.q = nn.Parameter(torch.empty(inner, width))
        self.kv = nn.Parameter(torch.empty(2 * inner, width))  # keys, then values
        self.q_norm = Norm(self.dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(self.dim, config.norm_eps) if config.qk_norm else None
        self.out = nn.Parameter(torch.empty(width, inner))
        self.w1, self.w2 = nn.Parameter(torch.empty(hidden, width)), nn.Parameter(torch.empty(width, hidden))

    def forward(self, latents: Tensor, context: Tensor, cu_seqlens: Tensor, queries: int) -> Tensor:
        """latents [n * queries, C], context [T, C] -> [n * queries, C]."""
        seen, own = self.context_norm(context), self.latent_norm(latents)
        q = ops.linear(own, self.q).view(-1, self.heads, self.dim)
        k_context, v_context = ops.linear(seen, self.kv).view(-1, 2, self.heads, self.dim).unbind(1)
        k_latent, v_latent = ops.linear(own, self.kv).view(-1, 2, self.heads, self.dim).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k_context, k_latent = self.q_norm(q), self.k_norm(k_context), self.k_norm(k_latent)
        read = ops.perceiver_attention(
            q, k_context, v_context, k_latent, v_latent, cu_seqlens, num_latents=queries, scale=self.dim**-0.5
        )
        latents = ops.linear(read.flatten(1), self.out, residual=latents)
        return ops.mlp(
            latents, self.w1, None, self.w2, None, activation=self.activation, residual=latents,
            norm=self.mlp_norm.spec,
        )  # fmt: skip


class PerceiverResampler(nn.Module):
    """n images of any size -> n times ``queries`` tokens (Flamingo, Alayrac et al. 2022; Idefics).

    Keys come from two places, [context; latents], and are read where they lie. A projection to the language model's width follows
    where it differs from the tower's.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.queries = config.queries
        self.latents = nn.Parameter(torch.empty(config.queries, config.in_width))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.layers))
        self.norm = Norm(config.in_width, config.norm_eps)
        project = config.out_width != config.in_width
        self.weight = nn.Parameter(torch.empty(config.out_width, config.in_width)) if project else None

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """[T, in_width] -> [n * queries, out_width]; see the package for the arguments."""
        n = cu_seqlens.shape[0] - 1
        latents = self.latents.to(tokens.dtype).repeat(n, 1)
        for layer in self.layers:
            latents = layer(latents, tokens, cu_seqlens, self.queries)
        latents = self.norm(latents)
        if self.weight is not None:
            latents = ops.linear(latents, self.weight)
        return latents, equal_lengths(n, self.queries, cu_seqlens)


def equal_lengths(n: int, length: int, like: Tensor) -> Tensor:
    """cu_seqlens of n sequences of one length."""
    return torch.arange(n + 1, dtype=torch.int32, device=like.device) * length
