"""patchify on nothing at all and on what it refuses."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_patchify import pixels, weights
from vlmops.ops import patchify
from vlmops.ops.patchify import convolve


def test_no_images():
    w, b = weights(grad=True)
    tokens, grid = patchify([], w, b, patch_size=4, position=torch.empty(0, 32))
    assert (tokens.shape, grid.shape) == ((0, 32), (0, 3))
    tokens, grid = patchify(pixels(0, 3, 8, 8), w, b, patch_size=4)
    assert (tokens.shape, grid.shape) == ((0, 32), (0, 3))
    tokens.sum().backward()
    assert not w.grad.any()
    empty, grid = torch.empty(0, 48), torch.empty(0, 3, dtype=torch.int64)
    assert patchify(empty, w, patch_size=4, grid_thw=grid)[0].shape == (0, 32)


BAD = {
    "size": (dict(images=pixels(1, 3, 9, 8)), "images: expected height and width to be multiples of 4, got 9x8"),
    "merge size": (dict(images=pixels(1, 3, 12, 8), order="merge2x2"), "multiples of 8, got 12x8"),
    "channels": (dict(images=pixels(1, 4, 8, 8)), "expected 3 channels"),
    "frames": (dict(images=pixels(1, 0, 3, 8, 8)), "expected at least one frame"),
    "rank": (dict(images=pixels(8)), r"images: expected \[n, C, H, W\]"),
    "type": (dict(images="cat.png"), "images: expected a tensor or a list"),
    "list entry": (dict(images=[pixels(3, 8, 8), pixels(8, 8)]), r"images\[1\]: expected \[C, H, W\]"),
    "list type": (dict(images=[3]), r"images\[0\]: expected a tensor"),
    "list size": (dict(images=[pixels(3, 8, 8), pixels(3, 8, 9)]), r"images\[1\]: expected height and width"),
    "list channels": (dict(images=[pixels(1, 8, 8)]), r"images\[0\]: expected 3 channels"),
    "list dtypes": (dict(images=[pixels(3, 8, 8), torch.rand(3, 8, 8)]), r"images\[1\]: expected uint8"),
    "list grid": (dict(images=[pixels(3, 8, 8)], grid_thw=torch.tensor([[1, 2, 2]])), "grid_thw: only for flattened"),
    "integer": (dict(images=pixels(1, 3, 8, 8).int()), "images: expected uint8"),
    "device": (dict(images=torch.rand(1, 3, 8, 8, device="meta")), "images: expected on cpu"),
    "order": (dict(order="hilbert"), "order: expected"),
    "patch": (dict(patch_size=0), "patch_size: expected at least 1"),
    "weight": (dict(weight=torch.randn(32, 7)), "weight: expected rows of"),
    "weight rank": (dict(weight=torch.randn(32, 3, 16)), r"weight: expected \[E, C, 4, 4\]"),
    "weight kernel": (dict(weight=torch.randn(32, 3, 4, 2)), r"weight: expected \[E, C, 4, 4\]"),
    "weight frames": (dict(temporal_patch_size=2), r"weight: expected \[E, C, 2, 4, 4\]"),
    "weight dtype": (dict(weight=torch.ones(32, 3, 4, 4, dtype=torch.int32)), "weight: expected a floating-point"),
    "mean": (dict(mean=[0.1, 0.2]), "mean: expected 3 values"),
    "std": (dict(std=[0.1, 0.2, 0.0]), "std: expected 3 values, none zero"),
    "bias": (dict(bias=torch.randn(31)), "bias: expected shape"),
    "position": (dict(position=torch.randn(3, 32)), "position: expected"),
    "position rank": (dict(position=torch.randn(32)), "position: expected 2 dimensions"),
    "position of unequal": (
        dict(images=[pixels(3, 8, 8), pixels(3, 4, 8)], position=torch.randn(4, 32)),
        r"position: expected \[6, 32\]",
    ),
    "no grid": (dict(images=torch.randn(4, 48)), "grid_thw: needed"),
    "grid sum": (
        dict(images=torch.randn(4, 48), grid_thw=torch.tensor([[1, 2, 3]])),
        "expected 4 patches in all, got 6",
    ),
    "grid dtype": (dict(images=torch.randn(4, 48), grid_thw=torch.ones(1, 3)), "grid_thw: expected integers"),
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


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((2, 3, 8, 12), (4, 4)), ((5, 3, 2, 4, 4), (2, 4, 4)), ((2, 3, 4, 8, 12), (2, 4, 4)), ((0, 3, 8, 8), (4, 4))],
)
def test_convolve_is_the_convolution(shape, kernel):
    torch.manual_seed(0)
    images, weight, bias = torch.randn(shape), torch.randn(6, 3, *kernel), torch.randn(6)
    function = torch.nn.functional.conv2d if len(kernel) == 2 else torch.nn.functional.conv3d
    want = function(images, weight, bias, stride=kernel).movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(convolve(images, weight, bias), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 8, 12), (2, 3, 9, 12), (2, 3, 8, 13)])
def test_convolve_refuses_what_does_not_fit(shape):
    with pytest.raises(ValueError, match="expected 3 channels and multiples of"):
        convolve(torch.randn(shape), torch.randn(6, 3, 4, 4))
