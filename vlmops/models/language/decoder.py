"""One decoder; Llama and Vicuna, Mistral, Qwen, Gemma 2, OPT, Persimmon and Chameleon's are its options.

The tokens of all sequences lie behind each other, [T, width]: prompts of any length share each product, without padding.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from vlmops import ops
from vlmops.models.config import DecoderConfig
from vlmops.models.language.block import Block, Packing
from vlmops.models.language.cache import KVCache, sequence_of
from vlmops.models.language.check import check
from vlmops.models.language.rope import rotary_tables
from vlmops.models.norm import Norm
from vlmops.ops._shared import checks

__all__ = ["Block", "Decoder", "Packing"]

IGNORED = -100  # the label of a token that is not learnt


class Decoder(nn.Module):
    """Embedding, blocks (``block.py``), norm, output projection.

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
        rows = config.learned_positions + config.position_offset
        self.position_embedding = nn.Parameter(torch.empty(rows, config.width)) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = Norm(config.width, config.norm_eps, config.norm, config.norm_offset)
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
            inputs_embeds: [T, width], in place of ``input_ids``: what ``embed`` gives for ids; learned positions are added here.
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
        return self.run(x, packing)

    def run(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, width] through the blocks, and ``finish``."""
        x = self.placed(x, packing)
        for block in self.blocks:
            x = block(x, packing)
        return self.finish(x, packing)

    def finish(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, width] behind the last block through the last norm; the cache, if there is one, keeps the new tokens."""
        if packing.cache is not None and packing.span is not None:
            packing.cache.commit(packing.span)
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
        packed = Packing(cu if span is None else span.cu_seqlens_q, longest, None, positions, prefix_lens, cache, span)
        if self.config.learned_positions:
            self._check_positions(positions)
            return packed
        scaling, lengths = self.config.rope_scaling, None
        if scaling is not None and scaling.kind == "dynamic":
            lengths = (cu.diff() if span is None else span.lengths)[which]
        return replace(packed, rope=rotary_tables(self.config, positions, lengths))

    def placed(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, width] plus the learned vectors of its positions, where the model has them."""
        if self.position_embedding is None:
            return x
        rows = packing.positions + self.config.position_offset
        return x + nn.functional.embedding(rows, self.position_embedding)

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
        return self.cross_entropy(hidden, targets, reduction)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """``loss`` of hidden [T, width] against the words that follow, int64 [T], -100 where nothing is learnt."""
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

    def _check_positions(self, positions: Tensor) -> None:
        """ValueError for a position without a learned vector; on a GPU a look at them would be a sync, there the lookup traps."""
        last = self.config.learned_positions - 1
        if positions.dim() != 1:
            raise ValueError(f"positions: expected [T], got {checks.describe(positions)}")
        if positions.is_cpu and positions.numel() and not torch.compiler.is_compiling():
            least, most = (int(end) for end in positions.aminmax())
            if least < 0 or most > last:
                raise ValueError(f"positions: this model has 0 to {last}, got {least} to {most}")
