"""Pixels to patch tokens: normalise, cut, project, add bias and position, as one op.

A convolution whose kernel is its stride is one matrix product; what is slow around it are the passes over the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op
from vlmops.ops.linear import check_part, no_grad_wanted

__all__ = ["patchify"]


def _fake(
    images: Tensor, weight: Tensor, bias: Any, position: Any, mean: Any, std: Any, patch: int, frames: int, *args: Any
) -> Tensor:
    if images.dim() == 2:
        return weight.new_empty(images.shape[0], weight.shape[0])
    n, t, _, h, w = images.shape
    return weight.new_empty(n * -(-t // frames) * (h // patch) * (w // patch), weight.shape[0])


OP = Op(
    __name__,
    "(Tensor images, Tensor weight, Tensor? bias, Tensor? position, float[] mean, float[] std, int patch_size, "
    "int temporal_patch_size, str order, bool channels_last, bool inference) -> Tensor",
    differentiable=["images", "weight", "bias", "position"],
    fake=_fake,
    autocast=["weight", "bias", "position"],
    tiny=lambda images, weight, *_: images.numel() * weight.shape[0] < 1 << 20,
)


def patchify(
    images: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: int,
    temporal_patch_size: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    grid_thw: Tensor | None = None,
    position: Tensor | None = None,
    order: str = "raster",
    channels_last: bool = False,
    crop: bool = False,
) -> tuple[Tensor, Tensor]:
    """Patch tokens of images: ((pixels / 255 - mean) / std cut into patches) W^T + bias + position.

    Args:
        images: [n, C, H, W]; [n, T, C, H, W] frames of videos; a list of [C, H, W] or [T, C, H, W] of mixed sizes; or
            Qwen's flattened [N, C * temporal_patch_size * P * P] with its ``grid_thw``. uint8 (divided by 255) or
            floating point (taken as it is).
        weight: [E, C, P, P] (Conv2d), [E, C, temporal_patch_size, P, P] (Conv3d), or [E, K] flat.
        bias: [E] or None.
        patch_size: P, pixels on a side.
        temporal_patch_size: frames in a patch. A video whose length is no multiple repeats its last frame; so does an image.
        mean, std: per channel, on the scale of 0 to 1; None: 0 and 1.
        grid_thw: [n, 3], for flattened images only.
        position: [tokens of one image, E], the same for all images, or [all tokens, E]. Added last.
        order: "raster", or "merge2x2": the four patches of a 2x2 block are consecutive (Qwen2-VL).
        channels_last: a patch vector runs (frame, row, column, channel) instead of (channel, frame, row, column)
            (Fuyu, SigLIP 2 naflex); the weight must be flat then.
        crop: cut sizes that are no multiple of the patch at the right and bottom instead of refusing them.

    Returns:
        tokens [T, E] in the weight's dtype, all images behind each other; grid_thw int64 [n, 3] on the CPU (the
        caller's own tensor for flattened images): patches in time, height and width.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or a size that does not fit.

    Source: ViT (Dosovitskiy et al., 2021); 2x2 order and temporal patches as in Qwen2-VL (Wang et al., 2024).
    """
    checks.check_tensor("weight", weight, layout="[E, C, P, P]")
    checks.check_floating("weight", weight)
    if patch_size < 1 or temporal_patch_size < 1:
        raise ValueError(
            f"patch_size: expected at least 1, got {patch_size} and temporal_patch_size {temporal_patch_size}"
        )
    if order not in ("raster", "merge2x2"):
        raise ValueError(f'order: expected "raster" or "merge2x2", got {order!r}')
    if channels_last and weight.dim() != 2:
        raise ValueError(f"weight: expected flat [E, K] with channels_last, got {checks.describe(weight)}")
    options: dict[str, Any] = dict(
        bias=bias, patch_size=patch_size, temporal_patch_size=temporal_patch_size, mean=mean, std=std, order=order,
        channels_last=channels_last, crop=crop,
    )  # fmt: skip
    if isinstance(images, Tensor):
        if images.dim() == 2:
            return _flattened(images, weight, grid_thw, position, **options)
        if grid_thw is not None:
            raise ValueError(f"grid_thw: only for flattened images [N, K], got images {checks.describe(images)}")
        if images.dim() not in (4, 5):
            raise ValueError(f"images: expected [n, C, H, W], [n, T, C, H, W] or [N, K], got {checks.describe(images)}")
        return _stack(images if images.dim() == 5 else images[:, None], weight, position, **options)
    return _mixed(images, weight, position, **options)


def _channels(k: int, patch_size: int, temporal_patch_size: int) -> int:
    """C from the length of a patch vector; ValueError if it does not divide."""
    area = patch_size * patch_size * temporal_patch_size
    if k % area:
        raise ValueError(
            f"weight: expected rows of C * {temporal_patch_size} * {patch_size} * {patch_size} elements, got {k}"
        )
    return k // area


def _statistics(name: str, values: Sequence[float] | None, channels: int) -> list[float]:
    if values is None:
        return []
    found = [float(v) for v in values]
    if len(found) == 1:
        found *= channels
    if len(found) != channels or (name == "std" and not all(found)):
        raise ValueError(f"{name}: expected {channels} values{', none zero' if name == 'std' else ''}, got {found}")
    return found


def _run(
    images: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, mean: Sequence[float] | None,
    std: Sequence[float] | None, patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
) -> Tensor:  # fmt: skip
    """The op on one canonical tensor, its remaining arguments checked."""
    e, k = weight.shape[0], 1
    for size in weight.shape[1:]:
        k *= size
    c = _channels(k, patch_size, temporal_patch_size)
    if images.dim() == 5 and images.shape[2] != c:
        raise ValueError(
            f"images: expected {c} channels for weight {list(weight.shape)}, got {checks.describe(images)}"
        )
    if images.dim() == 2 and images.shape[1] != k:
        raise ValueError(f"images: expected [N, {k}] for weight {list(weight.shape)}, got {checks.describe(images)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or floating point, got {checks.describe(images)}")
    checks.check_same_device("images", images, weight.device, "weight")
    cast = torch.is_autocast_enabled(weight.device.type)
    check_part("bias", bias, (e,), weight, cast)
    if position is not None:
        check_part("position", position, position.shape, weight, cast)
        tokens = _fake(images, weight, None, None, None, None, patch_size, temporal_patch_size).shape[0]
        groups = images.shape[0] if images.dim() == 5 else 1
        per_image = tokens // groups if groups else 0
        if position.dim() != 2 or position.shape[1] != e or position.shape[0] not in (tokens, per_image):
            raise ValueError(
                f"position: expected [{per_image}, {e}] or [{tokens}, {e}], got {checks.describe(position)}"
            )
    inference = no_grad_wanted(images, weight, bias, position)
    return OP(
        images, weight, bias, position, _statistics("mean", mean, c), _statistics("std", std, c), patch_size,
        temporal_patch_size, order, channels_last, inference,
    )  # fmt: skip


def _flattened(
    images: Tensor,
    weight: Tensor,
    grid_thw: Tensor | None,
    position: Tensor | None,
    *,
    crop: bool,
    order: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    if grid_thw is None:
        raise ValueError("grid_thw: needed for flattened images [N, K]")
    checks.check_tensor("grid_thw", grid_thw, dim=2, layout="[n, 3]")
    checks.check_shape("grid_thw", grid_thw, (None, 3), "[n, 3]")
    if (
        not torch.compiler.is_compiling()
        and grid_thw.device.type == "cpu"
        and int(grid_thw.prod(1).sum()) != images.shape[0]
    ):
        raise ValueError(f"grid_thw: expected {images.shape[0]} patches in all, got {int(grid_thw.prod(1).sum())}")
    return _run(images, weight, position=position, order="raster", **options), grid_thw


def _fit(h: int, w: int, patch: int, order: str, crop: bool) -> tuple[int, int]:
    """Height and width that are cut into patches; ValueError for a size that does not fit."""
    unit = patch * (2 if order == "merge2x2" else 1)
    if (h % unit or w % unit) and not crop:
        raise ValueError(
            f"images: expected height and width to be multiples of {unit}, got {h}x{w} (crop=True cuts them)"
        )
    return h - h % unit, w - w % unit


def _stack(
    images: Tensor, weight: Tensor, position: Tensor | None, *, crop: bool, order: str, patch_size: int, temporal_patch_size: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, t, _, h, w = images.shape
    if t == 0:
        raise ValueError(f"images: expected at least one frame, got {checks.describe(images)}")
    height, width = _fit(h, w, patch_size, order, crop)
    if (height, width) != (h, w):
        images = images[..., :height, :width]
    sizes = dict(patch_size=patch_size, temporal_patch_size=temporal_patch_size)
    tokens = _run(images, weight, position=position, order=order, **sizes, **options)
    grid = torch.tensor([[-(-t // temporal_patch_size), height // patch_size, width // patch_size]]).expand(n, 3)
    return tokens, grid.contiguous()


def _mixed(images: Sequence[Tensor], weight: Tensor, position: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """A list of mixed sizes: each is cut and projected into its own rows of the result."""
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"images: expected a tensor or a list of tensors, got {type(images).__name__}")
    parts, grids, begin = [], [], 0
    for i, image in enumerate(images):
        checks.check_tensor(f"images[{i}]", image, layout="[C, H, W] or [T, C, H, W]")
        if image.dim() not in (3, 4):
            raise ValueError(f"images[{i}]: expected [C, H, W] or [T, C, H, W], got {checks.describe(image)}")
        tokens, grid = _stack(image[None, None] if image.dim() == 3 else image[None], weight, None, **options)
        parts.append(tokens)
        grids.append(grid)
        begin += tokens.shape[0]
    if not parts:
        return weight.new_empty(0, weight.shape[0]), torch.empty(0, 3, dtype=torch.int64)
    tokens = torch.cat(parts)
    if position is not None:
        check_part("position", position, (begin, weight.shape[0]), weight, False)
        tokens = tokens + position
    return tokens, torch.cat(grids)
