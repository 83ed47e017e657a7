"""Images as words: Chameleon's tokenizer turns 512 x 512 pixels into 32 x 32 entries of a codebook of 8192."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmops import ops
from vlmops.models.config import VqConfig

__all__ = ["VqConfig", "VqTokenizer"]


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution beside where channels change."""

    def __init__(self, inside: int, outside: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outside, eps=1e-6)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W] -> [n, C', H, W]."""
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """x + attention(norm(x)) over an image's pixels, with one head of all channels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # 1x1 convolutions, as the files have them
        self.qkv = nn.Parameter(torch.empty(3 * channels, channels, 1, 1))
        self.qkv_bias = nn.Parameter(torch.empty(3 * channels))
        self.out = nn.Parameter(torch.empty(channels, channels, 1, 1))
        self.out_bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W] -> the same."""
        n, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2).reshape(-1, channels)
        q, k, v = ops.linear(tokens, self.qkv.flatten(1), self.qkv_bias).view(-1, 3, 1, channels).unbind(1)
        cu_seqlens = torch.arange(n + 1, dtype=torch.int32, device=x.device) * (height * width)
        seen = ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen_q=height * width, max_seqlen_k=height * width)
        assert isinstance(seen, Tensor)
        out = ops.linear(seen.flatten(1), self.out.flatten(1), self.out_bias)
        return x + out.view(n, height * width, channels).transpose(1, 2).reshape(x.shape)


class VqTokenizer(nn.Module):
    """Encoder and codebook of a VQGAN (Esser et al. 2021), as Chameleon (Chameleon team 2024) uses it; frozen there."""

    def __init__(self, config: VqConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or VqConfig()
        channels = [c.base, *(c.base * m for m in c.multipliers)]
        self.conv_in = nn.Conv2d(3, c.base, 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(*(Residual(inside if i == 0 else outside, outside, c.groups) for i in range(c.blocks)))
            for inside, outside in itertools.pairwise(channels)
        )
        self.down = nn.ModuleList(nn.Conv2d(n, n, 3, stride=2) for n in channels[1:-1])
        last = channels[-1]
        self.middle = nn.Sequential(
            Residual(last, last, c.groups), Attention(last, c.groups), Residual(last, last, c.groups)
        )
        self.norm_out = nn.GroupNorm(c.groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, c.latent, 3, padding=1)
        self.to_code = nn.Conv2d(c.latent, c.code_width, 1)
        # The way back to pixels, which in the files ends here: nothing uses it.
        self.from_code = nn.Conv2d(c.code_width, c.latent, 1)
        self.codebook = nn.Parameter(torch.empty(c.codes, c.code_width))

    def latents(self, images: Tensor) -> Tensor:
        """[n, 3, H, W], normalised -> [n, code_width, H / reduction, W / reduction]."""
        x = self.conv_in(images)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.down):
                x = self.down[i](
                    functional.pad(x, (0, 1, 0, 1))
                )  # the stride's padding is at the right and bottom alone
        x = self.conv_out(functional.silu(self.norm_out(self.middle(x))))
        return self.to_code(x)

    def forward(self, images: Tensor) -> Tensor:
        """The nearest code of each place.

        Args:
            images: [n, 3, H, W], normalised; sides are multiples of ``config.reduction``.

        Returns:
            int64 [n, H / reduction * W / reduction], row by row.

        Raises:
            ValueError: sides that are no such multiples.
        """
        unit = self.config.reduction
        if images.dim() != 4 or images.shape[2] % unit or images.shape[3] % unit:
            raise ValueError(
                f"images: expected [n, 3, H, W] with sides that are multiples of {unit}, got {list(images.shape)}"
            )
        x = self.latents(images).flatten(2).transpose(1, 2)  # [n, places, code_width]
        # |x - c|^2 without |x|^2, which is the same for every code
        distances = self.codebook.square().sum(1) - 2 * (x @ self.codebook.t())
        return distances.argmin(-1)
