"""One decoder; Llama and Vicuna, Mistral, Qwen and Gemma 2 are its options.

The tokens of all sequences lie behind each other, [T, width]: prompts of any length share each product, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import DecoderConfig
from vlmops.models.language.cache import KVCache, Span, sequence_of
from vlmops.models.language.check import check
from vlmops.models.language.rope import rotary_tables
from vlmops.models.norm import Norm
from vlmops.ops._shared import checks

__all__ = ["Block", "Decoder", "Packing"]

IGNORED = -100  # the label of a token that is not learnt


@dataclass(frozen=True)
class Packing:
    """What all blocks of one forward share.

    Args:
        cu_seqlens: int32 [n + 1]: where each sequence starts; with a cache that of its ``span``.
        longest: no sequence has more tokens (host).
        rope: (cos, sin), each float32 [T, head_dim].
        prefix_lens: int32, one a sequence of ``cu_seqlens``: tokens that all see each other; or None.
        cache, span: where keys and values go; or None.
    """

    cu_seqlens: Tensor
    longest: int
    rope: tuple[Tensor, Tensor]
    prefix_lens: Tensor | None = None
    cache: KVCache | None = None
    span: Span | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma 2 has norms behind the two as well."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, inner, outer = config.width, config.heads * config.dim, config.groups * config.dim
        self.window = (config.window - 1, 0) if config.window is not None and config.windowed(layer) else None

        def norm() -> Norm:
            return Norm(width, config.norm_eps, "rms_norm", config.norm_offset)

        self.norm1 = norm()
        self.qkv = nn.Parameter(torch.empty(inner + 2 * outer, width))  # query heads, key heads, value heads
        self.qkv_bias = nn.Parameter(torch.empty(inner + 2 * outer)) if config.qkv_bias else None
        self.o = nn.Parameter(torch.empty(width, inner))
        self.post_norm1 = norm() if config.sandwich else None
        self.norm2 = norm()
        self.w_gate = nn.Parameter(torch.empty(config.mlp_width, width))
        self.w_up = nn.Parameter(torch.empty(config.mlp_width, width))
        self.w_down = nn.Parameter(torch.empty(width, config.mlp_width))
        self.post_norm2 = norm() if config.sandwich else None

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, width] -> the same."""
        seen = self.attend(self.norm1(x), packing)
        out = ops.linear(seen, self.o, residual=x if self.post_norm1 is None else None)
        x = out if self.post_norm1 is None else x + self.post_norm1(out)
        # The op's own norm knows no offset.
        fused = self.norm2.offset == 0
        out = ops.mlp(
            x if fused else self.norm2(x), self.w_up, None, self.w_down, None, activation=self.config.activation,
            w_gate=self.w_gate, norm=self.norm2.spec if fused else None, residual=x if self.post_norm2 is None else None,
        )  # fmt: skip
        return out if self.post_norm2 is None else x + self.post_norm2(out)

    def attend(self, x: Tensor, packing: Packing) -> Tensor:
        """Causal attention inside each sequence, up to its output projection: [T, width] -> [T, heads * head_dim]."""
        config, cache, span = self.config, packing.cache, packing.span
        heads, groups = config.heads, config.groups
        qkv = ops.linear(x, self.qkv, self.qkv_bias).view(x.shape[0], heads + 2 * groups, config.dim)
        q, k, v = qkv.split([heads, groups, groups], dim=1)
        rope: tuple[Tensor, Tensor] | None = packing.rope
        cu_k, longest_k = packing.cu_seqlens, packing.longest
        if cache is not None and span is not None:
            q, k = ops.rotary(q, *packing.rope, k=k)
            k, v = cache.write(self.layer, k, v, span)
            rope, cu_k, longest_k = None, span.cu_seqlens_k, cache.capacity
        out = ops.varlen_attention(
            q, k, v, packing.cu_seqlens, cu_k, max_seqlen_q=packing.longest, max_seqlen_k=longest_k,
            scale=config.query_scale, causal=True, window=self.window, prefix_lens=packing.prefix_lens,
            softcap=config.attention_softcap, rope=rope,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return out.flatten(1)


class Decoder(nn.Module):
    """Embedding, blocks, norm, output projection.

    Args:
        config: the variant.

    Raises:
        ValueError: options that do not go together.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab, config.width))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = Norm(config.width, config.norm_eps, "rms_norm", config.norm_offset)
        self.head = None if config.tied else nn.Parameter(torch.empty(config.vocab, config.width))

    def forward(
        self,
        input_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        longest: int | None = None,
        prefix_lens: Tensor | None = None,
    ) -> Tensor:
        """Tokens to hidden states, behind the last norm.

        Args:
            input_ids: integers [T], the tokens of all sequences.
            cu_seqlens: int32 [n + 1] on their device: where each sequence starts; None: they are one.
            positions: integers [T], or [3, T] with M-RoPE; None: counted in each sequence, cached tokens included.
            inputs_embeds: [T, width], in place of ``input_ids``: what the first block reads (``embed`` gives it for ids).
            cache: of n sequences, for generation alone: the new tokens follow those in it, and are kept there. A sequence
                without new tokens stays as it is.
            longest: no sequence has more (new) tokens than this, if known on the host; a cache makes room for so many.
            prefix_lens: int32 [n]: tokens in front of each sequence that all see each other (PaliGemma); not behind cached ones.

        Returns:
            [T, width]; ``logits`` and ``loss`` take it.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or device; a cache where a gradient is wanted.
        """
        x = self._input(input_ids, inputs_embeds)
        packing = self.pack(x, cu_seqlens, positions, cache=cache, longest=longest, prefix_lens=prefix_lens)
        for block in self.blocks:
            x = block(x, packing)
        if cache is not None and packing.span is not None:
            cache.commit(packing.span)
        return self.norm(x)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Integers [T] -> [T, width], scaled where the model does that."""
        checks.check_tensor("input_ids", input_ids, dim=1, layout="[T]")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: expected int64 [T], got {checks.describe(input_ids)}")
        x = nn.functional.embedding(input_ids, self.embedding)
        if self.config.embed_scale == 1.0:
            return x
        return x * float(
            torch.tensor(self.config.embed_scale, dtype=x.dtype, device="cpu")
        )  # rounded as Gemma rounds it

    def pack(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        longest: int | None = None,
        prefix_lens: Tensor | None = None,
    ) -> Packing:
        """What the blocks need to know of a batch x [T, width]; the other arguments are ``forward``'s."""
        tokens = x.shape[0]
        cu = torch.tensor([0, tokens], dtype=torch.int32, device=x.device) if cu_seqlens is None else cu_seqlens
        checks.check_cu_seqlens("cu_seqlens", cu, x.device)
        if cu.device.type == "cpu" and not torch.compiler.is_compiling():
            starts = checks.cu_seqlens_list("cu_seqlens", cu, tokens)
            longest = max((b - a for a, b in pairwise(starts)), default=0)
        longest = tokens if longest is None else longest
        if prefix_lens is not None:
            checks.check_shape("prefix_lens", prefix_lens, (cu.shape[0] - 1,), "[n], one a sequence")
        span = None
        if cache is not None:
            if torch.is_grad_enabled() and (x.requires_grad or self.embedding.requires_grad):
                raise ValueError("cache: is for generation; call under torch.no_grad()")
            span = cache.begin(cu, tokens, longest)
            if prefix_lens is not None:
                prefix_lens = torch.stack([prefix_lens, torch.zeros_like(prefix_lens)], 1).flatten()
        which = sequence_of(cu, tokens)
        counted = torch.arange(tokens, device=cu.device) - cu[which] if span is None else span.positions
        if positions is None:
            positions = counted
        elif positions.shape[-1:] != (tokens,):
            raise ValueError(f"positions: expected [{tokens}], one a token, got {checks.describe(positions)}")
        scaling, lengths = self.config.rope_scaling, None
        if scaling is not None and scaling.kind == "dynamic":
            lengths = (cu.diff() if span is None else span.lengths)[which]
        rope = rotary_tables(self.config, positions, lengths)
        return Packing(cu if span is None else span.cu_seqlens_q, longest, rope, prefix_lens, cache, span)

    def logits(self, hidden: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Scores of every word.

        Args:
            hidden: [T, width], of ``forward``.
            cu_seqlens: [n + 1]: the last token of each sequence alone (none may be empty); None: every token.

        Returns:
            [n, vocab] or [T, vocab].
        """
        if cu_seqlens is not None:
            hidden = hidden[cu_seqlens[1:].long() - 1]
        x, cap = ops.linear(hidden, self.output), self.config.logit_softcap
        return torch.tanh(x / cap) * cap if cap else x

    def loss(
        self, hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, *, reduction: str = "mean"
    ) -> Tensor:
        """Cross-entropy of each next token; the logits of all tokens never exist at once.

        Args:
            hidden: [T, width], of ``forward``.
            labels: int64 [T], the tokens themselves, or -100 for those that are not learnt (prompts, images).
            cu_seqlens: integers [n + 1]: a sequence's last token has no next; None: they are one sequence.
            reduction: "mean" over the learnt tokens, "sum", or "none": [T], that of a token standing at the one in front.

        Source: transformers' ``ForCausalLMLoss`` on padded batches.
        """
        checks.check_tensor("labels", labels, dim=1, layout="[T]")
        checks.check_shape("labels", labels, hidden.shape[:1], f"[{hidden.shape[0]}], one a token")
        last = torch.zeros(labels.shape[0] + 1, dtype=torch.bool, device=labels.device)
        if cu_seqlens is not None:
            last.index_fill_(0, cu_seqlens[1:].long(), True)
        following = torch.cat([labels[1:], labels.new_full((min(1, labels.shape[0]),), IGNORED)])
        targets = following.masked_fill(last[1:], IGNORED)
        return ops.linear_cross_entropy(
            hidden, self.output, targets, ignore_index=IGNORED, reduction=reduction, softcap=self.config.logit_softcap
        )

    def new_cache(self, sequences: int, capacity: int = 256) -> KVCache:
        """An empty cache in the decoder's dtype, on its device."""
        return KVCache(
            self.config, sequences, capacity=capacity, device=self.embedding.device, dtype=self.embedding.dtype
        )

    @property
    def output(self) -> Tensor:
        """[vocab, width]: the output projection, which may be the embedding."""
        return self.embedding if self.head is None else self.head

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.device

    def _input(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected either them or inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            return self.embed(input_ids)
        width = self.config.width
        checks.check_shape("inputs_embeds", inputs_embeds, (None, width), f"[T, {width}]")
        return inputs_embeds
