"""patchify's Triton kernels in the interpreter: every form of images and weights, gradients, tables, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops import test_patchify as base
from tests.ops.test_patchify import DTYPES, STATS, pixels, weights
from tests.support import triton_interpreter
from tests.support.tolerance import assert_close_to_oracle
from vlmops.ops import patchify
from vlmops.ops.patchify import convolve, triton_layout
from vlmops.ops.patchify import triton as backend

pytest.importorskip("triton")
triton_interpreter.install()


def check(images, weight, bias=None, **options):
    base.check(images, weight, bias, backend="triton", **options)


def floats(*shape):
    return pixels(*shape, raw=False).requires_grad_()


def channels_last_memory(x):
    """[..., C, H, W] whose memory runs (H, W, C); a leaf again."""
    return x.detach().movedim(-3, -1).contiguous().movedim(-1, -3).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("order", ["raster", "merge2x2"])
def test_images(dtype, raw, order):
    images = pixels(2, 3, 8, 16) if raw else floats(2, 3, 8, 16)
    check(images, *weights(grad=True), dtype=dtype, patch_size=4, order=order, **STATS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("statistics", [{}, dict(mean=[0.5]), dict(std=[0.2, 0.3, 0.4])])
@pytest.mark.parametrize("raw", [True, False])
def test_each_statistic_alone(dtype, statistics, raw):
    images = pixels(1, 3, 4, 8) if raw else floats(1, 3, 4, 8)
    check(images, *weights(), dtype=dtype, patch_size=4, **statistics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frames", "fill"), [(1, 2), (2, 2), (3, 2), (1, 9), (5, 4), (2, 3)])
def test_videos_repeat_their_last_frame(dtype, frames, fill):
    """Their gradient is the sum over all that a frame stands for, stills of up to 8 frames included."""
    w, b = weights(8, p=2, t=fill, grad=True)
    options = dict(patch_size=2, temporal_patch_size=fill, dtype=dtype, **STATS)
    check(floats(2, frames, 3, 2, 4), w, b, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_flattened(dtype, channels_last):
    w = (torch.randn(16, 24) * 0.2).requires_grad_()
    options = dict(dtype=dtype, patch_size=2, temporal_patch_size=2, channels_last=channels_last)
    options["grid_thw"] = torch.tensor([[1, 2, 4]])
    wide = torch.randn(8, 48)
    for images in (wide[:, :24].requires_grad_(), wide[:, ::2], pixels(8, 24)):
        check(images, w, **options, **STATS)
    check(wide[:, :24], w, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["planar", "interleaved", "mixed"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mixed_sizes(dtype, form, channels_last):
    images = [floats(3, 4, 6), floats(3, 2, 2), floats(3, 3, 6, 2), floats(3, 2, 4), floats(2, 3, 2, 2)]
    if form != "planar":
        images = [x if form == "mixed" and i % 2 else channels_last_memory(x) for i, x in enumerate(images)]
    w, options = (
        (torch.randn(16, 12) * 0.2).requires_grad_(),
        dict(dtype=dtype, patch_size=2, channels_last=channels_last),
    )
    check(images, w, **options, **STATS)
    raw = [(x.detach() * 255).byte() for x in images]
    check(raw, w, position=torch.randn(20, 16), **options, **STATS)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("still", [False, True])
def test_mixed_sizes_of_several_frames(still, channels_last):
    w = (torch.randn(32, 96) * 0.2).requires_grad_()
    images = [floats(3, 8, 16), floats(3, 16, 8), channels_last_memory(floats(3, 8, 8))]
    if not still:
        images += [floats(3, 3, 8, 8), floats(2, 3, 8, 16)]
    options = dict(patch_size=4, temporal_patch_size=2, order="merge2x2", channels_last=channels_last, **STATS)
    check(images, w, **options)


def test_images_without_a_patch_are_passed_over():
    w, b = weights(grad=True)
    images = [floats(3, *size) for size in ((3, 9), (8, 8), (2, 2), (9, 3), (5, 11), (1, 1))]
    check(images, w, b, patch_size=4, crop=True)


@pytest.mark.parametrize("c", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_order(dtype, c):
    w = (torch.randn(32, 16 * c) * 0.2).requires_grad_()
    images, options = floats(2, c, 8, 8), dict(dtype=dtype, patch_size=4, channels_last=True, mean=[0.4], std=[0.3])
    for x in (images, channels_last_memory(images)):
        check(x, w, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("all_tokens", [False, True])
def test_position(dtype, all_tokens):
    wide = torch.randn(8 if all_tokens else 4, 64)
    position = wide[:, 32:].requires_grad_()
    check(pixels(2, 3, 8, 8), *weights(), dtype=dtype, patch_size=4, position=position)


@pytest.mark.parametrize("raw", [True, False])
def test_strided_and_cropped_images(raw):
    w, b = weights(grad=True)
    whole = pixels(2, 3, 20, 30, raw=raw)
    for images in (
        whole[:, :, 2:10, 3:11],
        whole.transpose(2, 3)[:, :, :8, :8],
        whole.permute(0, 2, 3, 1)[:, :8, :8].permute(0, 3, 1, 2),
        whole.contiguous(memory_format=torch.channels_last)[..., 4:12, 1:9],
        whole[:1, :, :8, :8].expand(3, -1, -1, -1),
    ):
        assert not images.is_contiguous()
        with vlmops.use_backend("triton"):
            x = images if raw else images.detach().requires_grad_()  # a view with these strides, not a copy
            out, _ = patchify(x, w, b, patch_size=4, **STATS)
            found = torch.autograd.grad(out, [w] if raw else [w, x], torch.ones_like(out))
        y = images.double() / 255 if raw else images.double()
        y.requires_grad_(not raw)
        with vlmops.use_backend("reference"):
            want, _ = patchify(y, w.double(), b.double(), patch_size=4, **STATS)
            wanted = torch.autograd.grad(want, [w] if raw else [w, y], torch.ones_like(want))
        for a, b64 in zip((out, *found), (want, *wanted), strict=True):
            assert a.shape == b64.shape
            assert_close_to_oracle(a, None, b64)


WEIGHTS = {
    "channels-last memory": lambda w: w.permute(0, *range(2, w.dim()), 1).contiguous().permute(
        0, w.dim() - 1, *range(1, w.dim() - 1)
    ),
    "columns of another": lambda w: torch.cat([w.flatten(1), w.flatten(1)], 1)[:, : w[0].numel()].view(w.shape),
    "transposed": lambda w: w.flatten(1).t().contiguous().t().view(w.shape),
    "every second pixel": lambda w: w.repeat_interleave(2, -1)[..., ::2],
    "every second line": lambda w: w.repeat_interleave(2, -2)[..., ::2, :],
}  # fmt: skip


@pytest.mark.parametrize("layout", WEIGHTS)
@pytest.mark.parametrize("frames", [1, 2])
def test_weights_are_read_as_they_lie(layout, frames):
    w, b = weights(t=frames)
    turned = WEIGHTS[layout](w)
    assert torch.equal(turned, w) and (turned.stride() != w.stride())
    options = dict(patch_size=4, temporal_patch_size=frames, **STATS)
    images = floats(2, 2, 3, 8, 8)
    rows, grid = torch.randn(5, w[0].numel(), requires_grad=True), torch.tensor([[1, 1, 5]])
    for x, more in ((images, {}), (rows, dict(grid_thw=grid))):
        outs = []
        for weight in (w, turned):
            with vlmops.use_backend("triton"):
                y, _ = patchify(x, weight, b, **options, **more)
                outs.append((y, *torch.autograd.grad(y.square().sum(), x)))
        assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


@pytest.mark.parametrize("layout", ["channels-last memory", "columns of another", "transposed"])
def test_common_weight_layouts_are_not_copied(layout):
    w = WEIGHTS[layout](weights(t=2)[0])
    for images in (pixels(1, 2, 3, 8, 8), pixels(4, 96)):
        p = triton_layout.pixels_of(images, None, 3, 4, 2, "raster", False, w.device)
        assert triton_layout.weight_rows(w, p, 4, 2).weight is w


@given(
    n=st.integers(0, 2), t=st.integers(1, 3), gh=st.integers(1, 2), gw=st.integers(1, 3), p=st.integers(1, 6),
    frames=st.integers(1, 3), c=st.integers(1, 5), merge=st.booleans(), raw=st.booleans(), last=st.booleans(),
    form=st.sampled_from(["stack", "list", "channels_last memory"]), e=st.integers(1, 40),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_any_shape(n, t, gh, gw, p, frames, c, merge, raw, last, form, e):
    k = 2 if merge else 1
    images = pixels(n, t, c, gh * p * k, gw * p * k) if raw else floats(n, t, c, gh * p * k, gw * p * k)
    if form != "stack":
        images = channels_last_memory(images) if "memory" in form else [x.detach() for x in images]
    w = (torch.randn(e, c * frames * p * p) * 0.2).requires_grad_()
    check(
        images, w, patch_size=p, temporal_patch_size=frames, order="merge2x2" if merge else "raster", channels_last=last,
        mean=[0.4] * c, std=[0.3] * c,
    )  # fmt: skip


def test_more_than_one_tile_each_way():
    """67 tokens, 70 columns, 147 elements of a patch: parts of tiles at every end, and the weight's gradient in parts."""
    w, b = (torch.randn(70, 3, 7, 7) * 0.1).requires_grad_(), torch.randn(70, requires_grad=True)
    check([floats(3, 7 * 7, 9 * 7), floats(3, 7, 4 * 7)], w, b, patch_size=7, dtype=torch.bfloat16, **STATS)


