"""Images to patches: decode, resize, cut, count. Pixels stay bytes until ``patchify`` normalises them inside its product.

    prepared = vlmops.images.prepare(["a.jpg", "b.png"], mode="anyres")
    prepared.tokens            # places each image takes in the prompt
    tokens = prepared.patchify(tower.weight)

Decoding and resampling are Pillow's, so pixel values equal those of transformers' PIL processors; images are worked on in
threads.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmops.backends.ranges import stage
from vlmops.images.decode import MAX_PIXELS, ImageError, ImageInput, decode
from vlmops.images.layout import Layout, View, render
from vlmops.images.modes import MODES
from vlmops.images.prepared import Prepared

__all__ = ["ImageError", "ImageInput", "Layout", "Prepared", "View", "decode", "layout", "prepare"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESAMPLE = {name: getattr(Image.Resampling, name.upper()) for name in ("nearest", "bilinear", "bicubic", "lanczos")}


def layout(height: int, width: int, mode: str = "fixed", **options: Any) -> Layout:
    """How an image of this size is resized, cut and counted, without touching pixels.

    Args:
        height, width: of the image.
        mode, options: as for ``prepare``.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    known = [n for n in inspect.signature(MODES[mode]).parameters if n not in ("height", "width")]
    for name in options:
        if name not in known:
            raise TypeError(f"{name}: no option of mode {mode!r}, whose options are {', '.join(known)}")
    found: Layout = MODES[mode](height, width, **options)
    return found


def prepare(
    images: ImageInput | Iterable[ImageInput],
    mode: str = "fixed",
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    fill: tuple[int, int, int] | None = None,
    resample: str = "bicubic",
    temporal_patch_size: int | None = None,
    background: tuple[int, int, int] | None = None,
    max_pixels_decoded: int | None = MAX_PIXELS,
    threads: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Prepared:
    """Images of any kind and size as packed tiles with their grids and token counts.

    Args:
        images: one image or many: paths, bytes, Pillow images, arrays, tensors (``decode``).
        mode: "fixed", "tile512", "anyres", "native" or "bounded" (vlmops/images/modes.py has each one's options).
        mean, std: per channel on the scale of 0 to 1; kept for ``patchify``.
        fill: colour of padding. None: black, or the mean where ``policy="pad"`` asks for a square, as their processors have it.
        resample: "nearest", "bilinear", "bicubic" or "lanczos".
        temporal_patch_size: frames of a patch. None: 2 for mode "native" in Qwen2-VL's style, else 1.
        background: colour behind transparent pixels; None: transparency is dropped.
        max_pixels_decoded: refuse to decode larger images; None: no limit.
        threads: images worked on at a time. None: the processors there are.
        progress: a bar on stderr.
        options: of the mode, e.g. ``size=384``, ``detail="low"``, ``style="pixtral"``.

    Returns:
        ``Prepared``. An image is decoded, cut and let go before its thread takes the next: memory is that of the result and of
        ``threads`` decoded images.

    Raises:
        ImageError: an image that cannot be read or does not fit the mode; it says which.
        TypeError, ValueError: an option the mode does not have.
    """
    if isinstance(images, (str, os.PathLike, bytes, bytearray, Image.Image)) or hasattr(images, "shape"):
        images = [images]  # type: ignore[list-item]
    todo = list(images)  # type: ignore[arg-type]
    if resample not in RESAMPLE:
        raise ValueError(f"resample: expected one of {', '.join(RESAMPLE)}, got {resample!r}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: expected three numbers, got {list(values)}")
    if fill is None:
        mean_colour = options.get("policy") == "pad"
        fill = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)) if mean_colour else (0, 0, 0)
    layout(1000, 1000, mode, **options)  # an unknown option is said before any image is read
    colour = fill

    def work(item: tuple[int, ImageInput]) -> tuple[list[Tensor], Layout, tuple[int, int]]:
        number, image = item
        try:
            decoded = decode(image, background=background, max_pixels=max_pixels_decoded)
            plan = layout(decoded.height, decoded.width, mode, **options)
            tiles = [t for view in plan.views for t in render(decoded, view, colour, RESAMPLE[resample])]
        except ImageError as err:
            raise ImageError(f"image {number}: {err}") from err
        return tiles, plan, (decoded.height, decoded.width)

    with stage("preprocess"):
        found = _in_threads(work, todo, threads, progress)
    if temporal_patch_size is None:
        temporal_patch_size = 2 if mode == "native" and options.get("style", "qwen2_vl") == "qwen2_vl" else 1
    return _pack(found, mean, std, temporal_patch_size)


def _in_threads(work: Any, todo: list[Any], threads: int | None, progress: bool) -> list[Any]:
    """``work`` of (number, item) for each, in order. Pillow lets other threads run while it decodes and resizes."""
    from rich.progress import track

    workers = max(1, min(len(todo), threads or len(os.sched_getaffinity(0))))
    if workers == 1:
        results: Iterable[Any] = map(work, enumerate(todo))
        return list(track(results, "images", len(todo)) if progress else results)
    with concurrent.futures.ThreadPoolExecutor(workers, "vlmops-images") as pool:
        futures = [pool.submit(work, item) for item in enumerate(todo)]
        try:
            return [f.result() for f in (track(futures, "images") if progress else futures)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pack(found: list[Any], mean: Sequence[float], std: Sequence[float], temporal: int) -> Prepared:
    tiles = [tile for parts, _, _ in found for tile in parts]
    layouts = tuple(plan for _, plan, _ in found)
    grids = [
        (1, t.shape[1] // plan.patch_size, t.shape[2] // plan.patch_size) for parts, plan, _ in found for t in parts
    ]
    pixels: Tensor | list[Tensor] = tiles
    if len({t.shape for t in tiles}) == 1:
        pixels = torch.stack(tiles)

    def integers(values: list[Any], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).view(*shape)

    return Prepared(
        pixels, integers(grids, -1, 3), integers([len(parts) for parts, _, _ in found], -1),
        integers([size for _, _, size in found], -1, 2), integers([plan.tokens for plan in layouts], -1), layouts,
        (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), temporal,
    )  # fmt: skip
