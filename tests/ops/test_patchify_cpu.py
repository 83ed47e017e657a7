"""patchify's native pass: every instruction set, folded weights, arguments it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import vlmops
from tests.ops.test_patchify import DTYPES, STATS, check, pixels, plain, weights
from tests.support.tolerance import assert_close_to_oracle
from vlmops.backends import native
from vlmops.ops import patchify
from vlmops.ops._shared.gemm_cpu import widened
from vlmops.ops._shared.packing import STORE
from vlmops.ops._shared.registry import OPS

ISAS = ["generic", "neon", "avx2", "avx512", "avx512_bf16"]


def sweep():
    """The native kernels over patch sizes around every vector length, all pixel types, orders and memory layouts."""
    torch.manual_seed(0)
    for p in (1, 3, 4, 8, 14, 16, 17, 33):
        for dtype in DTYPES:
            for c, raw in ((3, True), (3, False), (4, True)):
                w = torch.randn(16, c * 2 * p * p) / p
                options = dict(
                    patch_size=p, temporal_patch_size=2, dtype=dtype, mean=[0.5, 0.4, 0.3, 0.2][:c], std=[0.2] * c
                )
                if w.shape[1] < 16:
                    continue
                images = pixels(1, 1, c, 4 * p, 2 * p, raw=raw)
                for last in (False, True):
                    check(images, w, order="merge2x2", channels_last=last, **options)
                    hwc = images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
                    check(hwc, w, channels_last=last, **options)
                    rows, grid = pixels(3, w.shape[1], raw=raw), torch.tensor([[1, 1, 3]])
                    check(rows, w, channels_last=last, grid_thw=grid, **options)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    if ISAS.index(isa) > ISAS.index(native.isa()) or ((isa == "neon") != (native.isa() == "neon") and isa != "generic"):
        pytest.skip("not on this CPU")
    code = "from tests.ops.test_patchify_cpu import native, sweep; sweep(); print(native.isa())"
    env = {**os.environ, "VLMOPS_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_still_images_meet_the_sum_of_the_frames_weights(dtype, channels_last):
    """float32 products: half the work. Not in bfloat16 products: rounding the sum of the weights is not torch's result."""
    w = torch.nn.Parameter(torch.randn(32, 96, dtype=dtype) * 0.2)
    options = dict(patch_size=4, temporal_patch_size=2, channels_last=channels_last, **STATS)

    def same(images):
        with torch.no_grad(), vlmops.use_backend("cpu"):
            out = patchify(images, w, **options)[0]
        with torch.no_grad():
            oracle = plain(images, w.double(), **options)
            assert_close_to_oracle(out, plain(images, w, **options), oracle)

    def folded():
        return [key for key in STORE._entries if key[0] == id(w) and "folded" in str(key[1])]

    same([pixels(3, 8, 8), pixels(2, 3, 8, 8)])  # one that moves
    assert not folded()
    for images in (pixels(1, 3, 8, 8), [pixels(3, 8, 8), pixels(1, 3, 4, 8)]):
        same(images)
    assert bool(folded()) == (dtype == torch.float32 or widened(dtype))
    with torch.no_grad():
        w.mul_(2)
    same(pixels(1, 3, 8, 8))  # a changed weight is folded anew


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_folding_weights_is_no_less_accurate(dtype):
    """At Qwen2-VL's width: against the same product without folding (the same picture as two frames), and by the rule.

    Plain torch's product is no measure of the fold in float32: MKL adds up more exactly than oneDNN's packed product.
    """
    folded, whole = [], []
    options = dict(patch_size=14, temporal_patch_size=2, **STATS)
    for seed in range(4):
        torch.manual_seed(seed)
        w, images = (torch.randn(64, 3, 2, 14, 14) * 0.03).to(dtype), pixels(1, 1, 3, 112, 112)
        oracle = plain(images, w.double(), **options)
        with torch.no_grad(), vlmops.use_backend("cpu"):
            out = patchify(images, w, **options)[0]
            whole.append((patchify(images.repeat(1, 2, 1, 1, 1), w, **options)[0] - oracle).abs().mean())
        folded.append((out - oracle).abs().mean())
        assert_close_to_oracle(out, plain(images, w, **options), oracle)
    assert sum(folded) <= 1.01 * sum(whole)


def test_one_tuning_key_serves_near_picture_sizes():
    op = OPS["patchify"]
    w, _ = weights(p=14)

    def key(h, w_):
        args = pixels(1, 1, 3, h, w_), None, w, None, None, [], [], 14, 1, "raster", False, h * w_ // 196, True
        return op._bucketed_key(args)

    assert key(14 * 40, 14 * 50) == key(14 * 41, 14 * 48)
    assert key(14 * 40, 14 * 50) != key(14 * 4, 14 * 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(images=pixels(239)), "sizes: more than"),
        (dict(images=pixels(241)), "sizes: expected 241 pixels"),
        (dict(sizes=torch.tensor([[1, 8, 8, 0], [1, 4, 5, 1]])), "multiples of the patch"),
        (dict(sizes=torch.tensor([[1, 8, 8], [1, 4, 4]])), "sizes: expected contiguous int64"),
        (dict(sizes=None), "images: expected"),
        (dict(sizes=torch.tensor([[-1, 8, 8, 0]])), "multiples of the patch"),
        (dict(first=3, last=6), "first, last"),
        (dict(mean=[0.5]), "mean, std: expected 3"),
        (dict(merge=True), "even grid"),
        (dict(channels=0), "patch_size: expected"),
    ],
)
def test_the_native_pass_checks_its_arguments(change, message):
    """It reads nothing outside the pixels, whatever the sizes say."""
    args = dict(
        images=pixels(240), sizes=torch.tensor([[1, 8, 8, 0], [1, 4, 4, 1]]), channels=3, mean=[], std=[], patch_size=4,
        temporal_patch_size=1, merge=False, channels_last=False, first=0, last=-1, dtype=torch.float32,
    )  # fmt: skip
    native.load()
    whole = torch.ops.vlmops_cpu.patch_rows(**args)
    assert torch.equal(torch.ops.vlmops_cpu.patch_rows(**{**args, "first": 1, "last": 5}), whole[1:5])
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.vlmops_cpu.patch_rows(**{**args, **change})
