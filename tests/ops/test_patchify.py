"""patchify: every input form and backend against the oracle, torch's convolutions, transformers' processors, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("order", ["raster", "merge2x2"])
def test_images(backend, dtype, raw, order):
    w, b = weights()
    images = pixels(2, 3, 8, 16, raw=raw)
    options = dict(patch_size=4, order=order, **STATS)
    check_op(tokens_of, (images, w, b), options, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_videos_repeat_their_last_frame(backend, frames):
    w, b = weights(t=2)
    images = pixels(2, frames, 3, 8, 8)
    check_op(
        tokens_of,
        (images, w, b),
        dict(patch_size=4, temporal_patch_size=2, **STATS),
        backend=backend,
        dtype=torch.float32,
    )
    _, grid = patchify(images, w, b, patch_size=4, temporal_patch_size=2)
    assert grid.tolist() == [[-(-frames // 2), 2, 2]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_flattened(backend, dtype):
    w, b = weights(t=2)
    rows, grid = torch.randn(24, 96), torch.tensor([[1, 4, 4], [2, 2, 2]])
    check_op(
        tokens_of, (rows, w, b), dict(patch_size=4, temporal_patch_size=2, grid_thw=grid), backend=backend, dtype=dtype
    )
    out, same = patchify(rows, w, b, patch_size=4, temporal_patch_size=2, grid_thw=grid)
    assert same is grid
    torch.testing.assert_close(out, rows @ w.flatten(1).T + b)


def test_flattened_rows_are_normalised_by_channel():
    w, b = weights()
    rows = pixels(4, 48)
    options = dict(patch_size=4, grid_thw=torch.tensor([[1, 2, 2]]), **STATS)
    check_op(tokens_of, (rows, w, b), options, backend="torch", dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [True, False])
def test_mixed_sizes(backend, raw):
    w, b = weights()
    images = [pixels(3, 8, 12, raw=raw), pixels(3, 4, 4, raw=raw), pixels(2, 3, 12, 4, raw=raw)]
    position = torch.randn(6 + 1 + 6, 32)
    with vlmops.use_backend(backend), torch.no_grad():
        tokens, grid = patchify(images, w, b, patch_size=4, position=position, **STATS)
    assert grid.tolist() == [[1, 2, 3], [1, 1, 1], [2, 3, 1]]
    with vlmops.use_backend("reference"):
        one = [patchify(x[None], w, b, patch_size=4, **STATS)[0] for x in images]
    torch.testing.assert_close(tokens, torch.cat(one) + position, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_order(backend):
    w = torch.randn(32, 48)
    images = pixels(2, 3, 8, 8, raw=False)
    check_op(
        tokens_of, (images, w), dict(patch_size=4, channels_last=True, **STATS), backend=backend, dtype=torch.float32
    )
    rows = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(8, 48)
    torch.testing.assert_close(patchify(images, w, patch_size=4, channels_last=True)[0], rows @ w.T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [4, 8])
def test_position(backend, rows):
    w, b = weights()
    check_op(
        tokens_of,
        (pixels(2, 3, 8, 8), w, b),
        dict(patch_size=4, position=torch.randn(rows, 32)),
        backend=backend,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_cropped_images(backend):
    w, b = weights()
    whole = pixels(2, 3, 20, 30, raw=False)
    for images in (
        whole[:, :, 2:10, 3:11],
        whole.transpose(2, 3)[:, :, :8, :8],
        whole.permute(0, 2, 3, 1)[:, :8, :8].permute(0, 3, 1, 2),
    ):
        check_op(tokens_of, (images, w, b), dict(patch_size=4), backend=backend, dtype=torch.float32)
    with vlmops.use_backend(backend), torch.no_grad():
        cropped, grid = patchify(whole, w, b, patch_size=4, order="merge2x2", crop=True)
    assert grid.tolist() == [[1, 4, 6]] * 2
    want = patchify(whole[:, :, :16, :24], w, b, patch_size=4, order="merge2x2")[0]
    torch.testing.assert_close(cropped, want, atol=1e-5, rtol=1e-5)


@given(
    n=st.integers(0, 2), t=st.integers(1, 3), gh=st.integers(1, 3), gw=st.integers(1, 3), p=st.integers(1, 17),
    frames=st.integers(1, 2), c=st.integers(1, 4), merge=st.booleans(), raw=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_random_shapes(n, t, gh, gw, p, frames, c, merge, raw):
    k = 2 if merge else 1
    images = pixels(n, t, c, gh * p * k, gw * p * k, raw=raw)
    w = torch.randn(16, c * frames * p * p) * 0.2
    options = dict(
        patch_size=p, temporal_patch_size=frames, order="merge2x2" if merge else "raster", mean=[0.4] * c, std=[0.3] * c
    )
    for backend in ["torch", *(["cpu"] if images.numel() and w.shape[1] >= 16 else [])]:
        check_op(tokens_of, (images, w), options, backend=backend, dtype=torch.float32)


def test_gradients():
    w, b = weights(t=2, grad=True)
    images = pixels(1, 3, 3, 8, 8, raw=False).requires_grad_()
    position = torch.randn(8, 32, requires_grad=True)
    check_op(
        tokens_of,
        (images, w, b),
        dict(patch_size=4, temporal_patch_size=2, position=position, **STATS),
        backend="torch",
        dtype=torch.float32,
    )


def test_gradcheck_of_the_reference():
    w = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    images = torch.rand(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, w: tokens_of(x, w, patch_size=2, mean=[0.5], std=[0.2], order="merge2x2"), (images, w)
        )


def test_opcheck_and_compile():
    w, b = weights(grad=True)
    images = pixels(2, 1, 3, 8, 8, raw=False)
    opcheck(
        torch.ops.vlmops.patchify.default,
        (images, w, b, None, [0.4] * 3, [0.2] * 3, 4, 1, "raster", False, False, "torch"),
    )
    fn = torch.compile(lambda x: tokens_of(x, w, b, patch_size=4).square().sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(images), tokens_of(images, w, b, patch_size=4).square().sum())


def test_autocast():
    w, b = weights(grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tokens_of(pixels(1, 3, 8, 8), w, b, patch_size=4).dtype == torch.bfloat16


def test_equals_torch_convolutions():
    w, b = weights()
    images = pixels(2, 3, 8, 12, raw=False)
    torch.testing.assert_close(
        tokens_of(images, w, b, patch_size=4),
        F.conv2d(images, w, b, stride=4).flatten(2).transpose(1, 2).reshape(12, 32),
    )
    w, b = weights(t=2)
    video = pixels(1, 4, 3, 8, 8, raw=False)
    want = F.conv3d(video.transpose(1, 2), w, b, stride=(2, 4, 4)).flatten(2).transpose(1, 2).reshape(8, 32)
    torch.testing.assert_close(tokens_of(video, w, b, patch_size=4, temporal_patch_size=2), want)


def test_equals_qwen2_vl_processor():
    """Raw pixels in, the same tokens as transformers' processor followed by its patch embedding."""
    from PIL import Image
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (84, 56, 3), dtype=np.uint8))
    processor = processing.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=10**6)
    rows = processor(picture, return_tensors="pt")
    w = torch.randn(32, 3, 2, 14, 14) * 0.1
    want = rows["pixel_values"] @ w.flatten(1).T
    image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
    got, grid = patchify(
        image,
        w,
        patch_size=14,
        temporal_patch_size=2,
        mean=processor.image_mean,
        std=processor.image_std,
        order="merge2x2",
    )
    assert grid.tolist() == rows["image_grid_thw"].tolist()
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = (
        "import torch, vlmops; from vlmops.ops import patchify; torch.manual_seed(0)\n"
        "for p in (4, 14, 16, 17):\n"
        "  for dt in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    x = torch.randint(0, 256, (1, 3, 4 * p, 2 * p), dtype=torch.uint8); w = (torch.randn(32, 3, p, p) * 0.05).to(dt)\n"
        "    o = dict(patch_size=p, mean=[.5, .4, .3], std=[.2, .3, .4], order='merge2x2')\n"
        "    with torch.no_grad():\n"
        "      with vlmops.use_backend('cpu'): got = patchify(x, w, **o)[0]\n"
        "      with vlmops.use_backend('torch'): want = patchify(x, w, **o)[0]\n"
        "    torch.testing.assert_close(got, want, atol=4e-2 if dt == torch.bfloat16 else 5e-3, rtol=2e-2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "VLMOPS_CPU_ISA": isa}
    )
    assert done.returncode == 0, done.stderr


