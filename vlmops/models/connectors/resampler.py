"""One layer of cross-attention from learned queries that know where they look: Qwen-VL's resampler."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmops import ops
from vlmops.models.config import ConnectorConfig
from vlmops.models.connectors.perceiver import equal_lengths
from vlmops.models.norm import Norm

__all__ = ["Resampler", "sincos_2d"]


def sincos_2d(width: int, side: int) -> Tensor:
    """Fixed positions [side * side, width], float32, row by row: half the channels for the column, half for the row, sines first.

    Source: MAE (He et al. 2021), whose table Qwen-VL uses.
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    by_column, by_row = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([by_column, by_row], 2).reshape(side * side, width).float()


class Resampler(nn.Module):
    """n images -> n times ``queries`` tokens (256 of them, a square, in Qwen-VL, Bai et al. 2023).

    Queries and keys get 2-D sine positions, values do not; an image of another size gets the keys' table resized.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        width, side = config.out_width, math.isqrt(config.queries)
        if side * side != config.queries:
            raise ValueError(f"queries: expected a square number, got {config.queries}")
        if width % 4 or width % config.heads:
            raise ValueError(f"out_width: expected a multiple of 4 and of {config.heads} heads, got {width}")
        self.queries, self.heads, self.dim = config.queries, config.heads, width // config.heads
        self.side, self.keys_side = side, config.image_positions
        self.latents = nn.Parameter(torch.empty(config.queries, width))
        self.kv_proj = nn.Parameter(torch.empty(width, config.in_width))
        self.q_norm, self.kv_norm = Norm(width, config.norm_eps), Norm(width, config.norm_eps)
        self.out_norm = Norm(width, config.norm_eps)
        self.qkv = nn.Parameter(torch.empty(3 * width, width))
        self.qkv_bias = nn.Parameter(torch.empty(3 * width))
        self.out, self.out_bias = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(width))
        self.proj = nn.Parameter(torch.empty(width, width))

    def positions(self, grid_thw: Tensor, like: Tensor) -> Tensor:
        """Positions of every patch [T, width]: the square table, bicubically resized for each other grid."""
        width = self.latents.shape[1]
        table = sincos_2d(width, self.keys_side).to(like.device)
        found = []
        for t, h, w in grid_thw.tolist():
            if (h, w) == (self.keys_side, self.keys_side):
                resized = table
            else:
                square = table.view(1, self.keys_side, self.keys_side, width).permute(0, 3, 1, 2)
                resized = functional.interpolate(square, size=(h, w), mode="bicubic", align_corners=False)
                resized = resized.permute(0, 2, 3, 1).reshape(h * w, width)
            found.append(resized.repeat(t, 1))
        return torch.cat(found).to(like.dtype) if found else like.new_empty(0, width)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """[T, in_width] -> [n * queries, out_width]; see the package for the arguments."""
        n, width = cu_seqlens.shape[0] - 1, self.latents.shape[1]
        values = self.kv_norm(ops.linear(tokens, self.kv_proj))
        keys = values + self.positions(grid_thw, values)
        asks = self.q_norm(self.latents.to(tokens.dtype))
        asks = asks + sincos_2d(width, self.side).to(asks)
        parts = zip((asks, keys, values), self.qkv.split(width), self.qkv_bias.split(width), strict=True)
        q, k, v = (ops.linear(x, w, b).view(-1, self.heads, self.dim) for x, w, b in parts)
        seen = ops.perceiver_attention(q.repeat(n, 1, 1), k, v, None, None, cu_seqlens, num_latents=self.queries)
        out = self.out_norm(ops.linear(seen.flatten(1), self.out, self.out_bias))
        return ops.linear(out, self.proj.t()), equal_lengths(n, self.queries, cu_seqlens)
