"""What is known of a batch before any token exists: where sequences start, their order, their angles.

Nothing of it depends on pixels, so it is made once a set of grids and kept: the second call with the same sizes copies nothing
to a GPU and can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vlmops.models.config import VisionConfig
from vlmops.models.vision.positions import rotary_tables
from vlmops.models.vision.windows import window_order

__all__ = ["Plan", "plan"]

Grids = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Plan:
    """Index tensors of a batch, on the device of the tokens.

    Args:
        grids: patches of each image in time, height and width.
        grid_thw: the same as a tensor, int64 [images, 3], on the CPU.
        lengths: tokens of each image, those in front of its patches included.
        cu_images: int32 [images + 1]: where each image starts.
        cu_patches: int32 [images + 1]: the same with patches only.
        cu_frames: int32 [frames + 1]: where each sequence of full attention starts (a frame of a video is its own).
        longest_frame: tokens.
        cu_windows: int32 [windows + 1], or None without windows.
        longest_window: tokens.
        order: int64 [T]: tokens[order] stand window by window; None: they stay.
        back: int64 [T]: undoes it.
        rope: (cos, sin), each float32 [T, head_dim], in window order; or None.
    """

    grids: Grids
    grid_thw: Tensor
    lengths: tuple[int, ...]
    cu_images: Tensor
    cu_patches: Tensor
    cu_frames: Tensor
    longest_frame: int
    cu_windows: Tensor | None
    longest_window: int
    order: Tensor | None
    back: Tensor | None
    rope: tuple[Tensor, Tensor] | None


def plan(config: VisionConfig, grids: Grids, device: torch.device) -> Plan:
    """The plan of a batch.

    Args:
        config: of the tower.
        grids: patches in time, height and width of each image.
        device: of the tokens.
    """
    if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:  # tracing: a fake tensor must not be kept
        return _plan(config, grids, device)
    return _kept(config, grids, device)


@lru_cache(maxsize=8)
def _kept(config: VisionConfig, grids: Grids, device: torch.device) -> Plan:
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used in training later
        return _plan(config, grids, device)


def _plan(config: VisionConfig, grids: Grids, device: torch.device) -> Plan:
    front = int(config.class_token) + config.registers
    if front and any(t > 1 for t, _, _ in grids):
        raise ValueError(f"images: a tower with a class token takes frames as images of their own, got grids {grids}")
    lengths = tuple(t * h * w + front for t, h, w in grids)
    frames = [h * w + front for t, h, w in grids for _ in range(t)]
    rope = rotary_tables(config, grids) if "rope" in config.position else None
    if rope is not None and front:
        rope = _unturned(rope[0], lengths, front, 1.0), _unturned(rope[1], lengths, front, 0.0)
    order: Tensor | None = None
    windows: list[int] = []
    if config.window is not None:
        order, windows = window_order(grids, config.window // config.patch_size, config.merge_size)
        rope = None if rope is None else (rope[0][order], rope[1][order])
    return Plan(
        grids=grids,
        grid_thw=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        lengths=lengths,
        cu_images=_starts(lengths, device),
        cu_patches=_starts([n - front for n in lengths], device),
        cu_frames=_starts(frames, device),
        longest_frame=max(frames, default=0),
        cu_windows=None if order is None else _starts(windows, device),
        longest_window=max(windows, default=0),
        order=None if order is None else order.to(device),
        back=None if order is None else order.argsort().to(device),
        rope=None if rope is None else (rope[0].to(device), rope[1].to(device)),
    )


def _starts(lengths: tuple[int, ...] | list[int], device: torch.device) -> Tensor:
    """cu_seqlens."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(torch.int32).to(device)


def _unturned(table: Tensor, lengths: tuple[int, ...], front: int, value: float) -> Tensor:
    """Rows in front of each image's, for its class token and registers, that rotate nothing."""
    rows = table.new_full((front, table.shape[1]), value)
    parts = table.split([n - front for n in lengths])
    return torch.cat([x for part in parts for x in (rows, part)]) if parts else table
