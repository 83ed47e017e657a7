"""A 2x2 convolution, a normed linear layer, a gated MLP, and learned tokens around each image: CogVLM2's adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import ConnectorConfig
from vlmops.models.norm import Norm

__all__ = ["Glu"]


class Glu(nn.Module):
    """n images of h x w patches -> n times 1 + h w / 4 + 1 tokens (CogVLM2, Hong et al. 2024).

    y = W_down (act(W_gate x) * (W_up x)), x = gelu(norm(W convolved)); a begin and an end are put around each image.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        inner, width, hidden = config.in_width, config.out_width, config.hidden or 4 * config.out_width
        self.activation = config.activation
        self.conv = nn.Parameter(torch.empty(inner, inner, 2, 2))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.proj = nn.Parameter(torch.empty(width, inner))
        self.norm = Norm(width, config.norm_eps)
        self.w_gate, self.w_up = nn.Parameter(torch.empty(hidden, width)), nn.Parameter(torch.empty(hidden, width))
        self.w_down = nn.Parameter(torch.empty(width, hidden))
        self.begin, self.end = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """[T, in_width], raster order -> [T / 4 + 2 n, out_width]; see the package for the arguments.

        Raises:
            ValueError: an image with an odd number of rows or columns.
        """
        grids = grid_thw.tolist()
        images = tokens.split([t * h * w for t, h, w in grids])
        rows = [self.blocks(x, h, w) for x, (_, h, w) in zip(images, grids, strict=True)]
        x = torch.cat(rows) if rows else tokens.new_empty(0, 4 * tokens.shape[1])
        x = ops.linear(ops.linear(x, self.conv.flatten(1), self.conv_bias), self.proj)
        x = nn.functional.gelu(self.norm(x))
        x = ops.mlp(x, self.w_up, None, self.w_down, None, activation=self.activation, w_gate=self.w_gate)
        begin, end = self.begin[None].to(x.dtype), self.end[None].to(x.dtype)
        parts = [part for image in x.split([len(r) for r in rows]) for part in (begin, image, end)] if rows else [x]
        around = 2 * torch.arange(cu_seqlens.shape[0], dtype=torch.int32, device=cu_seqlens.device)
        return torch.cat(parts), (cu_seqlens // 4).to(torch.int32) + around

    @staticmethod
    def blocks(image: Tensor, height: int, width: int) -> Tensor:
        """[t * height * width, C] -> [t * height * width / 4, 4 C], a 2x2 block's four values of each channel together."""
        if height % 2 or width % 2:
            raise ValueError(f"grid_thw: expected even rows and columns for a 2x2 convolution, got {height} x {width}")
        channels = image.shape[1]
        image = image.view(-1, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 5, 2, 4)
        return image.reshape(-1, 4 * channels)
