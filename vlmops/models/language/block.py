"""One block of the decoder: attention and MLP, each with its norm and residual add."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import DecoderConfig
from vlmops.models.language.cache import KVCache, Span
from vlmops.models.norm import Norm

__all__ = ["Block", "HeadNorm", "Packing"]


@dataclass(frozen=True)
class Packing:
    """What all blocks of one forward share.

    Args:
        cu_seqlens: int32 [n + 1]: where each sequence starts; with a cache that of its ``span``.
        longest: no sequence has more tokens (host).
        rope: (cos, sin), each float32 [T, rotary_dim]; None where positions are learned.
        positions: integers [T] or [3, T].
        prefix_lens: int32, one a sequence of ``cu_seqlens``: tokens that all see each other; or None.
        cache, span: where keys and values go; or None.
    """

    cu_seqlens: Tensor
    longest: int
    rope: tuple[Tensor, Tensor] | None
    positions: Tensor
    prefix_lens: Tensor | None = None
    cache: KVCache | None = None
    span: Span | None = None


class HeadNorm(nn.Module):
    """LayerNorm of each head of queries or keys, with one weight for all heads (Persimmon) or one for each (Chameleon).

    Args:
        heads: how many have a weight of their own; None: they share one.
        dim: channels of a head.
        eps: added to the variance.
    """

    def __init__(self, heads: int | None, dim: int, eps: float) -> None:
        super().__init__()
        shape = (dim,) if heads is None else (heads, dim)
        self.eps, self.weight, self.bias = eps, nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        """[T, heads, dim] -> the same."""
        shared = self.weight.dim() == 1
        out = ops.layer_norm(x, *((self.weight, self.bias) if shared else (None, None)), eps=self.eps)
        assert isinstance(out, Tensor)  # a pair only where a residual is given
        return out if shared else out * self.weight + self.bias


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma 2 has norms behind the two as well, Chameleon 30B there alone."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, hidden, inner, outer = (
            config.width,
            config.mlp_width,
            config.heads * config.dim,
            config.groups * config.dim,
        )
        self.window = (config.window - 1, 0) if config.window is not None and config.windowed(layer) else None

        def norm(wanted: bool) -> Norm | None:
            return Norm(width, config.norm_eps, config.norm, config.norm_offset) if wanted else None

        def vector(size: int, wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(size)) if wanted else None

        def head_norm(heads: int) -> HeadNorm | None:
            own = heads if config.qk_norm == "heads" else None
            return HeadNorm(own, config.dim, config.qk_norm_eps) if config.qk_norm else None

        before, behind = not config.norm_after, config.sandwich or config.norm_after
        self.norm1 = norm(before)
        self.qkv = nn.Parameter(torch.empty(inner + 2 * outer, width))  # query heads, key heads, value heads
        self.qkv_bias = vector(inner + 2 * outer, config.qkv_bias)
        self.q_norm, self.k_norm = head_norm(config.heads), head_norm(config.groups)
        self.o = nn.Parameter(torch.empty(width, inner))
        self.o_bias = vector(width, config.o_bias)
        self.post_norm1 = norm(behind)
        self.norm2 = norm(before)
        self.w_gate = nn.Parameter(torch.empty(hidden, width)) if config.gated else None
        self.b_gate = vector(hidden, config.mlp_bias and config.gated)
        self.w_up = nn.Parameter(torch.empty(hidden, width))
        self.b_up = vector(hidden, config.mlp_bias)
        self.w_down = nn.Parameter(torch.empty(width, hidden))
        self.b_down = vector(width, config.mlp_bias)
        self.post_norm2 = norm(behind)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, width] -> the same."""
        seen = self.attend(x if self.norm1 is None else self.norm1(x), packing)
        out = ops.linear(seen, self.o, self.o_bias, residual=x if self.post_norm1 is None else None)
        x = out if self.post_norm1 is None else x + self.post_norm1(out)
        out = self.feed(x, x if self.post_norm2 is None else None)
        return out if self.post_norm2 is None else x + self.post_norm2(out)

    def attend(self, x: Tensor, packing: Packing) -> Tensor:
        """Causal attention inside each sequence, up to its output projection: [T, width] -> [T, heads * head_dim]."""
        return self.mix(ops.linear(x, self.qkv, self.qkv_bias), packing)

    def mix(self, qkv: Tensor, packing: Packing) -> Tensor:
        """The attention of projected queries, keys and values: [T, (heads + 2 kv_heads) * head_dim] -> [T, heads * head_dim]."""
        config, cache, span = self.config, packing.cache, packing.span
        heads, groups = config.heads, config.groups
        q, k, v = qkv.view(qkv.shape[0], heads + 2 * groups, config.dim).split([heads, groups, groups], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rope, cu_k, longest_k = packing.rope, packing.cu_seqlens, packing.longest
        # Keys are kept rotated; and the attention turns whole heads alone.
        if rope is not None and (cache is not None or config.rotary_dim < config.dim):
            q, k = ops.rotary(q, *rope, k=k)
            rope = None
        if cache is not None and span is not None:
            k, v = cache.write(self.layer, k, v, span)
            cu_k, longest_k = span.cu_seqlens_k, cache.capacity
        out = ops.varlen_attention(
            q, k, v, packing.cu_seqlens, cu_k, max_seqlen_q=packing.longest, max_seqlen_k=longest_k,
            scale=config.query_scale, causal=True, window=self.window, prefix_lens=packing.prefix_lens,
            softcap=config.attention_softcap, rope=rope,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return out.flatten(1)

    def feed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The MLP behind its norm, plus the residual: [T, width] -> the same."""
        # The op's own norm knows no offset.
        fused = self.norm2 is not None and self.norm2.offset == 0 and self.config.activation != "relu2"
        spec = self.norm2.spec if self.norm2 is not None and fused else None
        x = x if self.norm2 is None or fused else self.norm2(x)
        if self.config.activation == "relu2":
            hidden = ops.linear(x, self.w_up, self.b_up, activation="relu")
            return ops.linear(hidden.square(), self.w_down, self.b_down, residual=residual)
        return ops.mlp(
            x, self.w_up, self.b_up, self.w_down, self.b_down, activation=self.config.activation, w_gate=self.w_gate,
            b_gate=self.b_gate, norm=spec, residual=residual,
        )  # fmt: skip
