"""Batched generation: prompts of any length side by side without padding, as whole answers or as a stream of text.

    for answer in generate(decoder, [[1, 5, 9], [1, 7]], max_new_tokens=20, stop_ids=[2]):
        print(answer.ids)

A vision-language model passes ``embed``, which turns the prompts' ids into what its decoder reads. The host reads the chosen
tokens once a step, since ends and stop strings are its business; all else stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmops.models.language.cache import sequence_of
from vlmops.models.language.sampling import Sampling, choose
from vlmops.models.language.text import TextStream

__all__ = ["Generated", "Model", "Sampling", "generate", "stream"]

Prompts = Sequence[Sequence[int] | Tensor]
Embed = Callable[[Tensor, Tensor], Mapping[str, Any]]
FIRST_ROOM = 256  # new tokens the cache has room for before it grows


class Model(Protocol):
    """What is asked of a model; ``language.decoder.Decoder`` is one."""

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""

    def __call__(self, input_ids: Tensor | None, cu_seqlens: Tensor, positions: Tensor | None, **more: Any) -> Tensor:
        """Hidden states [T, width] of packed tokens; ``more``: cache, longest, and what ``embed`` gave."""

    def logits(self, hidden: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """[n, vocab] of each sequence's last token, or of every one."""

    def new_cache(self, sequences: int, capacity: int) -> Any:
        """A cache for so many sequences."""


@dataclass(frozen=True)
class Generated:
    """One sequence's answer.

    Args:
        ids: the new tokens, with the stop id if one came.
        text: decoded, without the stop id and up to a stop string; None without a tokenizer.
        finish: "stop_id", "stop_string" or "length".
    """

    ids: list[int]
    text: str | None
    finish: str


def generate(
    model: Model,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stop: Sequence[str] = (),
    tokenizer: Any = None,
    embed: Embed | None = None,
    use_cache: bool = True,
) -> list[Generated]:
    """Continues every prompt.

    Args:
        model: a ``Decoder`` or what looks like one.
        prompts: token ids of each, at least one.
        max_new_tokens: at most so many for each.
        sampling: greedy if None.
        stop_ids: tokens that end a sequence (end of text, end of turn).
        stop: strings that end a sequence; they need a tokenizer. The tokens that made one are among the ids.
        tokenizer: anything with ``decode(ids) -> str``.
        embed: ``embed(input_ids [T], cu_seqlens [n + 1])`` on the model's device gives keyword arguments of the model's
            forward for the prompts, ``inputs_embeds`` [T, width] and ``positions`` ([T], or [3, T] for M-RoPE) among them.
            New tokens are embedded by the model; their positions follow the greatest of their sequence.
        use_cache: False computes everything anew in each step: slow, for checking.

    Returns:
        One answer a prompt, in their order. A sequence's answer does not depend on the batch it is in, random numbers included
        (the i-th prompt has its own), up to rounding.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    run = _Run(model, prompts, max_new_tokens, sampling, stop_ids, stop, tokenizer, embed, use_cache)
    for _ in run.steps():
        pass
    return run.answers()


def stream(
    model: Model,
    prompts: Prompts,
    tokenizer: Any,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stop: Sequence[str] = (),
    embed: Embed | None = None,
) -> Iterator[tuple[int, str]]:
    """``generate`` as it goes: (number of the prompt, piece of text).

    A piece never ends inside a character, nor inside what may become a stop string. Joined, a prompt's pieces are its ``text``.
    Arguments and errors are those of ``generate``; they are checked at the call, not at the first piece.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: needed to stream text")
    run = _Run(model, prompts, max_new_tokens, sampling, stop_ids, stop, tokenizer, embed, True)
    return (piece for pieces in run.steps() for piece in pieces if piece[1])


