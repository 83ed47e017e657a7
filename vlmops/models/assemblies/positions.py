"""M-RoPE: the place in time, row and column of every token of a prompt with images.

Text counts on by one in all three. The tokens of an image start together where the text has come to, and go apart by their place
in it; text goes on behind its longer side. All is computed on the device: no place of an image token is read by the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmops.models.language.cache import sequence_of

__all__ = ["mrope_positions"]


def mrope_positions(
    is_image: Tensor, cu_seqlens: Tensor, grids: Sequence[tuple[int, int, int]], intervals: Sequence[float]
) -> Tensor:
    """int64 [3, T]: (time, row, column) of each token.

    Args:
        is_image: bool [T], True at the tokens of images and videos.
        cu_seqlens: int32 [n + 1], where each prompt starts.
        grids: tokens of each image or video in time, height and width, in the order of the prompt (host). An image's tokens stand
            together.
        intervals: positions from one frame to the next of each.

    Source: Qwen2-VL (Wang et al. 2024), sec. 2.1; with seconds in place of frames: Qwen2.5-VL (Bai et al. 2025).
    """
    device, tokens = is_image.device, is_image.shape[0]
    inside, advance = [torch.empty(3, 0, dtype=torch.int64)], [torch.empty(2, 0, dtype=torch.int64)]
    for i, (t, h, w) in enumerate(grids):
        frames = (torch.arange(t) * intervals[i]).long()
        axes = torch.meshgrid(frames, torch.arange(h), torch.arange(w), indexing="ij")
        inside.append(torch.stack([axis.flatten() for axis in axes]))
        step = torch.zeros(2, t * h * w, dtype=torch.int64)
        step[0, :1], step[1, 1:] = (
            max(h, w),
            max(h, w),
        )  # the first token moves all on; the others have been moved by it
        advance.append(step)
    offset, step = torch.cat(inside, 1).to(device), torch.cat(advance, 1).to(device)
    if offset.shape[1] == 0:
        offset, step = offset.new_zeros(3, 1), step.new_zeros(2, 1)
    number = (is_image.cumsum(0) - 1).clamp(0, offset.shape[1] - 1)  # which image token each one is
    moved = torch.where(is_image, step[0][number], 1)
    front = torch.cat([moved.new_zeros(1), moved.cumsum(0)])  # what the tokens in front have moved on, of all prompts
    base = front[:-1] - torch.where(is_image, step[1][number], 0)
    starts = front[cu_seqlens.long()][sequence_of(cu_seqlens, tokens)]
    return base - starts + torch.where(is_image, offset[:, number], 0)
