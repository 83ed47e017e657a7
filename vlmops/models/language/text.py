"""Text out of tokens as they come: pieces that never end inside a character or inside what may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

UNFINISHED = "\ufffd"  # what a tokenizer gives for bytes that are no whole character yet


class TextStream:
    """Decodes one sequence token by token.

    Joined, the pieces are what the tokenizer makes of all tokens at once, up to the first stop string.

    Args:
        tokenizer: anything with ``decode(ids) -> str``.
        stop: strings that end the text and are no part of it.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop: expected a sequence of strings, none empty, got {stop!r}")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.start = self.done = 0  # decoded again for their neighbour's sake: start:done; out already: :done
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that this token makes certain, often none. Sets ``stopped`` when a stop string is complete."""
        self.ids.append(token)
        text = self._new()
        if text.endswith(UNFINISHED):
            return ""
        if text:
            self.start, self.done = self.done, len(self.ids)
        return self._release(text, last=False)

    def flush(self) -> str:
        """What was held back; no token follows."""
        text = self._new()
        self.start = self.done = len(self.ids)
        return self._release(text, last=True)

    def _new(self) -> str:
        """Text of the tokens that are not out, decoded behind those before: some tokenizers drop a first token's space."""
        before = self.tokenizer.decode(self.ids[self.start : self.done]) if self.start < self.done else ""
        return self.tokenizer.decode(self.ids[self.start :])[len(before) :] if self.done < len(self.ids) else ""

    def _release(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        self.held += text
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if found:
            out, self.held, self.stopped = self.held[: min(found)], "", True
            return out
        keep = 0
        if not last:
            longest = min(len(self.held), max(map(len, self.stop), default=1) - 1)
            ends = (n for n in range(longest, 0, -1) if any(s.startswith(self.held[-n:]) for s in self.stop))
            keep = next(ends, 0)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return out