class _Run:
    """The state of one batch between steps; arguments as for ``generate``."""

    def __init__(
        self, model: Model, prompts: Prompts, max_new_tokens: int, sampling: Sampling | None, stop_ids: Collection[int],
        stop: Sequence[str], tokenizer: Any, embed: Embed | None, use_cache: bool,
    ) -> None:  # fmt: skip
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens!r}")
        if stop and tokenizer is None:
            raise ValueError("stop: strings need a tokenizer")
        if embed is not None and not use_cache:
            raise ValueError("use_cache: needed with embed, which makes the inputs of the prompts alone")
        self.model, self.embed, self.use_cache = model, embed, use_cache
        self.prompts = [_ids(i, prompt) for i, prompt in enumerate(prompts)]
        self.limit, self.sampling, self.stop_ids = max_new_tokens, sampling or Sampling(), frozenset(stop_ids)
        n = len(self.prompts)
        self.new: list[list[int]] = [[] for _ in range(n)]
        self.finish = ["length"] * n
        self.texts = None if tokenizer is None else [TextStream(tokenizer, stop) for _ in range(n)]
        self.pieces: list[list[str]] = [[] for _ in range(n)]

    def answers(self) -> list[Generated]:
        """What came of each prompt."""
        texts = ["".join(p) if self.texts is not None else None for p in self.pieces]
        return [Generated(*parts) for parts in zip(self.new, texts, self.finish, strict=True)]

    def steps(self) -> Iterator[list[tuple[int, str]]]:
        """Runs; gives the text of each step."""
        active = list(range(len(self.prompts)))
        if not active or not self.limit:
            return
        uniforms = self.sampling.uniforms(len(active), self.limit).to(self.model.device)
        logits = self.start()
        for step in range(self.limit):
            chosen = self.choose(logits, active, uniforms[:, step])
            pieces, alive = [], []
            for i, token in zip(active, chosen.tolist(), strict=True):
                ended = self.take(i, token)
                if ended or step + 1 == self.limit:
                    pieces.append((i, self.text(i, token, last=True)))
                else:
                    pieces.append((i, self.text(i, token)))
                    if self.texts is None or not self.texts[i].stopped:
                        alive.append(i)
            yield pieces
            if not alive or step + 1 == self.limit:
                return
            if len(alive) < len(active):
                rows = torch.tensor([active.index(i) for i in alive], device=chosen.device)
                chosen, active = chosen[rows], alive
            logits = self.next(chosen, active)

    def take(self, i: int, token: int) -> bool:
        """Notes a sequence's next token; whether it is an end."""
        self.new[i].append(token)
        if token in self.stop_ids:
            self.finish[i] = "stop_id"
        return token in self.stop_ids

    def text(self, i: int, token: int, last: bool = False) -> str:
        """The piece of text that a token completes."""
        if self.texts is None:
            return ""
        piece = "" if self.finish[i] == "stop_id" else self.texts[i].push(token)
        if last:
            piece += self.texts[i].flush()
        if self.texts[i].stopped and self.finish[i] != "stop_id":
            self.finish[i] = "stop_string"
        self.pieces[i].append(piece)
        return piece

    @torch.no_grad()
    def start(self) -> Tensor:
        """Reads the prompts: [n, vocab]."""
        ids, cu, lengths = self.packed(self.prompts)
        more: dict[str, Any] = {} if self.embed is None else dict(self.embed(ids, cu))
        positions = more.pop("positions", None)
        if positions is None:
            self.following = cu.diff().long()
        else:
            top = positions if positions.dim() == 1 else positions.amax(0)
            first = torch.full((len(lengths),), -1, dtype=torch.int64, device=cu.device)
            self.following = 1 + first.scatter_reduce(0, sequence_of(cu, ids.shape[0]), top.long(), "amax")
        self.seen: Tensor | None = None
        if self.use_cache:
            room = max(lengths) + min(self.limit, FIRST_ROOM)
            more |= dict(cache=self.model.new_cache(len(lengths), room))
            self.cache = more["cache"]
        hidden = self.model(None if "inputs_embeds" in more else ids, cu, positions, longest=max(lengths), **more)
        logits = self.model.logits(hidden, cu)
        if self.sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            self.seen[sequence_of(cu, ids.shape[0]), ids] = True
        self.set_active(list(range(len(lengths))))
        return logits

    @torch.no_grad()
    def choose(self, logits: Tensor, active: list[int], uniform: Tensor) -> Tensor:
        """The next token of each active sequence: int64 [active]."""
        if active != self.active:
            self.set_active(active)
        seen = None if self.seen is None else self.seen[self.rows]
        chosen = choose(logits, self.sampling, uniform[self.rows], seen)
        if self.seen is not None:
            self.seen[self.rows, chosen] = True
        return chosen

    @torch.no_grad()
    def next(self, tokens: Tensor, active: list[int]) -> Tensor:
        """Reads the tokens just chosen: [active, vocab]."""
        if active != self.active:
            self.set_active(active)
        if not self.use_cache:
            ids, cu, lengths = self.packed([self.prompts[i] + self.new[i] for i in active])
            return self.model.logits(self.model(ids, cu, None, longest=max(lengths)), cu)
        positions = self.following[self.rows]
        self.following[self.rows] = positions + 1
        return self.model.logits(self.model(tokens, self.cu_active, positions, cache=self.cache, longest=1))

    def set_active(self, active: list[int]) -> None:
        """Index tensors of the sequences that go on; the others have no new tokens and keep their place in the cache."""
        device, here = self.model.device, set(active)
        self.active = list(active)
        self.rows = torch.tensor(active, device=device)
        counts = torch.tensor([0, *(int(i in here) for i in range(len(self.prompts)))])
        self.cu_active = counts.cumsum(0).int().to(device)

    def packed(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor, list[int]]:
        """ids [T], cu_seqlens [n + 1], lengths."""
        lengths = [len(s) for s in sequences]
        ids = torch.tensor([token for s in sequences for token in s], device=self.model.device)
        cu = torch.tensor([0, *lengths]).cumsum(0).int().to(self.model.device)
        return ids, cu, lengths


def _ids(i: int, prompt: Sequence[int] | Tensor) -> list[int]:
    ids = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
    if not ids or not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(f"prompts: expected at least one token id of 0 or more in prompt {i}, got {ids[:5]}")
    return ids
