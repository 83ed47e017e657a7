"""Four patches become one token: a quarter of the prompt, at four times the channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import ConnectorConfig
from vlmops.models.norm import Norm

__all__ = ["Merger", "PixelShuffle"]


def quartered(cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens where each four tokens became one."""
    return (cu_seqlens // 4).to(torch.int32)


class Merger(nn.Module):
    """y = W2 act(W1 [four normed neighbours] + b1) + b2 (Qwen2-VL, Wang et al. 2024; Qwen2.5-VL with RMSNorm).

    The tower delivers the four patches of a 2x2 block behind each other, so the gather is a view.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        wide = 4 * config.in_width
        hidden = config.hidden or wide
        self.activation = config.activation
        self.norm = Norm(config.in_width, config.norm_eps, config.norm or "layer_norm")
        self.w1, self.b1 = nn.Parameter(torch.empty(hidden, wide)), nn.Parameter(torch.empty(hidden))
        self.w2 = nn.Parameter(torch.empty(config.out_width, hidden))
        self.b2 = nn.Parameter(torch.empty(config.out_width))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """[T, in_width] -> [T / 4, out_width]; see the package for the arguments."""
        out = ops.mlp(
            tokens, self.w1, self.b1, self.w2, self.b2, activation=self.activation,
            norm=self.norm.spec, gather="merge2x2",
        )  # fmt: skip
        return out, quartered(cu_seqlens)


class PixelShuffle(nn.Module):
    """2x2 blocks of a raster of patches, and then one linear layer (Idefics3, SmolVLM: ``hidden`` -1) or a normed MLP (InternVL).

    Source: InternVL 1.5 (Chen et al. 2024); Idefics3 (Laurencon et al. 2024).
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        wide, hidden = 4 * config.in_width, config.hidden or config.out_width
        self.activation, self.single = config.activation, hidden < 0
        self.norm = Norm(wide, config.norm_eps, config.norm) if config.norm else None
        first = config.out_width if self.single else hidden
        self.w1 = nn.Parameter(torch.empty(first, wide))
        self.b1 = nn.Parameter(torch.empty(first)) if config.bias else None
        if not self.single:
            self.w2 = nn.Parameter(torch.empty(config.out_width, hidden))
            self.b2 = nn.Parameter(torch.empty(config.out_width)) if config.bias else None

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """[T, in_width], raster order -> [T / 4, out_width]; see the package for the arguments.

        Raises:
            ValueError: an image with an odd number of rows or columns.
        """
        images = tokens.split(grid_thw.prod(1).tolist())
        parts = [self.blocks(x, h, w) for x, (_, h, w) in zip(images, grid_thw.tolist(), strict=True)]
        rows = torch.cat(parts) if parts else tokens.new_empty(0, self.w1.shape[1])
        if self.norm is not None:
            rows = self.norm(rows)
        if self.single:
            return ops.linear(rows, self.w1, self.b1), quartered(cu_seqlens)
        return ops.mlp(rows, self.w1, self.b1, self.w2, self.b2, activation=self.activation), quartered(cu_seqlens)

    @staticmethod
    def blocks(image: Tensor, height: int, width: int) -> Tensor:
        """[t * height * width, C] -> [t * height * width / 4, 4 C]: the four patches of each 2x2 block, row by row."""
        if height % 2 or width % 2:
            raise ValueError(f"grid_thw: expected even rows and columns to merge 2x2, got {height} x {width}")
        channels = image.shape[1]
        image = image.view(-1, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        return image.reshape(-1, 4 * channels)