def test_no_images():
    w, b = weights()
    tokens, grid = patchify([], w, b, patch_size=4)
    assert tokens.shape == (0, 32)
    assert grid.shape == (0, 3)
    tokens, _ = patchify(pixels(0, 3, 8, 8), w, b, patch_size=4)
    assert tokens.shape == (0, 32)


BAD = {
    "size": (dict(images=pixels(1, 3, 9, 8)), "multiples of 4, got 9x8"),
    "merge size": (dict(images=pixels(1, 3, 12, 8), order="merge2x2"), "multiples of 8, got 12x8"),
    "channels": (dict(images=pixels(1, 4, 8, 8)), "expected 3 channels"),
    "rank": (dict(images=pixels(8)), r"images: expected \[n, C, H, W\]"),
    "type": (dict(images="cat.png"), "images: expected a tensor or a list"),
    "list entry": (dict(images=[pixels(8, 8)]), r"images\[0\]: expected \[C, H, W\]"),
    "integer": (dict(images=pixels(1, 3, 8, 8).int()), "images: expected uint8"),
    "order": (dict(order="hilbert"), "order: expected"),
    "patch": (dict(patch_size=0), "patch_size: expected at least 1"),
    "weight": (dict(weight=torch.randn(32, 7)), "weight: expected rows of"),
    "mean": (dict(mean=[0.1, 0.2]), "mean: expected 3 values"),
    "std": (dict(std=[0.1, 0.2, 0.0]), "std: expected 3 values, none zero"),
    "bias": (dict(bias=torch.randn(31)), "bias: expected shape"),
    "position": (dict(position=torch.randn(3, 32)), "position: expected"),
    "no grid": (dict(images=torch.randn(4, 48)), "grid_thw: needed"),
    "grid sum": (
        dict(images=torch.randn(4, 48), grid_thw=torch.tensor([[1, 2, 3]])),
        "expected 4 patches in all, got 6",
    ),
    "grid": (dict(grid_thw=torch.tensor([[1, 2, 2]])), "grid_thw: only for flattened"),
    "flat width": (dict(images=torch.randn(4, 47), grid_thw=torch.tensor([[1, 2, 2]])), r"images: expected \[N, 48\]"),
    "channels_last": (dict(channels_last=True), "expected flat"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    w, b = weights()
    change, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        patchify(**{**dict(images=pixels(1, 3, 8, 8), weight=w, bias=b, patch_size=4), **change})
