"""The arithmetic of the modes: published counts, transformers' own sizes, and what holds for any image."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_smart_resize

from vlmops.images import ImageError, layout
from vlmops.images.modes import PINPOINTS, smart_resize, unpadded

SIDES = st.integers(1, 5000)


@pytest.mark.parametrize(("size", "detail", "tokens"), [
    ((1024, 1024), "high", 765), ((4096, 2048), "high", 1105), ((4096, 8192), "low", 85), ((512, 512), "high", 255),
    ((2048, 4096), "high", 1105), ((100, 100), "high", 255), ((1, 1), "high", 255),
])  # fmt: skip
def test_tiles_of_512_count_as_published(size, detail, tokens):
    assert layout(*size, "tile512", detail=detail).tokens == tokens


@given(SIDES, SIDES)
@settings(max_examples=200, deadline=None)
def test_tiles_of_512_hold_any_image(height, width):
    plan = layout(height, width, "tile512")
    rows, columns = plan.facts["grid"]
    (h, w), canvas = plan.views[1].size, plan.views[1].canvas
    assert h <= canvas[0] == 512 * rows and w <= canvas[1] == 512 * columns and max(h, w) <= 2048
    assert min(h, w) <= 768 and (h, w) <= (height, width) and plan.tokens == 85 + 170 * rows * columns


@given(SIDES, SIDES)
@settings(max_examples=300, deadline=None)
def test_anyres_chooses_and_counts_as_transformers(height, width):
    plan = layout(height, width, "anyres")
    canvas = select_best_resolution((height, width), PINPOINTS)
    assert plan.views[1].canvas == tuple(canvas)
    rows, columns = (24 * side for side in plan.facts["grid"])
    processor = object.__new__(LlavaNextProcessor)
    kept, newlines = processor._get_unpadded_features(height, width, 24, 24, *plan.facts["grid"])
    assert plan.tokens == 576 + kept + newlines
    top, left, r, c = unpadded(height, width, rows, columns)
    assert top + r <= rows and left + c <= columns


def test_anyres_refuses_canvases_of_other_squares():
    for bad in ([(300, 336)], [(1008, 1008)]):
        with pytest.raises(ValueError, match="at most 6 squares"):
            layout(500, 500, "anyres", pinpoints=bad)


@given(
    SIDES,
    SIDES,
    st.sampled_from([28, 32]),
    st.sampled_from([56 * 56, 4]),
    st.sampled_from([28 * 28 * 1280, 28 * 28 * 9]),
)
@settings(max_examples=300, deadline=None)
def test_smart_resize_is_transformers(height, width, factor, low, high):
    try:
        theirs = their_smart_resize(height, width, factor, low, high)
    except ValueError:
        with pytest.raises(ImageError, match="aspect ratio"):
            smart_resize(height, width, factor, low, high)
        return
    assert smart_resize(height, width, factor, low, high) == theirs


def test_native_resolution_has_no_upper_limit_unless_asked():
    assert layout(10000, 8000, "native").tokens == 357 * 286
    assert layout(10000, 8000, "native", max_pixels=28 * 28 * 1280).tokens <= 1280


@given(SIDES, SIDES)
@settings(max_examples=200, deadline=None)
def test_pixtral_breaks_rows(height, width):
    if max(height, width) > 1000 * min(height, width):
        return
    plan = layout(height, width, "native", style="pixtral")
    (h, w) = plan.views[0].size
    assert h % 16 == w % 16 == 0 and max(h, w) <= 1024 and plan.tokens == h // 16 * (w // 16 + 1)


@given(SIDES, SIDES)
@settings(max_examples=300, deadline=None)
def test_bounded_stays_within_its_bounds(height, width):
    plan = layout(height, width, "bounded")
    h, w = plan.views[0].size
    assert plan.tokens == h // 28 * (w // 28) <= 1600 and max(h, w) <= 1568
    if min(height, width) >= 400 and height * width < 1200 * 28 * 28 and max(height, width) < 1500:
        assert height - 28 < h <= height and width - 28 < w <= width  # as it is, but for the last part of a token


def test_bounded_limits():
    assert layout(8192, 8192, "bounded").tokens <= 1600
    with pytest.raises(ImageError, match="larger than 8192 x 8192"):
        layout(8193, 10, "bounded")
    with pytest.raises(ValueError, match="a multiple of 28"):
        layout(100, 100, "bounded", tile=100)
    assert math.prod(layout(1568, 784, "bounded").facts["grid"]) == 4 * 2


def test_options_and_modes_that_do_not_exist():
    with pytest.raises(ValueError, match=r"mode: expected one of fixed, tile512, anyres, native, bounded, got 'tiles'"):
        layout(10, 10, "tiles")
    with pytest.raises(TypeError, match="detail: no option of mode 'fixed', whose options are size"):
        layout(10, 10, "fixed", detail="low")
    for mode, options in (("fixed", {"policy": "x"}), ("tile512", {"detail": "x"}), ("native", {"style": "x"})):
        with pytest.raises(ValueError, match="expected"):
            layout(10, 10, mode, **options)
