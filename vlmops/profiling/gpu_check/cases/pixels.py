"""Cases of patchify: every layout a picture comes in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmops.ops import patchify
from vlmops.profiling.gpu_check.cases.case import Arguments, Case, Values

__all__ = ["cases"]

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def tokens(call: Any = patchify) -> Any:
    """The op without its second result, the grid, which is the caller's own for flattened images."""
    return lambda *args, **kwargs: call(*args, **kwargs)[0]


def _picture(v: Values, *shape: int, raw: bool) -> Tensor:
    return v.integers(256, *shape, dtype=torch.uint8) if raw else v.random(*shape)


def _pictures(
    v: Values, kind: str = "image", patch: tuple[int, int] = (4, 14), frames: int = 1, raw: bool = False, cells: int = 2,
    channels: tuple[int, int] = (20, 1030), bias: bool = True, position: str = "", flat: bool = False,
    statistics: bool = False, grad: bool = True, **options: Any,
) -> Arguments:  # fmt: skip
    """``cells``: patches on a side of the tiny picture; eight times as many on a GPU."""
    p, out = v.size(*patch), v.size(*channels)
    side = cells * p * v.size(1, 8)
    images: Any
    if kind == "image":
        images, count = _picture(v, 2, 3, side, side + 2 * p, raw=raw), (side // p) * (side // p + 2)
    elif kind == "video":  # an odd number of frames: the last one is repeated
        images, count = _picture(v, 1, 2 * frames - 1, 3, side, side, raw=raw), 2 * (side // p) ** 2
    elif kind == "mixed":
        images = [_picture(v, 3, side, side, raw=raw), _picture(v, 3, 2 * p, side + 2 * p, raw=raw)]
        count = (side // p) ** 2 + 2 * (side // p + 2)
    elif kind == "cropped":
        images, count = _picture(v, 1, 3, side + 1, side + p - 1, raw=raw), (side // p) ** 2
    else:  # Qwen's rows, with their grid
        count = (side // p) ** 2
        images = _picture(v, count, 3 * frames * p * p, raw=raw)
        options["grid_thw"] = torch.tensor([[1, side // p, side // p]])
    kernel = (3, frames, p, p) if frames > 1 else (3, p, p)
    weight = v.weight(out, *kernel, grad=False)
    weight = (weight.flatten(1) if flat else weight).requires_grad_(grad)
    if position:
        options["position"] = v.random(count * (2 if position == "all" else 1), out, grad=grad)
    if statistics:
        options.update(mean=MEAN, std=STD)
    if not grad:
        images = images.detach()
    args = (images, weight, v.random(out, grad=grad) if bias else None)
    return args, {"patch_size": p, "temporal_patch_size": frames, **options}


def _case(label: str, core: bool = False, **options: Any) -> Case:
    return Case("patchify", label, tokens(), partial(_pictures, **options), core)


def cases() -> Iterator[Case]:
    """patchify."""
    yield _case("float images", core=True)
    yield _case("bytes, normalised", core=True, raw=True, statistics=True)
    yield _case("floats, normalised", statistics=True)
    yield _case("no gradient", raw=True, statistics=True, grad=False)
    yield _case("no bias", bias=False)
    yield _case("one position an image", position="each")
    yield _case("a position a token", position="all")
    yield _case("2x2 order", order="merge2x2")
    yield _case("channels last", channels_last=True, flat=True)
    yield _case("bytes, channels last, normalised", channels_last=True, flat=True, raw=True, statistics=True)
    yield _case("odd number of frames", kind="video", frames=2)
    yield _case(
        "bytes, odd number of frames, 2x2 order", kind="video", frames=2, raw=True, statistics=True, order="merge2x2"
    )
    yield _case("mixed sizes", kind="mixed", core=True)
    yield _case("bytes, mixed sizes, 2x2 order", kind="mixed", raw=True, statistics=True, order="merge2x2")
    yield _case("Qwen's rows", kind="rows", frames=2, core=True)
    yield _case("Qwen's rows, bytes, normalised", kind="rows", frames=2, raw=True, statistics=True)
    yield _case("cropped", kind="cropped", crop=True)
    yield _case("16-pixel patches", patch=(2, 16), channels=(16, 1024), raw=True, statistics=True)
