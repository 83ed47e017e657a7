"""patchify: every form and backend against the oracle, plain loops, torch's convolutions, transformers' processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import vlmops
from tests.support.ops import check_op, opcheck
from vlmops.ops import patchify

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "cpu"]
STATS = dict(mean=[0.48, 0.46, 0.41], std=[0.27, 0.26, 0.28])


def weights(e=32, p=4, t=1, c=3, grad=False):
    shape = (e, c, p, p) if t == 1 else (e, c, t, p, p)
    return (torch.randn(shape) * 0.2).requires_grad_(grad), torch.randn(e, requires_grad=grad)


def pixels(*shape, raw=True):
    return torch.randint(0, 256, shape, dtype=torch.uint8) if raw else torch.rand(shape)


def tokens_of(*args, **kwargs):
    return patchify(*args, **kwargs)[0]


def _vectors(image, p, frames, order, channels_last):
    """Patch vectors of [T, C, H, W], one patch after the other."""
    t, _, h, w = image.shape
    places = [(r, c) for r in range(h // p) for c in range(w // p)]
    if order == "merge2x2":
        places.sort(key=lambda at: (at[0] // 2, at[1] // 2, at[0] % 2, at[1] % 2))
    for first in range(0, t, frames):
        steps = [min(first + f, t - 1) for f in range(frames)]
        for r, c in places:
            patch = image[steps, :, r * p : r * p + p, c * p : c * p + p]  # [frames, C, P, P]
            yield patch.permute((0, 2, 3, 1) if channels_last else (1, 0, 2, 3)).flatten()


def plain(
    images, weight, bias=None, *, patch_size, temporal_patch_size=1, mean=None, std=None, position=None, order="raster",
    channels_last=False, grid_thw=None, crop=False,
):  # fmt: skip
    """What a processor and a patch embedding do, in plain torch and an order of its own."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    flat, c = weight.flatten(1), weight[0].numel() // (temporal_patch_size * patch_size * patch_size)

    def normalised(x, shape):
        y = x.to(wide) / 255 if x.dtype == torch.uint8 else x.to(wide) if mean or std else x
        y = y if mean is None else y - torch.tensor(mean, dtype=wide).expand(c).view(shape)
        return (y if std is None else y / torch.tensor(std, dtype=wide).expand(c).view(shape)).to(weight.dtype)

    if isinstance(images, torch.Tensor) and images.dim() == 2:
        shape = (1, 1, c) if channels_last else (1, c, 1)
        parts = images.view(len(images), *((-1, c) if channels_last else (c, -1)))
        rows = normalised(parts, shape).flatten(1)
    else:
        cut = [
            v
            for x in images
            for v in _vectors(
                normalised(x if x.dim() == 4 else x[None], (c, 1, 1)), patch_size, temporal_patch_size, order,
                channels_last,
            )
        ]  # fmt: skip
        rows = torch.stack(cut) if cut else flat.new_empty(0, flat.shape[1])
    y = F.linear(rows, flat, bias)
    if position is not None:
        y = y + (position if len(position) == len(y) else position.repeat(len(y) // len(position), 1))
    return y


def check(images, weight, bias=None, *, backend="cpu", dtype=torch.float32, **options):
    check_op(tokens_of, (images, weight, bias), options, backend=backend, dtype=dtype, lowprec=plain)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("order", ["raster", "merge2x2"])
@pytest.mark.parametrize("frames", [1, 2])
def test_the_oracle_itself(order, frames, channels_last):
    images, w = pixels(2, 3, 3, 8, 16), torch.randn(5, 3 * frames * 16, dtype=torch.float64)
    options = dict(patch_size=4, temporal_patch_size=frames, order=order, channels_last=channels_last, **STATS)
    with vlmops.use_backend("reference"):
        torch.testing.assert_close(tokens_of(images, w, **options), plain(images, w, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("order", ["raster", "merge2x2"])
def test_images(backend, dtype, raw, order):
    check(pixels(2, 3, 8, 16, raw=raw), *weights(), backend=backend, dtype=dtype, patch_size=4, order=order, **STATS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_videos_repeat_their_last_frame(backend, dtype, frames):
    w, b = weights(t=2)
    images, options = pixels(2, frames, 3, 8, 8), dict(patch_size=4, temporal_patch_size=2, **STATS)
    check(images, w, b, backend=backend, dtype=dtype, **options)
    assert patchify(images, w, b, **options)[1].tolist() == [[-(-frames // 2), 2, 2]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_flattened(backend, dtype):
    w, b = weights(t=2)
    rows, grid = torch.randn(24, 96), torch.tensor([[1, 4, 4], [2, 2, 2]])
    check(rows, w, b, backend=backend, dtype=dtype, patch_size=4, temporal_patch_size=2, grid_thw=grid)
    out, same = patchify(rows, w, b, patch_size=4, temporal_patch_size=2, grid_thw=grid, order="merge2x2")
    assert same is grid
    torch.testing.assert_close(out, rows @ w.flatten(1).T + b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("p", [1, 4, 14])
def test_flattened_rows_are_normalised_by_channel(backend, dtype, channels_last, p):
    w = torch.randn(32, 3 * 8 * p * p) * 0.1
    options = dict(
        patch_size=p, temporal_patch_size=8, grid_thw=torch.tensor([[1, 2, 2]]), channels_last=channels_last, **STATS
    )
    for rows in (pixels(4, w.shape[1]), pixels(4, 2 * w.shape[1], raw=False)[:, ::2]):
        check(rows, w, backend=backend, dtype=dtype, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("raw", [True, False])
def test_mixed_sizes(backend, dtype, raw):
    w, b = weights()
    hwc = pixels(12, 8, 3, raw=raw).permute(2, 0, 1)  # as decoders write it
    images = [pixels(3, 8, 12, raw=raw), pixels(3, 4, 4, raw=raw), hwc, pixels(2, 3, 12, 4, raw=raw)]
    images.append(pixels(3, 9, 9, raw=raw)[:, 1:, ::2][:, :, :4])
    check(images, w, b, backend=backend, dtype=dtype, patch_size=4, position=torch.randn(21, 32), **STATS)
    assert patchify(images, w, patch_size=4)[1].tolist() == [[1, 2, 3], [1, 1, 1], [1, 3, 2], [2, 3, 1], [1, 2, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_has_the_options_of_a_stack(backend):
    w, b = weights(t=2)
    options = dict(patch_size=4, temporal_patch_size=2, order="merge2x2", crop=True)
    with vlmops.use_backend(backend), torch.no_grad():
        for shape in ((3, 8, 8), (3, 11, 19), (3, 3, 16, 8)):
            images, position = pixels(2, *shape, raw=False), torch.randn(4 * (2 if len(shape) == 4 else 1), 32)
            position = position if shape[-1] == 8 and len(shape) == 3 else torch.randn(
                len(tokens_of(images[:1], w, **options)), 32
            )  # fmt: skip
            one, grid = patchify(images, w, b, position=position, **options)
            other, same = patchify(list(images), w, b, position=position, **options)
            assert torch.equal(grid, same)
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c", [1, 3, 5])
def test_channels_last_order(backend, c):
    w = torch.randn(32, 16 * c)
    images = pixels(2, c, 8, 8, raw=False)
    for x in (images, images.contiguous(memory_format=torch.channels_last)):
        check(x, w, backend=backend, patch_size=4, channels_last=True, mean=[0.4], std=[0.3])
    wide = torch.randn(16, 300 * 9)  # a line of pixels is longer than what the kernel gathers at once
    check(pixels(1, 300, 3, 3), wide * 0.02, backend=backend, patch_size=3, channels_last=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("all_tokens", [False, True])
def test_position(backend, dtype, size, all_tokens):
    each = (size // 4) ** 2
    position = torch.randn(2 * each if all_tokens else each, 32)
    check(pixels(2, 3, size, size), *weights(), backend=backend, dtype=dtype, patch_size=4, position=position)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [True, False])
def test_strided_and_cropped_images(backend, raw):
    w, b = weights()
    whole = pixels(2, 3, 20, 30, raw=raw)
    for images in (
        whole[:, :, 2:10, 3:11],
        whole.transpose(2, 3)[:, :, :8, :8],
        whole.permute(0, 2, 3, 1)[:, :8, :8].permute(0, 3, 1, 2),
        whole.contiguous(memory_format=torch.channels_last)[..., :8, :8],
        whole[:1, :, :8, :8].expand(3, -1, -1, -1),
    ):
        check(images, w, b, backend=backend, patch_size=4, **STATS)
    with vlmops.use_backend(backend), torch.no_grad():
        cropped, grid = patchify(whole, w, b, patch_size=4, order="merge2x2", crop=True)
    assert grid.tolist() == [[1, 4, 6]] * 2
    torch.testing.assert_close(cropped, plain(whole[:, :, :16, :24], w, b, patch_size=4, order="merge2x2"))


@given(
    n=st.integers(0, 2), t=st.integers(1, 3), gh=st.integers(1, 3), gw=st.integers(1, 3), p=st.integers(1, 17),
    frames=st.integers(1, 2), c=st.integers(1, 4), merge=st.booleans(), raw=st.booleans(), last=st.booleans(),
    form=st.sampled_from(["stack", "list", "channels_last memory"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_random_shapes(n, t, gh, gw, p, frames, c, merge, raw, last, form):
    k = 2 if merge else 1
    images = pixels(n, t, c, gh * p * k, gw * p * k, raw=raw)
    if form != "stack":
        images = images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if "memory" in form else list(images)
    w = torch.randn(16, c * frames * p * p) * 0.2
    for backend in ["torch", *(["cpu"] if n and w.shape[1] >= 16 else [])]:
        check(
            images, w, backend=backend, patch_size=p, temporal_patch_size=frames,
            order="merge2x2" if merge else "raster", channels_last=last, mean=[0.4] * c, std=[0.3] * c,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("each", [True, False])
def test_gradients(backend, dtype, each):
    w, b = weights(t=2, grad=True)
    position = torch.randn(4 if each else 16, 32, requires_grad=True)
    options = dict(backend=backend, dtype=dtype, patch_size=4, temporal_patch_size=2, position=position, **STATS)
    stills = pixels(4, 1, 3, 8, 8, raw=False).requires_grad_()
    check(stills, w, b, **options)
    check(pixels(4, 1, 3, 8, 8), w, b, **options)
    mixed = [pixels(3, 3, 8, 8, raw=False).requires_grad_(), pixels(3, 8, 16, raw=False).requires_grad_()]
    options["position"] = torch.randn(16, 32, requires_grad=True)
    check(mixed, w, b, order="merge2x2", **options)
    check([x.detach() for x in mixed], w, b, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["images", "weight", "bias", "position"])
def test_each_gradient_alone(backend, part):
    parts = dict(images=pixels(2, 3, 8, 8, raw=False), weight=weights()[0], bias=torch.randn(32))
    position = torch.randn(4, 32)
    (position if part == "position" else parts[part]).requires_grad_()
    check(*parts.values(), backend=backend, patch_size=4, position=position, **STATS)


def test_gradients_of_flattened_rows():
    w, b = weights(t=2, grad=True)
    rows = torch.randn(8, 96, requires_grad=True)
    options = dict(patch_size=4, temporal_patch_size=2, grid_thw=torch.tensor([[1, 2, 4]]))
    check(rows, w, b, backend="torch", **options)
    for backend in BACKENDS:
        check(rows, w, b, backend=backend, **options, **STATS)


def test_gradcheck_of_the_reference():
    w = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    b, position = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3,), (4, 3)))
    images = torch.rand(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    options = dict(patch_size=2, mean=[0.5], std=[0.2], order="merge2x2")
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, w, b, p: tokens_of(x, w, b, position=p, **options), (images, w, b, position)
        )


def test_opcheck():
    w, b = weights(grad=True)
    op, rest = torch.ops.vlmops.patchify.default, ([0.4] * 3, [0.2] * 3, 4, 1, "raster", False)
    position = torch.randn(4, 32, requires_grad=True)
    images = pixels(2, 1, 3, 8, 8, raw=False).requires_grad_()
    for backend in BACKENDS:
        opcheck(op, (images, None, w, b, position, *rest, 8, False, backend))
        opcheck(op, (pixels(2, 1, 3, 8, 8), None, w, b, None, *rest, 8, False, backend))
    sizes = torch.tensor([[1, 8, 8, 0], [1, 4, 4, 1]])
    opcheck(op, (pixels(240), sizes, w, b, torch.randn(5, 32, requires_grad=True), *rest, 5, False, "cpu"))


@pytest.mark.parametrize("form", ["images", "flattened", "list"])
def test_compile_has_no_graph_break(form):
    w, b = weights(grad=True)
    images = {"images": pixels(2, 3, 8, 8, raw=False), "flattened": torch.randn(4, 48)}.get(form)
    images = [pixels(3, 8, 8, raw=False), pixels(3, 4, 8, raw=False)] if images is None else images
    options = dict(patch_size=4, grid_thw=torch.tensor([[1, 2, 2]]) if form == "flattened" else None)
    fn = torch.compile(lambda x: tokens_of(x, w, b, **options).square().sum(), fullgraph=True, backend="aot_eager")
    want = tokens_of(images, w, b, **options).square().sum()
    torch.testing.assert_close(fn(images), want)
    got, wanted = (torch.autograd.grad(y, w)[0] for y in (fn(images), want))
    torch.testing.assert_close(got, wanted)


def test_autocast():
    w, b = weights(grad=True)
    position = torch.randn(4, 32)
    for images in (pixels(1, 3, 8, 8), pixels(1, 3, 8, 8, raw=False), [pixels(3, 8, 8)]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = tokens_of(images, w, b, patch_size=4, position=position)
        assert got.dtype == torch.bfloat16
        want = plain(images, w.bfloat16(), b.bfloat16(), patch_size=4, position=position.bfloat16())
        torch.testing.assert_close(got, want, atol=5e-2, rtol=2e-2)
        got.float().sum().backward()
        assert w.grad.dtype == torch.float32


def test_nan_flows_through():
    w, _ = weights()
    images = pixels(1, 3, 8, 8, raw=False)
    images[0, 1, 5, 5] = float("nan")
    for backend in BACKENDS:
        with vlmops.use_backend(backend), torch.no_grad():
            assert tokens_of(images, w, patch_size=4, **STATS).isnan().all(1).tolist() == [False, False, False, True]


def test_equals_torch_convolutions():
    w, b = weights()
    images = pixels(2, 3, 8, 12, raw=False)
    want = F.conv2d(images, w, b, stride=4).flatten(2).transpose(1, 2).reshape(12, 32)
    torch.testing.assert_close(tokens_of(images, w, b, patch_size=4), want)
    w, b = weights(t=2)
    video = pixels(1, 4, 3, 8, 8, raw=False)
    want = F.conv3d(video.transpose(1, 2), w, b, stride=(2, 4, 4)).flatten(2).transpose(1, 2).reshape(8, 32)
    torch.testing.assert_close(tokens_of(video, w, b, patch_size=4, temporal_patch_size=2), want)


def test_equals_qwen2_vl_processor():
    """Raw pixels in, the same tokens as transformers' processor followed by its patch embedding."""
    from PIL import Image
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((84, 56, 3), (28, 112, 3))]
    processor = processing.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=10**6)
    rows = processor(pictures, return_tensors="pt")
    w = torch.randn(32, 3, 2, 14, 14) * 0.1
    want = rows["pixel_values"] @ w.flatten(1).T
    images = [torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) for picture in pictures]
    stats = dict(mean=processor.image_mean, std=processor.image_std)
    got, grid = patchify(images, w, patch_size=14, temporal_patch_size=2, order="merge2x2", **stats)
    assert grid.tolist() == rows["image_grid_thw"].tolist()
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