@pytest.mark.parametrize("rows", [1, 40, 700])
def test_sums_of_many_rows(rows):
    x = torch.randn(rows, 2 * 37)[:, :37]
    torch.testing.assert_close(backend._sum_rows(x, torch.float32), x.sum(0), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("part", ["images", "weight", "bias", "position"])
def test_each_gradient_alone(part):
    parts = dict(images=pixels(2, 3, 8, 8, raw=False), weight=weights()[0], bias=torch.randn(32))
    position = torch.randn(4, 32)
    (position if part == "position" else parts[part]).requires_grad_()
    check(*parts.values(), patch_size=4, position=position, **STATS)


def test_an_expanded_gradient():
    """The gradient of a sum has no strides."""
    w, b = weights(grad=True)
    with vlmops.use_backend("triton"):
        out, _ = patchify(pixels(2, 3, 8, 8), w, b, patch_size=4)
    found = torch.autograd.grad(out.sum(), [w, b], retain_graph=True)
    dense = torch.autograd.grad(out, [w, b], torch.ones_like(out))
    assert all(map(torch.equal, found, dense)) and torch.equal(found[1], torch.full((32,), 8.0))


@pytest.mark.parametrize(("images", "weight"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_pixels_and_weights_of_different_types(images, weight):
    w, x = weights()[0].to(weight), torch.rand(2, 3, 8, 8).to(images).requires_grad_()
    found = {}
    for name in ("triton", "torch", "reference"):
        with vlmops.use_backend(name):
            wide = name == "reference"
            out, _ = patchify(x.double() if wide else x, w.double() if wide else w, patch_size=4, **STATS)
            found[name] = (out, *torch.autograd.grad(out.sum(), x))
    for a, low, oracle in zip(*found.values(), strict=True):
        assert a.dtype == low.dtype
        assert_close_to_oracle(a, low, oracle)


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (5, 3, 2, 4, 4), (2, 3, 4, 8, 12)])
def test_convolve_is_the_convolution(shape):
    kernel = (4, 4) if len(shape) == 4 else (2, 4, 4)
    images, weight, bias = torch.randn(shape), torch.randn(6, 3, *kernel), torch.randn(6)
    function = torch.nn.functional.conv2d if len(kernel) == 2 else torch.nn.functional.conv3d
    want = function(images, weight, bias, stride=kernel).movedim(1, -1).reshape(-1, 6)
    with vlmops.use_backend("triton"):
        torch.testing.assert_close(convolve(images, weight, bias), want, atol=1e-4, rtol=1e-4)


def test_no_images():
    w, b = weights(grad=True)
    with vlmops.use_backend("triton"):
        for images, options in (
            ([], {}),
            (pixels(0, 3, 8, 8), {}),
            (torch.empty(0, 48), dict(grid_thw=torch.empty(0, 3, dtype=torch.int64))),
        ):
            tokens, _ = patchify(images, w, b, patch_size=4, **options)
            assert tokens.shape == (0, 32)
            assert not any(g.any() for g in torch.autograd.grad(tokens.sum(), [w, b]))


def test_a_nan_stays_in_its_patch():
    w, _ = weights()
    images = pixels(1, 3, 8, 8, raw=False)
    images[0, 1, 5, 5] = float("nan")
    with vlmops.use_backend("triton"):
        out = patchify(images, w, patch_size=4, **STATS)[0]
    assert out.isnan().all(1).tolist() == [False, False, False, True] and out[:3].isfinite().all()


@pytest.mark.parametrize("step", ["image", "frame", "channel", "line"])
def test_steps_past_two_gigabytes(step):
    """Only the pages that are touched exist."""
    far = (1 << 31) + 64
    memory = torch.empty(2 * far, dtype=torch.uint8)
    strides = dict(image=96, frame=48, channel=16, line=4)
    shape = [2, 2, 2, 4, 4]
    if step == "line":
        shape, strides["line"] = [1, 1, 1, 2, 2], far
    else:
        strides[step] = far
    images = memory.as_strided(shape, (*strides.values(), 1))
    images.copy_(pixels(*shape))
    w, options = (
        torch.randn(8, shape[2] * shape[3] ** 2 * shape[1]),
        dict(patch_size=shape[3], temporal_patch_size=shape[1]),
    )
    with vlmops.use_backend("triton"):
        out = patchify(images, w, **options)[0]
    torch.testing.assert_close(out, base.plain(images, w, **options), atol=1e-4, rtol=1e-4)


def test_a_table_of_int64(monkeypatch):
    """What a buffer with an image of 2^31 pixels has; the sizes alone are enough to see it."""
    sizes = torch.tensor([[1, 14, 14, 0], [1 << 20, 28, 28, 0]])
    for count, dtype in ((1, torch.int32), (2, torch.int64)):
        p = triton_layout.pixels_of(torch.empty(0), sizes[:count], 3, 14, 2, "raster", False, torch.device("meta"))
        assert p.table.dtype == dtype
    wide = triton_layout.on_device
    monkeypatch.setattr(triton_layout, "on_device", lambda rows, dtype, device: wide(
        rows, torch.int64 if dtype == torch.int32 else dtype, device
    ))  # fmt: skip
    for last in (False, True):
        images = [floats(3, 8, 4), channel_turned := channels_last_memory(floats(3, 4, 12))]
        check(images, (torch.randn(8, 48) * 0.2).requires_grad_(), patch_size=4, channels_last=last)
        check([channel_turned], torch.randn(8, 48) * 0.2, patch_size=4, channels_last=last)


def test_refusals():
    w = weights()[0]
    cases = {
        "float64 pixels": (torch.rand(1, 3, 4, 4, dtype=torch.float64), w),
        "float64 weight": (pixels(1, 3, 4, 4), w.double()),
    }
    for images, weight in cases.values():
        with vlmops.use_backend("triton"), pytest.raises(vlmops.backends.BackendError, match="float64"):
            patchify(images, weight, patch_size=4)
