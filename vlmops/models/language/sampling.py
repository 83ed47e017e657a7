"""From scores to tokens: greedy, temperature, top-k, top-p, min-p, repetition penalty; seeded, and the same in any batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling", "choose", "filtered"]

SPREAD = 0x9E3779B97F4A7C15  # odd, 2**64 divided by the golden ratio


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy.

    Args:
        temperature: divides the scores; 0: the most likely token, and the options below but the penalty mean nothing.
        top_k: the so many most likely tokens alone; 0: all.
        top_p: the most likely tokens that together have this probability (the one that reaches it included); 1: all.
        min_p: tokens at least this share as likely as the most likely one; 0: all.
        repetition_penalty: p > 0: a token that was already there (prompt included) has its score divided by p where it is
            positive, multiplied where it is negative; 1: none.
        seed: of the random numbers; None: drawn from torch's default generator.

    Raises:
        ValueError: a value outside of these ranges.

    Source: top-p: Holtzman et al. 2020; min-p: Nguyen et al. 2024; repetition penalty: CTRL (Keskar et al. 2019). The order
    (penalty, temperature, top-k, top-p, min-p) is transformers'.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = [
            ("temperature", self.temperature >= 0 and self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
        ]
        for name, fine, words in ranges:
            if not fine:
                raise ValueError(f"{name}: expected {words}, got {getattr(self, name)}")

    def uniforms(self, sequences: int, steps: int) -> Tensor:
        """float32 [sequences, steps] in [0, 1): a row depends on the seed and its number alone, whatever the batch or device."""
        seed = self.seed if self.seed is not None else int(torch.randint(2**62, ()))
        seeds = [(seed * SPREAD + i) % 2**63 for i in range(sequences)]  # neighbouring seeds share no row
        rows = [torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows) if rows else torch.empty(0, steps)


def filtered(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Scores after every option; -inf for tokens that cannot be chosen.

    Args:
        logits: floating point [n, vocab].
        sampling: the options.
        seen: bool [n, vocab]: tokens that were already there; needed for a repetition penalty.

    Returns:
        float32 [n, vocab].
    """
    x = logits.float()
    if sampling.repetition_penalty != 1.0 and seen is not None:
        p = sampling.repetition_penalty
        x = torch.where(seen, torch.where(x > 0, x / p, x * p), x)
    if sampling.temperature == 0:
        return x
    x = x / sampling.temperature
    if 0 < sampling.top_k < x.shape[1]:
        x = x.masked_fill(x < x.topk(sampling.top_k).values[:, -1:], float("-inf"))
    if sampling.top_p < 1:
        ordered, order = x.sort(dim=-1, descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= sampling.top_p  # what stands in front is enough
        x = x.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), float("-inf"))
    if sampling.min_p > 0:
        share = x.softmax(-1)
        x = x.masked_fill(share < sampling.min_p * share.amax(-1, keepdim=True), float("-inf"))
    return x


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
    """One token a row.

    Args:
        logits, sampling, seen: as for ``filtered``.
        uniform: float [n] in [0, 1): one random number a row.

    Returns:
        int64 [n].
    """
    x = filtered(logits, sampling, seen)
    if sampling.temperature == 0:
        return x.argmax(-1)
    # The inverse of the distribution function, in double precision: a vocabulary has 1e5 tokens.
    reached = x.double().softmax(-1).cumsum(-1)
    aim = uniform.to(reached)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, aim, right=True)[:, 0].clamp_(max=x.shape[1] - 1)
