"""RoPE as a pass over q and k in front of an attention: what the GPU backends share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Rotate", "rotated"]

#: ``rotate_heads`` of a backend of ``rotary``: (q, k or None, cos, sin, interleaved, inverse) -> the same, turned.
Rotate = Callable[[Tensor, Tensor | None, Tensor, Tensor, bool, bool], tuple[Tensor, Tensor]]


def rotated(
    rotate_heads: Rotate, q: Tensor, k: Tensor, cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None,
    sin_k: Tensor | None, interleaved: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k turned by their tables (back with ``inverse``), in one pass where they share them; as they are without tables."""
    if cos_q is None or sin_q is None or cos_k is None or sin_k is None:
        return q, k
    if cos_q is cos_k and sin_q is sin_k:
        return rotate_heads(q, k, cos_q, sin_q, interleaved, inverse)
    return (
        rotate_heads(q, None, cos_q, sin_q, interleaved, inverse)[0],
        rotate_heads(k, None, cos_k, sin_k, interleaved, inverse)[0],
    )
