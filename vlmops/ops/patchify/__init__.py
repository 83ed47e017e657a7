"""Pixels to patch tokens: normalise, cut, project, add bias and position, as one op.

A convolution whose kernel is its stride is one matrix product; what is slow around it are the passes over the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op
from vlmops.ops.linear import check_part, no_grad_wanted

__all__ = ["convolve", "patchify"]


def _fake(
    images: Tensor, sizes: Any, weight: Tensor, bias: Any, position: Any, mean: Any, std: Any, patch: int, frames: int,
    order: str, channels_last: bool, tokens: int, inference: bool,
) -> Tensor:  # fmt: skip
    return weight.new_empty(tokens, weight.shape[0])


OP = Op(
    __name__,
    "(Tensor images, Tensor? sizes, Tensor weight, Tensor? bias, Tensor? position, float[] mean, float[] std, "
    "int patch_size, int temporal_patch_size, str order, bool channels_last, SymInt tokens, bool inference) -> Tensor",
    differentiable=["images", "weight", "bias", "position"],
    fake=_fake,
    autocast=["weight", "bias", "position"],
    tiny=lambda images, sizes, weight, *_: images.numel() * weight.shape[0] < 1 << 20,
    bucketed=["images"],
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
            Qwen's flattened [N, C * temporal_patch_size * P * P] with its ``grid_thw``, whose order is its own.
            uint8 (divided by 255) or floating point (taken as it is).
        weight: [E, C, P, P] (Conv2d), [E, C, temporal_patch_size, P, P] (Conv3d), or [E, K] flat.
        bias: [E] or None.
        patch_size: P, pixels on a side.
        temporal_patch_size: frames in a patch. A video whose length is no multiple repeats its last frame, an image
            itself, as Qwen2-VL's processor does.
        mean, std: per channel, on the scale of 0 to 1; None: 0 and 1.
        grid_thw: [n, 3] integers, for flattened images only.
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
    if patch_size < 1 or temporal_patch_size < 1:
        raise ValueError(
            f"patch_size: expected at least 1, got {patch_size} and temporal_patch_size {temporal_patch_size}"
        )
    if order not in ("raster", "merge2x2"):
        raise ValueError(f'order: expected "raster" or "merge2x2", got {order!r}')
    channels = _channels(weight, patch_size, temporal_patch_size, channels_last)
    unit = patch_size * (2 if order == "merge2x2" else 1)
    sizes, grid, groups = None, grid_thw, 0
    if not isinstance(images, Tensor):
        images, sizes, extents = _buffer(images, weight, channels, unit, crop)
    elif images.dim() == 2:
        extents = []
        order = "raster"
        _check_flattened(images, weight, grid_thw)
    else:
        images = _stack(images, weight, channels, unit, crop)
        n, t, _, h, w = images.shape
        extents = [(t, h, w)] * n
    if images.dim() != 2:
        if grid_thw is not None:
            raise ValueError(f"grid_thw: only for flattened images [N, K], got images {checks.describe(images)}")
        grids = [(-(-t // temporal_patch_size), h // patch_size, w // patch_size) for t, h, w in extents]
        counts = [t * h * w for t, h, w in grids]
        tokens = sum(counts)
        groups = len(counts) if len(set(counts)) == 1 else 0
        grid = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    else:
        tokens = images.shape[0]
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or floating point, got {checks.describe(images)}")
    checks.check_same_device("images", images, weight.device, "weight")
    cast = torch.is_autocast_enabled(weight.device.type)
    e = weight.shape[0]
    check_part("bias", bias, (e,), weight, cast)
    if position is not None:
        checks.check_tensor("position", position, dim=2, layout="[tokens, E]")
        check_part("position", position, position.shape, weight, cast)
        each = tokens // groups if groups else tokens
        if position.shape[1] != e or position.shape[0] not in (tokens, each):
            raise ValueError(f"position: expected [{each}, {e}] or [{tokens}, {e}], got {checks.describe(position)}")
    inference = no_grad_wanted(images, weight, bias, position)
    assert grid is not None
    result: Tensor = OP(
        images, sizes, weight, bias, position, _statistics("mean", mean, channels), _statistics("std", std, channels),
        patch_size, temporal_patch_size, order, channels_last, tokens, inference,
    )  # fmt: skip
    return result, grid


def convolve(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``patchify`` for the arguments of an ``nn.Conv2d`` or ``nn.Conv3d`` whose stride is its kernel, without a grid.

    Args:
        images: [n, C, H, W] or [n, C, T, H, W], every size a multiple of the kernel's.
        weight: [E, C, P, P] or [E, C, F, P, P].
        bias: [E] or None.

    Returns:
        [n * grid, E]: the convolution's output with the channels last.

    Raises:
        ValueError: sizes or devices that do not fit.
    """
    shape, kernel = images.shape, weight.shape  # plain loops below: a patched model comes through here
    cells, fits = 1, len(shape) == len(kernel) and shape[1] == kernel[1] and kernel[-1] == kernel[-2]
    for i in range(2, len(kernel)):
        fits = fits and shape[i] % kernel[i] == 0
        cells = cells * (shape[i] // kernel[i]) if fits else 0
    if not fits:
        raise ValueError(
            f"images: expected {kernel[1]} channels and multiples of {list(kernel[2:])}, got {checks.describe(images)}"
        )
    checks.check_same_device("images", images, weight.device, "weight")
    n, volume = shape[0], len(kernel) == 5
    if volume and cells == 1:
        images = images.reshape(n, -1)  # Qwen: every row is one patch already
    elif volume:
        images = images.transpose(1, 2)
    else:
        images = images.unsqueeze(1)
    result: Tensor = OP(
        images, None, weight, bias, None, [], [], kernel[-1], kernel[2] if volume else 1, "raster", False, n * cells,
        no_grad_wanted(images, weight, bias),
    )  # fmt: skip
    return result


def _channels(weight: Tensor, patch_size: int, frames: int, channels_last: bool) -> int:
    """C, from a weight of one of the three forms; ValueError if it is none."""
    checks.check_tensor("weight", weight, layout="[E, C, P, P], [E, C, temporal_patch_size, P, P] or [E, K]")
    checks.check_floating("weight", weight)
    if weight.dim() == 2:
        area = patch_size * patch_size * frames
        if weight.shape[1] % area or weight.shape[1] == 0:
            raise ValueError(
                f"weight: expected rows of C * {frames} * {patch_size} * {patch_size} elements, "
                f"got {checks.describe(weight)}"
            )
        return weight.shape[1] // area
    if channels_last:
        raise ValueError(f"weight: expected flat [E, K] with channels_last, got {checks.describe(weight)}")
    kernel = (frames, patch_size, patch_size) if weight.dim() == 5 or frames > 1 else (patch_size, patch_size)
    if weight.dim() != 2 + len(kernel) or tuple(weight.shape[2:]) != kernel or weight.shape[1] == 0:
        raise ValueError(f"weight: expected [E, C, {', '.join(map(str, kernel))}], got {checks.describe(weight)}")
    return weight.shape[1]


def _statistics(name: str, values: Sequence[float] | None, channels: int) -> list[float]:
    if values is None:
        return []
    found = [float(v) for v in values]
    if len(found) == 1:
        found *= channels
    if len(found) != channels or (name == "std" and not all(found)):
        raise ValueError(f"{name}: expected {channels} values{', none zero' if name == 'std' else ''}, got {found}")
    return found


def _check_flattened(images: Tensor, weight: Tensor, grid_thw: Tensor | None) -> None:
    k = math.prod(weight.shape[1:])
    if images.shape[1] != k:
        raise ValueError(f"images: expected [N, {k}] for weight {list(weight.shape)}, got {checks.describe(images)}")
    if grid_thw is None:
        raise ValueError("grid_thw: needed for flattened images [N, K]")
    checks.check_tensor("grid_thw", grid_thw, dim=2, layout="[n, 3]")
    checks.check_shape("grid_thw", grid_thw, (None, 3), "[n, 3]")
    if grid_thw.is_floating_point() or grid_thw.dtype == torch.bool:
        raise TypeError(f"grid_thw: expected integers [n, 3], got {checks.describe(grid_thw)}")
    if torch.compiler.is_compiling() or grid_thw.device.type != "cpu":
        return  # its values are on another device, or not known yet
    found = sum(t * h * w for t, h, w in grid_thw.tolist())
    if found != images.shape[0]:
        raise ValueError(f"grid_thw: expected {images.shape[0]} patches in all, got {found}")


def _fitted(name: str, images: Tensor, channels: int, unit: int, crop: bool) -> Tensor:
    """[..., C, H, W] with a height and width that can be cut; ValueError for a size that does not fit."""
    t, c, h, w = images.shape[-4:]
    if c != channels:
        raise ValueError(f"{name}: expected {channels} channels for this weight, got {checks.describe(images)}")
    if t == 0:
        raise ValueError(f"{name}: expected at least one frame, got {checks.describe(images)}")
    if h % unit == 0 and w % unit == 0:
        return images
    if not crop:
        raise ValueError(
            f"{name}: expected height and width to be multiples of {unit}, got {h}x{w} (crop=True cuts them)"
        )
    return images[..., : h - h % unit, : w - w % unit]


def _stack(images: Tensor, weight: Tensor, channels: int, unit: int, crop: bool) -> Tensor:
    """[n, T, C, H, W], a view."""
    if images.dim() not in (4, 5):
        raise ValueError(f"images: expected [n, C, H, W], [n, T, C, H, W] or [N, K], got {checks.describe(images)}")
    return _fitted("images", images if images.dim() == 5 else images.unsqueeze(1), channels, unit, crop)


def _buffer(
    images: Sequence[Tensor], weight: Tensor, channels: int, unit: int, crop: bool
) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """A list of mixed sizes as one [pixels] buffer, so that they share one pass and one product.

    Images whose memory runs (H, W, C), as decoders write them, are copied as they lie.

    Returns:
        [pixels]; int64 [n, 4]: T, H, W, and whether the memory runs (T, H, W, C); (T, H, W) of each.
    """
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"images: expected a tensor or a list of tensors, got {type(images).__name__}")
    parts, rows = [], []
    for i, image in enumerate(images):
        name = f"images[{i}]"
        checks.check_tensor(name, image, layout="[C, H, W] or [T, C, H, W]")
        if image.dim() not in (3, 4):
            raise ValueError(f"{name}: expected [C, H, W] or [T, C, H, W], got {checks.describe(image)}")
        checks.check_dtype(name, image, images[0].dtype, "images[0]")
        checks.check_same_device(name, image, weight.device, "weight")
        image = _fitted(name, image if image.dim() == 4 else image.unsqueeze(0), channels, unit, crop)
        turned = image.permute(0, 2, 3, 1)
        interleaved = turned.is_contiguous() and not image.is_contiguous()
        parts.append((turned if interleaved else image).reshape(-1))
        rows.append((image.shape[0], image.shape[2], image.shape[3], int(interleaved)))
    if len(parts) == 1:
        buffer = parts[0]
    else:
        buffer = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=weight.device)
    return buffer, torch.tensor(rows, dtype=torch.int64).view(-1, 4), [(t, h, w) for t, h, w, _ in rows]
