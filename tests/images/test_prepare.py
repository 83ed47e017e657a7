"""Pixels equal transformers' PIL processors, in every mode that one has; bytes until patchify; memory linear."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlmops.images import prepare
from vlmops.ops import patchify

SIZES = [(60, 90), (300, 200), (37, 101), (224, 224), (500, 120)]


def photos(sizes=SIZES, seed=0):
    """Smooth pictures with edges: noise alone would hide a shift."""
    rng = np.random.default_rng(seed)
    found = []
    for height, width in sizes:
        small = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
        found.append(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return found


def close(found, want):
    torch.testing.assert_close(found, torch.as_tensor(np.asarray(want)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [28, 224])
def test_centre_crops_are_clips(size):
    theirs = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    want = theirs(photos(), return_tensors="np")["pixel_values"]
    close(prepare(photos(), "fixed", policy="crop", size=size).pixel_values(), want)


def test_distorted_squares_are_siglips():
    theirs = SiglipImageProcessorPil(size={"height": 84, "width": 84}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    half = (0.5, 0.5, 0.5)
    resample = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[int(theirs.resample)]
    found = prepare(photos(), "fixed", size=84, mean=half, std=half, resample=resample)
    close(found.pixel_values(), theirs(photos(), return_tensors="np")["pixel_values"])


def test_padded_squares_are_llavas():
    theirs = LlavaImageProcessorPil(
        do_pad=True, size={"height": 98, "width": 98}, crop_size={"height": 98, "width": 98}
    )
    close(
        prepare(photos(), "fixed", policy="pad", size=98).pixel_values(),
        theirs(photos(), return_tensors="np")["pixel_values"],
    )


def test_anyres_is_llava_nexts():
    theirs = LlavaNextImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    pinpoints = [(56, 112), (112, 56), (112, 112), (168, 56), (56, 168)]
    theirs.image_grid_pinpoints = [list(p) for p in pinpoints]
    want = theirs(photos(), return_tensors="np", do_pad=True)
    found = prepare(photos(), "anyres", size=56, pinpoints=pinpoints)
    values, at = found.pixel_values(), 0
    assert found.image_sizes.tolist() == [list(s) for s in want["image_sizes"]]
    for theirs_of_one, count in zip(want["pixel_values"], found.tiles.tolist(), strict=True):
        close(values[at : at + count], theirs_of_one[:count])
        assert not np.any(theirs_of_one[count:])  # theirs is filled up to the longest
        at += count
    assert at == len(values)


def test_native_is_qwen2_vls():
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 40})
    want = theirs(photos(), return_tensors="np")
    found = prepare(photos(), "native", max_pixels=28 * 28 * 40)
    assert found.grid_thw.tolist() == want["image_grid_thw"].tolist()
    assert found.tokens.tolist() == (want["image_grid_thw"].prod(1) // 4).tolist()
    close(found.flattened(), want["pixel_values"])


def test_native_is_pixtrals():
    theirs = PixtralImageProcessorPil(size={"longest_edge": 160})
    want = theirs(photos(), return_tensors="np")
    found = prepare(photos(), "native", style="pixtral", long_edge=160)
    for mine, padded, (height, width) in zip(
        found.pixel_values(), want["pixel_values"], want["image_sizes"], strict=True
    ):
        assert mine.shape == (3, height, width)
        close(mine, padded[:, :height, :width])


@pytest.mark.parametrize(("mode", "options"), [
    ("fixed", dict(size=56)), ("native", dict(max_pixels=28 * 28 * 30)), ("native", dict(style="pixtral", long_edge=96)),
    ("anyres", dict(size=28, pinpoints=[(28, 56), (56, 56)])), ("bounded", dict(long_edge=168, tile=56)),
])  # fmt: skip
def test_patchify_takes_the_bytes(mode, options):
    found = prepare(photos(), mode, **options)
    assert all(x.dtype == torch.uint8 for x in found.pixels)
    p, t = found.patch_size, found.temporal_patch_size
    weight = torch.randn(5, 3, t, p, p) if t > 1 else torch.randn(5, 3, p, p)
    tokens = found.patchify(weight)
    assert len(tokens) == int(found.grid_thw.prod(1).sum())
    values = found.pixel_values()
    want, _ = patchify(values, weight, patch_size=p, temporal_patch_size=t, order=found.order)
    torch.testing.assert_close(tokens, want, rtol=1e-4, atol=1e-4)


def test_tiles_are_the_picture():
    """Put together again, the tiles of a bounded image are the resized image."""
    found = prepare(photos([(300, 450)]), "bounded", tile=112)
    rows, columns = found.layouts[0].facts["grid"]
    lines = [torch.cat(found.pixels[r * columns : (r + 1) * columns], 2) for r in range(rows)]
    whole = torch.cat(lines, 1)
    height, width = found.layouts[0].views[0].size
    want = photos([(300, 450)])[0].resize((width, height), Image.Resampling.BICUBIC)
    assert torch.equal(whole, torch.from_numpy(np.array(want)).permute(2, 0, 1))


def test_one_image_none_and_many_threads():
    one = photos()[0]
    assert len(prepare(one, "fixed", size=28)) == 1 and len(prepare([], "fixed")) == 0
    assert prepare([], "fixed").tokens.tolist() == []
    lots = photos([(20 + i % 7, 30 + i % 5) for i in range(40)])
    single, several = (prepare(lots, "native", threads=n, progress=n == 3) for n in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(single.pixels, several.pixels, strict=True))


def test_memory_grows_with_the_images_alone():
    """3,600 small images in one call; twice as many take twice as much."""

    def peak(count):
        lots = [np.zeros((40, 50, 3), np.uint8)] * count
        tracemalloc.start()
        found = prepare(lots, "fixed", size=28)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found.nbytes == count * 3 * 28 * 28
        return most + found.nbytes

    small, large = peak(1800), peak(3600)
    assert 1.6 < large / small < 2.4
    assert large < 4 * 3600 * 3 * 28 * 28 + 3600 * 2500  # tiles, the stack, and what belongs to each image


def test_moving_to_a_device_keeps_bytes():
    found = prepare(photos(), "native").to("meta")
    assert all(x.is_meta and x.dtype == torch.uint8 for x in found.pixels)
