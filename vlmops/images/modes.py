"""The image modes of the field: (height, width) of an image -> how it is resized, cut, and counted. Plain arithmetic.

| mode | who | rule |
|---|---|---|
| fixed | ViT, CLIP, SigLIP, LLaVA-1.5, PaliGemma | one square, whatever the image |
| tile512 | GPT-4V | 512-pixel tiles, 85 + 170 tokens a tile |
| anyres | LLaVA-NeXT | the best of a few grids of squares, and an overview |
| native | Qwen2-VL, Pixtral, Fuyu | the image's own size, to the nearest patch |
| bounded | Claude 3 | its own size within a long edge and a budget of tokens, in tiles |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vlmops.images.decode import ImageError
from vlmops.images.layout import Layout, View, contain

__all__ = ["MODES", "anyres", "bounded", "fixed", "native", "smart_resize", "tile512"]

#: LLaVA-NeXT's grids of 336-pixel squares, as (height, width).
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def fixed(height: int, width: int, *, size: int = 336, patch_size: int = 14, policy: str = "resize") -> Layout:
    """One square of ``size`` pixels.

    Args:
        height, width: of the image.
        size: pixels on a side (224, 336, 384).
        patch_size: of the encoder; tokens are whole patches.
        policy: "resize" distorts (SigLIP, PaliGemma); "crop" resizes the short side and takes the centre (CLIP, LLaVA's
            processor); "pad" makes it square by the fill colour first (LLaVA-1.5).

    Source: CLIP (Radford et al. 2021), LLaVA-1.5 (Liu et al. 2023).
    """
    tokens = (size // patch_size) ** 2
    if policy == "resize":
        view = View((size, size))
    elif policy == "pad":
        view = View((size, size), square=True)
    elif policy == "crop":
        short, long = min(height, width), max(height, width)
        scaled = int(size * long / short)
        resized = (size, scaled) if height == short else (scaled, size)
        view = View(resized, canvas=(size, size), offset=(-((resized[0] - size) // 2), -((resized[1] - size) // 2)))
    else:
        raise ValueError(f'policy: expected "resize", "crop" or "pad", got {policy!r}')
    return Layout((view,), tokens, patch_size)


def tile512(
    height: int, width: int, *, detail: str = "high", tile: int = 512, box: int = 2048, short_side: int = 768,
    base_tokens: int = 85, tile_tokens: int = 170, patch_size: int = 16,
) -> Layout:  # fmt: skip
    """512-pixel tiles with an overview, counted as OpenAI documents for GPT-4V.

    Args:
        height, width: of the image.
        detail: "low": the overview only, 85 tokens. "high": fitted into 2048 x 2048, the short side brought down to
            768, then cut.
        tile, box, short_side, base_tokens, tile_tokens: those numbers.
        patch_size: of the encoder the tiles go to; what GPT-4V's is, is not known.

    An image is never enlarged. Source: OpenAI's guide to vision (2023): 1024 x 1024 is 765 tokens, 2048 x 4096 is 1105.
    """
    overview = View(contain(height, width, (tile, tile)), canvas=(tile, tile))
    if detail == "low":
        return Layout((overview,), base_tokens, patch_size)
    if detail != "high":
        raise ValueError(f'detail: expected "low" or "high", got {detail!r}')
    scale = min(1.0, box / max(height, width))
    scale *= min(1.0, short_side / (min(height, width) * scale))
    resized = (max(1, round(height * scale)), max(1, round(width * scale)))
    rows, columns = -(-resized[0] // tile), -(-resized[1] // tile)
    tiles = View(resized, canvas=(rows * tile, columns * tile), tile=(tile, tile))
    return Layout(
        (overview, tiles), base_tokens + tile_tokens * rows * columns, patch_size, facts={"grid": (rows, columns)}
    )


def anyres(
    height: int, width: int, *, size: int = 336, patch_size: int = 14, pinpoints: Sequence[tuple[int, int]] = PINPOINTS,
    newline: bool = True, max_tiles: int = 6,
) -> Layout:  # fmt: skip
    """An overview and the grid of squares that wastes the least: LLaVA-NeXT's AnyRes.

    Args:
        height, width: of the image.
        size: pixels of a square.
        patch_size: of the encoder.
        pinpoints: the canvases, (height, width), multiples of ``size``.
        newline: whether each row of tokens of the grid ends with a newline token.
        max_tiles: refuse a canvas of more squares.

    The tokens of the padding are dropped again ("unpadding"): ``facts["unpadded"]`` is (top, left, rows, columns) of what is
    kept of the grid's tokens. Source: LLaVA-NeXT (Liu et al. 2024).
    """
    for h, w in pinpoints:
        if h % size or w % size or (h // size) * (w // size) > max_tiles:
            raise ValueError(f"pinpoints: expected multiples of {size} with at most {max_tiles} squares, got {(h, w)}")
    canvas = _best_canvas(height, width, pinpoints)
    resized = contain(height, width, canvas)
    offset = ((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2)
    side = size // patch_size
    grid = (canvas[0] // size, canvas[1] // size)
    top, left, rows, columns = unpadded(height, width, grid[0] * side, grid[1] * side)
    tokens = side * side + rows * (columns + (1 if newline else 0))
    views = (View((size, size)), View(resized, canvas=canvas, offset=offset, tile=(size, size)))
    return Layout(views, tokens, patch_size, facts={"grid": grid, "unpadded": (top, left, rows, columns)})


def _best_canvas(height: int, width: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas that keeps most of the image's pixels, and of those the one with the least padding."""

    def worth(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(pinpoints, key=worth)  # the first of equals


def unpadded(height: int, width: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a grid of tokens without those that only see padding."""
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        top = (rows - kept) // 2
        return top, 0, rows - 2 * top, columns
    kept = int(round(width * (rows / height), 7))
    left = (columns - kept) // 2
    return 0, left, rows, columns - 2 * left


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int | None) -> tuple[int, int]:
    """The size nearest to the image's own whose sides are multiples of ``factor`` and whose area is within bounds.

    Raises:
        ImageError: an aspect ratio beyond 200.

    Source: Qwen2-VL (Wang et al. 2024).
    """
    if max(height, width) > 200 * min(height, width):
        raise ImageError(f"an image of {height} x {width} pixels has an aspect ratio beyond 200")
    rows, columns = round(height / factor), round(width / factor)
    if max_pixels is not None and rows * columns * factor * factor > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor * factor < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def native(
    height: int, width: int, *, style: str = "qwen2_vl", patch_size: int | None = None, merge_size: int | None = None,
    min_pixels: int = 56 * 56, max_pixels: int | None = None, long_edge: int = 1024, box: tuple[int, int] = (1080, 1920),
) -> Layout:  # fmt: skip
    """The image's own resolution, rounded to patches.

    Args:
        height, width: of the image.
        style: "qwen2_vl": nearest multiple of patch and merge, between ``min_pixels`` and ``max_pixels`` (None: no upper
            limit, as the model allows; its processor's default is 28 * 28 * 1280). "pixtral": shrunk to ``long_edge``, rounded up
            to patches, and a break token behind every row. "fuyu": shrunk to fit into ``box``, padded at the right and bottom to
            whole patches, and a newline token behind every row.
        patch_size: None: 14 for Qwen2-VL, 16 for Pixtral, 30 for Fuyu.
        merge_size: patches on a side that become one token; None: 2 for Qwen2-VL, else 1.
        min_pixels, max_pixels: of the resized image.
        long_edge: for "pixtral".
        box: (height, width), for "fuyu".

    Source: Qwen2-VL (Wang et al. 2024); Pixtral (Agrawal et al. 2024); Fuyu (Bavishi et al. 2023).
    """
    if style == "qwen2_vl":
        patch, merge = patch_size or 14, merge_size or 2
        size = smart_resize(height, width, patch * merge, min_pixels, max_pixels)
        rows, columns = (side // (patch * merge) for side in size)
        return Layout((View(size),), rows * columns, patch, merge, {"rows": rows, "columns": columns})
    if style == "pixtral":
        patch, merge = patch_size or 16, merge_size or 1
        ratio = max(height, width) / long_edge
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        if not (height and width):
            raise ImageError("the image is so narrow that nothing is left of it at this long edge")
        unit = patch * merge
        rows, columns = -(-height // unit), -(-width // unit)
        facts: dict[str, object] = {"rows": rows, "columns": columns}
        return Layout((View((rows * unit, columns * unit)),), rows * (columns + 1), patch, merge, facts)
    if style == "fuyu":
        patch, merge = patch_size or 30, merge_size or 1
        scale = min(box[0] / height, box[1] / width)
        if scale < 1:
            height, width = int(height * scale), int(width * scale)
        if not (height and width):
            raise ImageError("the image is so narrow that nothing is left of it in this box")
        unit = patch * merge
        rows, columns = -(-height // unit), -(-width // unit)
        view = View((height, width), canvas=(rows * unit, columns * unit))
        return Layout((view,), rows * (columns + 1), patch, merge, {"rows": rows, "columns": columns})
    raise ValueError(f'style: expected "qwen2_vl", "pixtral" or "fuyu", got {style!r}')


def bounded(
    height: int, width: int, *, max_side: int = 8192, long_edge: int = 1568, max_tokens: int = 1600, unit: int = 28,
    tile: int = 448, patch_size: int = 14,
) -> Layout:  # fmt: skip
    """Its own size within bounds, cut into tiles: Claude 3's limits.

    Args:
        height, width: of the image.
        max_side: larger images are refused.
        long_edge, max_tokens: an image beyond either is scaled down to both.
        unit: pixels on a side of a token (28 x 28 is about the documented 750 pixels a token).
        tile: pixels on a side of a tile, a multiple of ``unit``; the last tiles of a row or column are smaller, without padding.
        patch_size: of the encoder, ``unit`` or half of it.

    Source: Anthropic's guide to vision (2024): at most 8192 x 8192 pixels, 1568 on the long edge, about 1600 tokens.
    """
    if max(height, width) > max_side:
        raise ImageError(f"an image of {height} x {width} pixels is larger than {max_side} x {max_side}")
    if tile % unit:
        raise ValueError(f"tile: expected a multiple of {unit}, got {tile}")
    scale = min(1.0, long_edge / max(height, width), math.sqrt(max_tokens * unit * unit / (height * width)))
    rows, columns = (max(1, math.floor(side * scale / unit + 1e-9)) for side in (height, width))
    if rows * columns > max_tokens:  # a side of less than a unit was rounded up to one
        rows, columns = min(rows, max_tokens), min(columns, max_tokens)
    size = (rows * unit, columns * unit)
    view = View(size, canvas=size, tile=(min(tile, size[0]), min(tile, size[1])))
    facts: dict[str, object] = {"rows": rows, "columns": columns, "grid": view.grid}
    return Layout((view,), rows * columns, patch_size, unit // patch_size, facts)


MODES: dict[str, Callable[..., Layout]] = {
    "fixed": fixed,
    "tile512": tile512,
    "anyres": anyres,
    "native": native,
    "bounded": bounded,
}
