"""Keys and values of the tokens that were: a batch of sequences of different lengths, grown without moving them each step.

Every sequence has room for ``capacity`` tokens in one tensor [sequences * capacity, kv_heads, head_dim] a layer, and attention
reads that tensor where it lies. Packed attention knows no gaps; so the free room behind each sequence is given to it as one more
sequence, one without queries, which nobody reads:

    keys      | a a a a . . | b b . . . . |        cu_seqlens_k   0 4 6 8 12
    queries   | a           | b           |        cu_seqlens_q   0 1 1 2 2

All of it is computed on the device, so a step with a fixed capacity can be captured in a CUDA graph. Keys are kept rotated.
Layers with a sliding window keep all their tokens too: the window is the attention's mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmops.models.config import DecoderConfig
from vlmops.ops._shared import checks

__all__ = ["KVCache", "Span", "sequence_of"]

ROUND = 64  # tokens a capacity is a multiple of


def sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [tokens]: which sequence each packed token belongs to."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True).clamp_(
        max=max(0, cu_seqlens.shape[0] - 2)
    )


@dataclass(frozen=True)
class Span:
    """Where a forward's new tokens stand in a cache.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [2 n + 1], the free room of each sequence being one of its own.
        slots: int64 [T]: the row of each new token.
        positions: int64 [T]: tokens in front of each one in its sequence.
        lengths: int64 [n]: tokens of each sequence, the new ones included.
        bound: no sequence is longer than this (host).
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    slots: Tensor
    positions: Tensor
    lengths: Tensor
    bound: int


class KVCache:
    """The cache of one batch.

    Args:
        config: of the decoder.
        sequences: n, how many.
        capacity: tokens each has room for at first; it grows to at least twice as many when they are too few.
        device, dtype: of the decoder.

    Raises:
        ValueError: sequences or capacity below 1, or more than 2**31 - 1 tokens together.
    """

    def __init__(
        self, config: DecoderConfig, sequences: int, *, device: torch.device, dtype: torch.dtype, capacity: int = 256
    ) -> None:
        if sequences < 1 or capacity < 1:
            raise ValueError(f"cache: expected at least 1 sequence and capacity, got {sequences} and {capacity}")
        self.sequences, self.capacity, self.bound = sequences, self._room(sequences, capacity), 0
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=device)
        shape = (sequences * self.capacity, config.groups, config.dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]

    @staticmethod
    def _room(sequences: int, tokens: int) -> int:
        rounded = -(-tokens // ROUND) * ROUND
        if sequences * rounded >= 2**31:
            raise ValueError(
                f"cache: {sequences} sequences of {rounded} tokens are more than int32 cu_seqlens can count"
            )
        return rounded

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def begin(self, cu_seqlens: Tensor, tokens: int, longest: int) -> Span:
        """Room for new tokens; they count once ``commit`` was called.

        Args:
            cu_seqlens: integers [n + 1]: where each sequence's new tokens start; a sequence may have none.
            tokens: T, how many there are.
            longest: the most that one sequence has, or a bound of it (host): the room is made for so many.

        Raises:
            ValueError: another number of sequences.
        """
        checks.check_shape("cu_seqlens", cu_seqlens, (self.sequences + 1,), f"[{self.sequences + 1}] as in the cache")
        bound = self.bound + longest
        if bound > self.capacity:
            self._grow(max(bound, 2 * self.capacity))
        cu = cu_seqlens.long()
        which = sequence_of(cu, tokens)
        positions = torch.arange(tokens, device=cu.device) - cu[which] + self.lengths[which]
        lengths = self.lengths + cu.diff()
        first = torch.arange(self.sequences + 1, device=cu.device) * self.capacity
        ends = torch.stack([first[:-1], first[:-1] + lengths], 1).flatten()
        return Span(
            cu_seqlens_q=torch.cat([torch.stack([cu[:-1], cu[1:]], 1).flatten(), cu[-1:]]).int(),
            cu_seqlens_k=torch.cat([ends, first[-1:]]).int(),
            slots=first[which] + positions,
            positions=positions,
            lengths=lengths,
            bound=bound,
        )

    def write(self, layer: int, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Keeps k and v [T, kv_heads, head_dim] of one layer; returns all of its rows, for ``cu_seqlens_k``."""
        return (
            self.keys[layer].index_copy_(0, span.slots, k.to(self.keys[layer].dtype)),
            self.values[layer].index_copy_(0, span.slots, v.to(self.values[layer].dtype)),
        )

    def commit(self, span: Span) -> None:
        """The new tokens are there in every layer."""
        self.lengths.copy_(span.lengths)
        self.bound = span.bound

    def _grow(self, tokens: int) -> None:
        """More room: a layer after the other, so that only one exists twice."""
        capacity = self._room(self.sequences, tokens)
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                new = old.new_zeros(self.sequences, capacity, *old.shape[1:])
                new[:, : self.capacity] = old.unflatten(0, (self.sequences, self.capacity))
                store[i] = new.flatten(0, 1)
        self.capacity = capacity
