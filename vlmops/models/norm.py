"""LayerNorm and RMSNorm on vlmops' ops, as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmops import ops

__all__ = ["Norm"]


class Norm(nn.Module):
    """LayerNorm (weight and bias) or RMSNorm (weight) over the last dimension.

    Args:
        width: channels.
        eps: added to the variance or the mean square.
        kind: "layer_norm" or "rms_norm".
        offset: added to an RMSNorm's weight (Gemma: 1).
    """

    def __init__(self, width: int, eps: float, kind: str = "layer_norm", offset: float = 0.0) -> None:
        super().__init__()
        if kind not in ("layer_norm", "rms_norm"):
            raise ValueError(f'kind: expected "layer_norm" or "rms_norm", got {kind!r}')
        self.kind, self.eps, self.offset = kind, eps, offset
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer_norm" else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same, in x's dtype."""
        if self.kind == "layer_norm":
            out = ops.layer_norm(x, self.weight, self.bias, eps=self.eps)
        else:
            out = ops.rms_norm(x, self.weight, eps=self.eps, offset=self.offset)
        assert isinstance(out, Tensor)  # a pair only where a residual is given
        return out

    @property
    def spec(self) -> tuple[str, Tensor, Tensor | None, float]:
        """As ``ops.mlp`` takes a norm, without offset."""
        return self.kind, self.weight, self.bias, self.eps
