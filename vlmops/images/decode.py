"""Whatever a user calls an image, as 8-bit RGB.

Decoding is Pillow's. What is added: the orientation of EXIF, depths of more than 8 bits without clipping, a size limit that is
read from the header before anything is decoded, and errors that name the image.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = ["MAX_PIXELS", "ImageError", "ImageInput", "decode"]

ImageInput = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
#: Pixels an image may have unless the caller says otherwise: what Pillow takes for a decompression bomb.
MAX_PIXELS = 178_956_970


class ImageError(ValueError):
    """An image that cannot be read, or is not what the caller allows."""


def decode(
    image: ImageInput,
    *,
    frame: int | None = None,
    background: tuple[int, int, int] | None = None,
    max_pixels: int | None = MAX_PIXELS,
) -> Image.Image:
    """The image as Pillow's RGB, 8 bits a channel, upright.

    Args:
        image: a path, the bytes of a file, a Pillow image, an array or tensor: [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or
            4 (where both could be meant, [H, W, C] for arrays and [C, H, W] for tensors), uint8, uint16, bool or floating point
            in [0, 1].
        frame: of an animated image; None: the first of a file, the current one of a Pillow image.
        background: colour behind transparent pixels. None: transparency is dropped, as transformers does it.
        max_pixels: refuse more; None: no limit.

    Raises:
        ImageError: not an image, truncated, too large, no such frame, or an array of no image's shape or values.
        FileNotFoundError: no such file.
        TypeError: none of the kinds above.
    """
    name = str(image) if isinstance(image, (str, os.PathLike)) else type(image).__name__
    if isinstance(image, (np.ndarray, Tensor)):
        found = _from_array(image)
        _check_size(found, name, max_pixels)
        return _to_rgb(found, background)
    if isinstance(image, Image.Image):
        return _load(image, name, frame, background, max_pixels)
    if isinstance(image, (bytes, bytearray, memoryview)):
        source: Path | io.BytesIO = io.BytesIO(image)
    elif isinstance(image, (str, os.PathLike)):
        source = Path(image)
    else:
        raise TypeError(
            f"image: expected a path, bytes, a Pillow image, an array or a tensor, got {type(image).__name__}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the limit here
        try:
            with Image.open(source) as opened:
                return _load(opened, name, frame, background, max_pixels)
        except UnidentifiedImageError:
            raise ImageError(f"{name}: not an image of a format Pillow knows") from None
        except Image.DecompressionBombError as err:
            raise ImageError(f"{name}: {err}") from None
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError as err:  # some formats look at the whole file when it is opened
            raise ImageError(f"{name}: the image is damaged or cut short: {err}") from err


def _check_size(image: Image.Image, name: str, max_pixels: int | None) -> None:
    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(f"{name}: an image of {width} x {height} pixels has nothing in it")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels are more than max_pixels = {max_pixels}")


def _load(
    image: Image.Image, name: str, frame: int | None, background: tuple[int, int, int] | None, max_pixels: int | None
) -> Image.Image:
    _check_size(image, name, max_pixels)  # the header's word, before anything is decoded
    try:
        if frame is not None:
            _seek(image, name, frame)
        image.load()
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as err:  # Pillow's ways to say that a file is broken
        raise ImageError(f"{name}: the image is damaged or cut short: {err}") from err
    return _to_rgb(ImageOps.exif_transpose(image), background)


def _seek(image: Image.Image, name: str, frame: int) -> None:
    count = getattr(image, "n_frames", 1)
    if not 0 <= frame < count:
        raise ImageError(f"{name}: has {count} frames, there is no number {frame}")
    image.seek(frame)


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_bytes(np.asarray(image), image.mode)).convert("RGB")
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if background is not None and transparent:
        whole = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", whole.size, (*background, 255)), whole).convert("RGB")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """One channel of more than 8 bits as 8: 16-bit values keep their range; Pillow's own conversion clips at 255."""
    if mode == "F":
        if not np.isfinite(values).all():
            raise ImageError("an image of floats has infinities or NaNs")
        top = float(values.max(initial=0.0))
        return np.rint(np.clip(values * (255.0 if top <= 1.0 else 1.0), 0, 255)).astype(np.uint8)
    wide = values.astype(np.int64).clip(0, 65535)
    return (
        ((wide * 255 + 32767) // 65535).astype(np.uint8)
        if mode != "I" or wide.max(initial=0) > 255
        else wide.astype(np.uint8)
    )


def _from_array(image: np.ndarray | Tensor) -> Image.Image:
    channels_first = isinstance(image, Tensor)
    values = (
        image.detach().cpu().float().numpy() if isinstance(image, Tensor) and image.dtype == torch.bfloat16 else None
    )
    if values is None:
        values = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    shape = list(values.shape)
    if values.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        if first and (channels_first or not last):
            values = np.moveaxis(values, 0, 2)
        elif not last:
            raise ImageError(f"an array of shape {shape}: expected [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4")
        if values.shape[2] == 1:
            values = values[:, :, 0]
    elif values.ndim != 2:
        raise ImageError(f"an array of shape {shape}: expected [H, W], [H, W, C] or [C, H, W]")
    if values.size == 0:
        raise ImageError(f"an array of shape {shape} has nothing in it")
    if values.dtype == np.uint16:
        values = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # NaN fails too
            raise ImageError(f"an array of floats from {low:g} to {high:g}: expected [0, 1], or uint8 of 0 to 255")
        values = np.rint(values * 255.0).astype(np.uint8)
    elif values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8:
        raise ImageError(f"an array of {values.dtype}: expected uint8, uint16, bool or floating point in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(values))
