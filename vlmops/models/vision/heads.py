"""What makes a tower half of a contrastive model: one vector an image, and the losses that compare it with its text's.

CLIP projects the class token; SigLIP lets one learned query look at all patches. The logits of a batch are never held whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlmops import ops
from vlmops.models.config import VisionConfig
from vlmops.models.norm import Norm

__all__ = ["AttentionPool", "ClipHead", "SiglipHead", "sigmoid_loss", "softmax_loss"]


class AttentionPool(nn.Module):
    """One learned query reads an image's tokens, then an MLP: SigLIP's pooled output.

    Args:
        config: the tower's.

    Source: SigLIP (Zhai et al. 2023), after the Set Transformer (Lee et al. 2019).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_width
        self.heads, self.activation = config.heads, config.activation
        self.probe = nn.Parameter(torch.empty(width))
        self.q, self.q_bias = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(width))
        self.kv, self.kv_bias = nn.Parameter(torch.empty(2 * width, width)), nn.Parameter(torch.empty(2 * width))
        self.out, self.out_bias = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(width))
        self.norm = Norm(width, config.norm_eps, config.norm)
        self.w1, self.b1 = nn.Parameter(torch.empty(hidden, width)), nn.Parameter(torch.empty(hidden))
        self.w2, self.b2 = nn.Parameter(torch.empty(width, hidden)), nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tokens behind the last norm [T, width], cu_seqlens int32 [images + 1] -> [images, width]."""
        n, width = cu_seqlens.shape[0] - 1, tokens.shape[1]
        q = ops.linear(self.probe[None], self.q, self.q_bias).view(1, self.heads, -1).expand(n, -1, -1)
        k, v = ops.linear(tokens, self.kv, self.kv_bias).view(-1, 2, self.heads, width // self.heads).unbind(1)
        seen = ops.perceiver_attention(q, k, v, None, None, cu_seqlens, num_latents=1)
        x = ops.linear(seen.flatten(1), self.out, self.out_bias)
        return ops.mlp(
            x, self.w1, self.b1, self.w2, self.b2, activation=self.activation, residual=x, norm=self.norm.spec
        )


class ClipHead(nn.Module):
    """Projection of the class token, and the temperature (CLIP, Radford et al. 2021).

    Args:
        width: of the tower.
        embed: channels shared with the text encoder.
    """

    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed, width))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def forward(self, class_tokens: Tensor) -> Tensor:
        """Class tokens behind the last norm [images, width] -> unit vectors [images, embed]."""
        return functional.normalize(ops.linear(class_tokens, self.weight), dim=-1)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Unit vectors [images, embed] and [texts, embed] -> [images, texts]."""
        return ops.linear(image * self.logit_scale.exp(), text)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """``softmax_loss`` at this temperature."""
        return softmax_loss(image, text, self.logit_scale)


class SiglipHead(nn.Module):
    """Attention pooling, temperature and bias (SigLIP, Zhai et al. 2023).

    Args:
        config: the tower's.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.pool = AttentionPool(config)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tokens behind the last norm [T, width], cu_seqlens int32 [images + 1] -> unit vectors [images, width]."""
        return functional.normalize(self.pool(tokens, cu_seqlens), dim=-1)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Unit vectors [images, width] and [texts, width] -> [images, texts]."""
        return ops.linear(image * self.logit_scale.exp(), text) + self.logit_bias

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """``sigmoid_loss`` at this temperature and bias."""
        return sigmoid_loss(image, text, self.logit_scale, self.logit_bias)


def softmax_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss: each image finds its text among all, each text its image; the mean of both cross-entropies.

    Args:
        image, text: [n, C] unit vectors; row i of one belongs to row i of the other.
        logit_scale: scalar, the logarithm of the inverse temperature.

    Returns:
        a number (float32, or float64); NaN for n = 0.

    Raises:
        ValueError: shapes that differ.

    Source: CLIP (Radford et al. 2021).
    """
    _check_pairs(image, text)
    own = torch.arange(image.shape[0], device=image.device)
    scale = logit_scale.exp().to(image.dtype)
    if image.shape[0] == 0:
        return (image.sum() + text.sum()) * scale.sum() * float("nan")
    by_image = ops.linear_cross_entropy(image * scale, text, own)
    return (by_image + ops.linear_cross_entropy(text * scale, image, own)) / 2


def sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, rows: int = 4096) -> Tensor:
    """SigLIP's loss: every pair is a yes or no of its own, -log sigmoid(z (s x y + b)), z = 1 for a pair's own, else -1.

    Args:
        image, text: [n, C] unit vectors; row i of one belongs to row i of the other.
        logit_scale: scalar or [1], the logarithm of s.
        logit_bias: scalar or [1], b.
        rows: texts whose logits exist at a time; they are computed again for the gradient.

    Returns:
        a number: the sum over pairs divided by n; NaN for n = 0.

    Raises:
        ValueError: shapes that differ.

    Source: SigLIP (Zhai et al. 2023).
    """
    _check_pairs(image, text)
    n = image.shape[0]
    total = image.new_zeros((), dtype=torch.promote_types(image.dtype, torch.float32))
    for first in range(0, n, rows):
        part = (text[first : first + rows], image, logit_scale, logit_bias, first)
        if n <= rows or not torch.is_grad_enabled():
            total = total + _sigmoid_rows(*part)
        else:
            total = total + checkpoint(_sigmoid_rows, *part, use_reentrant=False)
    return total / n


def _sigmoid_rows(text: Tensor, image: Tensor, scale: Tensor, bias: Tensor, first: int) -> Tensor:
    """The loss's sum over some texts and all images."""
    logits = ops.linear(text * scale.exp().to(text.dtype), image) + bias.to(text.dtype)  # [rows, n]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = torch.diagonal(logits, offset=first)
    # -log sigmoid(-x) = softplus(x), and for a pair's own softplus(-x) = softplus(x) - x
    return functional.softplus(logits).sum() - own.sum()


def _check_pairs(image: Tensor, text: Tensor) -> None:
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(f"text: expected [n, C] like image {list(image.shape)}, got {list(text.shape)}")
