"""BERT whose sequence is a set of learned queries that look at the image in every other layer: BLIP-2's Q-Former."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import ConnectorConfig
from vlmops.models.connectors.perceiver import equal_lengths
from vlmops.models.norm import Norm

__all__ = ["QFormer"]


class Attention(nn.Module):
    """x = norm(x + W_o attention(x, context)), the norm behind the sum as in BERT; context None: self-attention."""

    def __init__(self, width: int, context: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.q, self.q_bias = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(width))
        self.kv, self.kv_bias = nn.Parameter(torch.empty(2 * width, context)), nn.Parameter(torch.empty(2 * width))
        self.out, self.out_bias = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(width))
        self.norm = Norm(width, eps)

    def forward(self, x: Tensor, context: Tensor, cu_seqlens: Tensor, queries: int) -> Tensor:
        """x [n * queries, C]; context [T, C'] with its cu_seqlens."""
        q = ops.linear(x, self.q, self.q_bias).view(-1, self.heads, self.dim)
        k, v = ops.linear(context, self.kv, self.kv_bias).view(-1, 2, self.heads, self.dim).unbind(1)
        seen = ops.perceiver_attention(q, k, v, None, None, cu_seqlens, num_latents=queries)
        return self.norm(ops.linear(seen.flatten(1), self.out, self.out_bias, residual=x))


class QFormerLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the image in some layers, feed-forward; each with its norm behind."""

    def __init__(self, config: ConnectorConfig, layer: int) -> None:
        super().__init__()
        width = config.width or config.in_width
        hidden = config.hidden or 4 * width
        self.activation = config.activation
        self.attention = Attention(width, width, config.heads, config.norm_eps)
        crosses = layer % config.cross_every == 0
        self.cross = Attention(width, config.in_width, config.heads, config.norm_eps) if crosses else None
        self.w1, self.b1 = nn.Parameter(torch.empty(hidden, width)), nn.Parameter(torch.empty(hidden))
        self.w2, self.b2 = nn.Parameter(torch.empty(width, hidden)), nn.Parameter(torch.empty(width))
        self.norm = Norm(width, config.norm_eps)

    def forward(self, x: Tensor, own: Tensor, context: Tensor, cu_seqlens: Tensor, queries: int) -> Tensor:
        """x [n * queries, C]; own: cu_seqlens of the queries; context [T, in_width] with its cu_seqlens."""
        x = self.attention(x, x, own, queries)
        if self.cross is not None:
            x = self.cross(x, context, cu_seqlens, queries)
        return self.norm(ops.mlp(x, self.w1, self.b1, self.w2, self.b2, activation=self.activation, residual=x))


class QFormer(nn.Module):
    """n images -> n times ``queries`` tokens, projected to the language model's width (BLIP-2, Li et al. 2023)."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width = config.width or config.in_width
        self.queries = config.queries
        self.latents = nn.Parameter(torch.empty(config.queries, width))
        self.norm = Norm(width, config.norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(config, i) for i in range(config.layers))
        self.weight = nn.Parameter(torch.empty(config.out_width, width))
        self.bias = nn.Parameter(torch.empty(config.out_width))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """[T, in_width] -> [n * queries, out_width]; see the package for the arguments."""
        n = cu_seqlens.shape[0] - 1
        own = equal_lengths(n, self.queries, cu_seqlens)
        tokens = tokens.to(self.latents.dtype)  # float16 files keep all but the projection in float32
        x = self.norm(self.latents).repeat(n, 1)
        for layer in self.layers:
            x = layer(x, own, tokens, cu_seqlens, self.queries)
        return ops.linear(x.to(self.weight.dtype), self.weight, self.bias), own
