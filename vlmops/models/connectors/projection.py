"""Token by token: one linear layer, or two with an activation between."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import ConnectorConfig

__all__ = ["Linear", "Mlp"]


class Linear(nn.Module):
    """y = W x + b (LLaVA 1.0, Liu et al. 2023; PaliGemma, Beyer et al. 2024; Fuyu's patches)."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.out_width, config.in_width))
        self.bias = nn.Parameter(torch.empty(config.out_width)) if config.bias else None

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """[T, in_width] -> [T, out_width]; see the package for the arguments."""
        return ops.linear(tokens, self.weight, self.bias), cu_seqlens


class Mlp(nn.Module):
    """y = W2 act(W1 x + b1) + b2 (LLaVA 1.5, Liu et al. 2023; Pixtral)."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        hidden = config.hidden or config.out_width
        self.activation = config.activation
        self.w1 = nn.Parameter(torch.empty(hidden, config.in_width))
        self.b1 = nn.Parameter(torch.empty(hidden)) if config.bias else None
        self.w2 = nn.Parameter(torch.empty(config.out_width, hidden))
        self.b2 = nn.Parameter(torch.empty(config.out_width)) if config.bias else None

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """[T, in_width] -> [T, out_width]; see the package for the arguments."""
        return ops.mlp(tokens, self.w1, self.b1, self.w2, self.b2, activation=self.activation), cu_seqlens
