"""Whatever a user calls an image becomes upright 8-bit RGB, or an error that says which and why."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vlmops.images import ImageError, decode, prepare


def noise(height=6, width=9, channels=3, dtype=np.uint8, seed=0):
    top = np.iinfo(dtype).max
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, top, shape, dtype=dtype, endpoint=True)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_every_kind_of_input_is_the_same_image(tmp_path):
    pixels = noise()
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (image, pixels, np.moveaxis(pixels, 2, 0), tensor, tensor.permute(1, 2, 0), tensor.float() / 255, encoded(image),
                  bytearray(encoded(image)), tmp_path / "a.png", str(tmp_path / "a.png")):  # fmt: skip
        found = decode(given)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), pixels)


@pytest.mark.parametrize("shape", [(3, 4, 3), (3, 5, 4)])
def test_an_array_that_could_be_either_way(shape):
    values = noise(*shape)
    assert decode(values).size == (shape[1], shape[0])  # [H, W, C]
    assert decode(torch.from_numpy(values)).size == (shape[2], shape[1])  # [C, H, W]


def test_orientation_of_exif():
    pixels = noise()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    data = encoded(Image.fromarray(pixels), exif=exif)
    assert np.array_equal(np.asarray(decode(data)), np.rot90(pixels, -1))
    assert np.array_equal(np.asarray(decode(Image.open(io.BytesIO(data)))), np.rot90(pixels, -1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes(mode):
    image = Image.fromarray(noise()).convert(mode)
    assert np.array_equal(np.asarray(decode(image)), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_or_laid_on_a_colour():
    pixels = noise(channels=4)
    pixels[:3, :, 3], pixels[3:, :, 3] = 0, 255
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(decode(image)), pixels[..., :3])
    over = np.asarray(decode(image, background=(10, 20, 30)))
    assert (over[:3] == (10, 20, 30)).all() and np.array_equal(over[3:], pixels[3:, :, :3])
    palette = Image.fromarray(noise(channels=0) % 4, "L").convert("P")
    palette.info["transparency"] = 0
    assert decode(encoded(palette), background=(1, 2, 3)).mode == "RGB"


def test_sixteen_bits_keep_their_range():
    wide = noise(channels=0, dtype=np.uint16)
    want = np.rint(wide / 257.0)
    for given in (Image.fromarray(wide), encoded(Image.fromarray(wide)), wide):
        found = np.asarray(decode(given))
        assert np.abs(found[..., 0] - want).max() <= 1 and (found[..., 0] == found[..., 1]).all()
    assert np.asarray(decode(Image.fromarray(np.full((2, 2), 65535, np.uint16)))).min() == 255
    assert np.asarray(decode(Image.fromarray(np.full((2, 2), 65535, np.int32)))).min() == 255  # mode I
    assert np.asarray(decode(Image.fromarray(np.full((2, 2), 1.0, np.float32)))).min() == 255  # mode F


def test_animated_images_give_the_frame_asked_for():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0) and decode(data, frame=2).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ImageError, match="has 3 frames, there is no number 3"):
        decode(data, frame=3)


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1)])
def test_extreme_sizes(size):
    image = Image.new("RGB", size, "red")
    assert decode(image).size == size
    assert prepare(image, "fixed", size=28).pixels.shape == (1, 3, 28, 28)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_files_cut_short_are_errors(kind, tmp_path):
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    (tmp_path / "whole").write_bytes(data)
    assert decode(tmp_path / "whole").size == (64, 64)
    (tmp_path / "short").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="short"):
        decode(tmp_path / "short")


def test_what_is_no_image():
    with pytest.raises(ImageError, match="not an image"):
        decode(b"GIF89 no more")
    with pytest.raises(TypeError, match="expected a path, bytes"):
        decode(3.5)
    with pytest.raises(FileNotFoundError):
        decode("/nowhere/at/all.png")


def test_bombs_are_refused_by_their_header():
    """A file of some kilobytes that decodes to 20000 x 20000 pixels."""
    data = encoded(Image.new("1", (20000, 20000)))
    assert len(data) < 100_000
    with pytest.raises(ImageError, match="400000000"):
        decode(data)
    with pytest.raises(ImageError, match="10000 x 10 pixels are more than max_pixels = 99999"):
        decode(Image.new("L", (10000, 10)), max_pixels=99_999)
    assert decode(Image.new("L", (10000, 10)), max_pixels=None).size == (10000, 10)


@pytest.mark.parametrize(("values", "why"), [
    (np.zeros((5, 5, 2), np.uint8), "C of 1, 3 or 4"), (np.zeros((4,), np.uint8), r"\[H, W\]"),
    (np.zeros((0, 4, 3), np.uint8), "nothing in it"), (np.full((4, 4), 3.0), "from 3 to 3"), (np.full((4, 4), -0.1), "expected"),
    (np.full((4, 4), np.nan), "floats from nan"), (np.zeros((4, 4), np.int64), "int64"),
])  # fmt: skip
def test_arrays_that_are_no_image(values, why):
    with pytest.raises(ImageError, match=why):
        decode(values)


def test_the_error_says_which_image():
    with pytest.raises(ImageError, match=r"image 1: .*not an image"):
        prepare([Image.new("RGB", (4, 4)), b"no", Image.new("RGB", (4, 4))], threads=2)
