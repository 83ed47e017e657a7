"""One case of a parity table, and the random values they are made of."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Arguments", "Case", "Values", "borders"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Values:
    """Seeded random arguments of one case, in two sizes.

    Args:
        name: of the case; seeds the values.
        tiny: the size for Triton's interpreter, which takes a millisecond a program, instead of that for a GPU.
    """

    def __init__(self, name: str, tiny: bool) -> None:
        self.rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.tiny = tiny

    def size(self, tiny: Any, gpu: Any) -> Any:
        """One of two sizes."""
        return tiny if self.tiny else gpu

    def random(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        """Normal float32 values; with ``grad`` their gradient is checked too."""
        return (torch.randn(shape, generator=self.rng) * scale).requires_grad_(grad)

    def weight(self, *shape: int, grad: bool = True) -> Tensor:
        """Values that keep a product's rows near 1."""
        return self.random(*shape, scale=1 / math.sqrt(max(1, math.prod(shape[1:]))), grad=grad)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """0 <= n < high."""
        return torch.randint(0, max(1, high), shape, generator=self.rng).to(dtype)

    def tables(self, tokens: int, width: int) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens, width] of random angles, without gradient."""
        angles = torch.randn(tokens, width, generator=self.rng)
        return angles.cos(), angles.sin()

    def packed(
        self, lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None, *, heads: int = 2, kv_heads: int = 2,
        dim: int = 16,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """q [Tq, heads, dim], k and v [Tk, kv_heads, dim], and the borders of both."""
        keys = lengths_q if lengths_k is None else lengths_k
        q = self.random(sum(lengths_q), heads, dim)
        k, v = (self.random(sum(keys), kv_heads, dim) for _ in range(2))
        return q, k, v, borders(lengths_q), borders(keys)


def borders(lengths: Sequence[int]) -> Tensor:
    """int32 [n + 1] borders of packed sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class Case:
    """One call of an op that is compared with the oracle.

    Args:
        op: the op's name in the registry.
        label: what is special about it.
        call: the op's public face.
        make: positional and keyword arguments, float32 on the CPU; tensors with ``requires_grad`` get their gradients compared.
        core: one of the few that run first and in every dtype, however little time there is.
        same_bits: whether two runs have to agree bit by bit.
        captured: whether a CUDA graph has to hold it.
    """

    op: str
    label: str
    call: Callable[..., Any]
    make: Callable[[Values], Arguments]
    core: bool = False
    same_bits: bool = True
    captured: bool = True

    @property
    def name(self) -> str:
        """Unique, e.g. "varlen_attention: causal"."""
        return f"{self.op}: {self.label}"

    def arguments(self, tiny: bool) -> Arguments:
        """The arguments, the same at every call."""
        return self.make(Values(self.name, tiny))
