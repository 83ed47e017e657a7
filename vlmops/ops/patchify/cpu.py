"""One native pass from pixels to patch vectors (convert, normalise, round, reorder), then a packed oneDNN product."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.backends import native
from vlmops.ops._shared.gemm_cpu import gemm, why_not_gemm
from vlmops.ops.patchify.layout import repeat_position

native.define(
    "patch_rows(Tensor images, float[] mean, float[] std, int patch_size, int temporal_patch_size, bool merge, "
    "bool channels_last, ScalarType dtype) -> Tensor"
)


def supports(
    images: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, mean: list[float], std: list[float],
    patch_size: int, temporal_patch_size: int, order: str, channels_last: bool, inference: bool,
) -> str | None:  # fmt: skip
    """Why this backend cannot run these arguments; None if it can."""
    if not inference:
        return "a gradient is wanted (packed weights have none)"
    if images.numel() == 0:
        return "no pixels"
    if plain(images, mean, std):
        return why_not_gemm(weight.flatten(1), weight)
    if images.dim() == 2:
        return "flattened patches that are not normalised yet"
    if images.dtype not in (torch.uint8, torch.float32, torch.bfloat16, torch.float16):
        return f"{str(images.dtype)[6:]} pixels"
    return why_not_gemm(weight.flatten(1), weight) or (None if native.available() else native.reason())


def plain(images: Tensor, mean: list[float], std: list[float]) -> bool:
    """Patch vectors that go into the product as they are."""
    return images.dim() == 2 and images.dtype != torch.uint8 and not mean and not std


def forward(
    images: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, mean: list[float], std: list[float],
    patch_size: int, temporal_patch_size: int, order: str, channels_last: bool, inference: bool,
) -> Tensor:  # fmt: skip
    """tokens [T, E] in weight's dtype."""
    if plain(images, mean, std):
        rows = images.to(weight.dtype).contiguous()
    else:
        rows = torch.ops.vlmops_cpu.patch_rows(
            images, mean, std, patch_size, temporal_patch_size, order == "merge2x2", channels_last, weight.dtype
        )
    residual = None if position is None else repeat_position(position, rows.shape[0])
    return gemm(rows, weight, bias, "", residual)
