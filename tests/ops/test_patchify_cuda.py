"""The CUDA patchify on the SIMT machine: every form of images, weights and options; work, traffic, plans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops import test_patchify as base
from tests.ops.test_patchify import STATS, pixels, tokens_of, weights
from tests.support.cuda_machine import DTYPES, check_on_machine, counted, simt
from tests.support.ops import opcheck, to_dtype
from tests.support.tolerance import assert_close_to_oracle
from vlmops.backends import cuda_runtime
from vlmops.ops import patchify
from vlmops.ops.patchify import convolve
from vlmops.ops.patchify import cuda as backend
from vlmops.ops.patchify.cost import cost

__all__ = ["simt"]

BF16, FP16, FP32, U8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8


def check(images, weight, bias=None, *, dtype=BF16, **options):
    base.check(images, weight, bias, backend="cuda", dtype=dtype, **options)


def turned(x):
    """[..., C, H, W] whose memory runs (H, W, C)."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def as_it_is(images, weight, bias=None, **options):
    """Without a change of dtype or strides, which ``check`` would make."""
    with vlmops.use_backend("cuda"):
        out = tokens_of(images, weight, bias, **options)
    wide = images.double() / 255 if images.dtype == U8 else images.double()
    with vlmops.use_backend("reference"):
        oracle = tokens_of(wide, *to_dtype((weight, bias), torch.float64), **to_dtype(options, torch.float64))
    assert_close_to_oracle(out, base.plain(images, weight, bias, **options), oracle)


# -- types and forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("pixel", [U8, *DTYPES])
def test_every_pair_of_types(pixel, weight):
    """Floating pixels without statistics: those of the weight's own type are copied as they are."""
    images = pixels(2, 3, 8, 12, raw=pixel == U8).to(pixel)
    w, b = (x.to(weight) for x in weights(p=4))
    as_it_is(images, w, b, patch_size=4, **(STATS if pixel == U8 else {}))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("patch", [14, 16, 7])
def test_patches_of_models(patch, dtype):
    """Several steps through a patch vector, whole and with a rest; 12 tokens."""
    check(pixels(1, 3, 3 * patch, 4 * patch), *weights(p=patch), dtype=dtype, patch_size=patch, **STATS)


@pytest.mark.parametrize("statistics", [dict(mean=[0.5]), dict(std=[0.2, 0.3, 0.4]), STATS])
@pytest.mark.parametrize("raw", [True, False])
def test_statistics(statistics, raw):
    check(pixels(1, 3, 8, 8, raw=raw), *weights(), patch_size=4, **statistics)


@pytest.mark.parametrize("c", [1, 2, 6])
def test_channels(c):
    """Statistics in registers, and of more than four channels in memory."""
    mean, std = [0.1 * (i + 1) for i in range(c)], [0.2 + 0.1 * i for i in range(c)]
    check(pixels(2, c, 8, 8), *weights(c=c), patch_size=4, mean=mean, std=std)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_videos_repeat_their_last_frame(frames, dtype):
    check(pixels(2, frames, 3, 8, 8), *weights(t=2), dtype=dtype, patch_size=4, temporal_patch_size=2, **STATS)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_blocks_of_two_by_two(dtype):
    for images in (pixels(2, 3, 8, 24), pixels(1, 3, 24, 8)):
        check(images, *weights(), dtype=dtype, patch_size=4, order="merge2x2", **STATS)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_flattened(dtype):
    w, b = weights(t=2)
    options = dict(dtype=dtype, patch_size=4, temporal_patch_size=2, grid_thw=torch.tensor([[1, 4, 4], [2, 2, 2]]))
    check(torch.randn(24, 96), w, b, **options)
    check(pixels(24, 96), w, b, **options, **STATS)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_flattened_rows_are_normalised_by_channel(p, channels_last):
    """8 neighbours are of one channel, or of three."""
    w = torch.randn(16, 3 * 2 * p * p)
    options = dict(patch_size=p, temporal_patch_size=2, channels_last=channels_last, **STATS)
    for rows in (pixels(8, w.shape[1]), torch.rand(8, 2 * w.shape[1])[:, ::2]):
        as_it_is(rows, w.to(BF16), grid_thw=torch.tensor([[1, 2, 4]]), **options)


LISTS = {
    "planar": lambda x, i: x,
    "interleaved": lambda x, i: turned(x),
    "mixed": lambda x, i: turned(x) if i % 2 else x,
}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("memory", LISTS)
def test_mixed_sizes(memory, dtype):
    sizes = [(3, 8, 12), (3, 4, 4), (3, 3, 12, 4), (3, 4, 8), (2, 3, 4, 4)]
    images = [LISTS[memory](pixels(*size), i) for i, size in enumerate(sizes)]
    w, b = weights(t=2)
    check(images, w, b, dtype=dtype, patch_size=4, temporal_patch_size=2, **STATS)


def test_mixed_sizes_in_blocks():
    images = [pixels(3, *size) for size in ((8, 16), (16, 8), (24, 8))]
    check(images, *weights(), patch_size=4, order="merge2x2", position=torch.randn(28, 32), **STATS)


def test_images_without_a_patch_are_passed_over():
    images = [pixels(3, *size) for size in ((3, 9), (8, 8), (2, 2), (9, 3), (5, 11), (1, 1))]
    check(images, *weights(), patch_size=4, crop=True, **STATS)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("memory", [lambda x: x, turned])
@pytest.mark.parametrize("listed", [False, True])
def test_channels_last_order(listed, memory, c):
    w, images = torch.randn(32, 16 * c) * 0.2, memory(pixels(2, c, 8, 8))
    check(list(images) if listed else images, w, patch_size=4, channels_last=True, mean=[0.4], std=[0.3])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("all_tokens", [False, True])
def test_position(all_tokens, dtype):
    """Rows of a wider table; of one image or of all."""
    position = torch.randn(12 if all_tokens else 6, 64)[:, 32:]
    check(pixels(2, 3, 8, 12), *weights(), dtype=dtype, patch_size=4, position=position, **STATS)
    check(pixels(2, 3, 4, 4), weights()[0], patch_size=4, position=torch.randn(1, 32), **STATS)


# -- layouts -------------------------------------------------------------------------------------------------------------

VIEWS = {
    "cropped": lambda x: x[:, :, 2:10, 3:11],
    "cropped to whole accesses": lambda x: x[:, :, 2:10, 4:12],
    "transposed": lambda x: x.transpose(2, 3)[:, :, :8, :8],
    "channels last": lambda x: turned(x)[:, :, :8, :8],
    "one image for all": lambda x: x[:1, :, :8, :8].expand(3, -1, -1, -1),
    "every second column": lambda x: x[..., :8, :16:2],
}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("view", VIEWS)
def test_strided_images(view, dtype):
    images = VIEWS[view](pixels(2, 3, 20, 32))
    assert not images.is_contiguous()
    as_it_is(images, *(x.to(dtype) for x in weights()), patch_size=4, **STATS)


@pytest.mark.parametrize("layout", ["channels-last memory", "columns of another", "transposed"])
def test_strided_weights(layout):
    w = weights()[0].to(BF16)
    views = {
        "channels-last memory": turned(w),
        "columns of another": torch.cat([w.flatten(1)] * 2, 1)[:, :48].view(w.shape),
        "transposed": w.flatten(1).t().contiguous().t().view(w.shape),
    }
    assert views[layout].stride() != w.stride()
    as_it_is(pixels(1, 3, 8, 8), views[layout], patch_size=4, **STATS)


@pytest.mark.parametrize("odd", ["images", "weight", "bias", "position"])
def test_a_base_address_between_accesses(odd):
    shapes = dict(images=(1, 3, 8, 8), weight=(32, 3, 4, 4), bias=(32,), position=(4, 32))
    parts = {}
    for name, shape in shapes.items():
        first = int(name == odd)
        parts[name] = torch.randn(torch.Size(shape).numel() + first).to(BF16)[first:].view(shape)
    assert parts[odd].data_ptr() % 16 == 2
    position = parts.pop("position")
    as_it_is(*parts.values(), patch_size=4, position=position)


# -- tiles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "e", "tile"), [(7, 40, "SMALL"), (19, 256, "MIDDLE"), (33, 512, "WIDE"), (33, 500, "WIDE")]
)
def test_every_tile(n, e, tile):
    """More than one tile each way, with parts of tiles at the ends."""
    images = pixels(n, 3, 12, 20)
    w, b = weights(e=e)
    assert backend.tile_of(15 * n, e, cuda_runtime.SIMT.processors) == getattr(backend, tile)
    check(images, w, b, patch_size=4, position=torch.randn(15, e), **STATS)


def test_float_tiles():
    w, b = weights(e=70)
    check([pixels(3, 28, 36), pixels(3, 4, 16)], w, b, dtype=FP32, patch_size=4, **STATS)


@pytest.mark.parametrize("k", [6, 9, 12])
def test_every_width_of_a_weight(k):
    """2, 1 and 4 elements an access; 8 everywhere else."""
    grid = torch.tensor([[1, 1, 9]])
    check(torch.randn(9, k), torch.randn(70, k), patch_size=1, grid_thw=grid)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_every_schedule(dtype):
    w, b = weights(e=72, p=14)
    images = [pixels(3, 28, 42), pixels(3, 14, 98), pixels(3, 56, 182)]
    check_on_machine(tokens_of, (images, w, b), dict(patch_size=14, **STATS), dtype)
    check_on_machine(tokens_of, (pixels(2, 3, 32, 80, raw=False), *weights(p=16)), dict(patch_size=16), dtype)


@given(
    n=st.integers(0, 3), gh=st.integers(1, 3), gw=st.integers(1, 5), e=st.integers(1, 90), t=st.integers(1, 3),
    form=st.sampled_from(["stack", "list", "channels last"]), bias=st.booleans(), position=st.booleans(),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_any_shape(n, gh, gw, e, t, form, bias, position):
    images = pixels(n, t, 3, 8 * gh, 8 * gw)
    images = turned(images) if form == "channels last" else list(images) if form == "list" else images
    w, b = weights(e=e, t=2)
    table = torch.randn(-(-t // 2) * 4 * gh * gw, e) if position and n else None
    options = dict(patch_size=4, temporal_patch_size=2, order="merge2x2", position=table, **STATS)
    check(images, w, b if bias else None, **options)


def test_no_images():
    w, b = weights()
    with vlmops.use_backend("cuda"):
        for images, options in (
            ([], {}),
            (pixels(0, 3, 8, 8), {}),
            (torch.empty(0, 48), dict(grid_thw=torch.empty(0, 3, dtype=torch.int64))),
        ):
            assert patchify(images, w, b, patch_size=4, **options)[0].shape == (0, 32)
        assert patchify(pixels(1, 3, 4, 4), w[:0], patch_size=4)[0].shape == (1, 0)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_nan_stays_in_its_patch(dtype):
    w = weights()[0].to(dtype)
    images = pixels(1, 3, 8, 8, raw=False)
    images[0, 1, 5, 5] = float("nan")
    with vlmops.use_backend("cuda"):
        out = patchify(images, w, patch_size=4, **STATS)[0]
    assert out.isnan().all(1).tolist() == [False, False, False, True] and out[:3].isfinite().all()


def test_gradients_are_those_of_torch():
    check(pixels(2, 3, 8, 8, raw=False).requires_grad_(), *weights(grad=True), patch_size=4, **STATS)


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (5, 3, 2, 4, 4), (2, 3, 4, 8, 12)])
def test_convolve(shape):
    kernel = (4, 4) if len(shape) == 4 else (2, 4, 4)
    images, weight, bias = torch.randn(shape), torch.randn(6, 3, *kernel), torch.randn(6)
    function = torch.nn.functional.conv2d if len(kernel) == 2 else torch.nn.functional.conv3d
    want = function(images, weight, bias, stride=kernel).movedim(1, -1).reshape(-1, 6)
    with vlmops.use_backend("cuda"):
        torch.testing.assert_close(convolve(images, weight, bias), want, atol=1e-4, rtol=1e-4)


def test_opcheck():
    images, sizes = pixels(192), torch.tensor([[1, 8, 8, 0]])
    w, b = weights(grad=True)
    args = (images, sizes, w, b, None, STATS["mean"], STATS["std"], 4, 1, "merge2x2", False, 4, False, "cuda")
    opcheck(torch.ops.vlmops.patchify.default, args)


def test_what_is_refused():
    w = weights()[0]
    for images, weight in ((torch.rand(1, 3, 4, 4, dtype=torch.float64), w), (pixels(1, 3, 4, 4), w.double())):
        with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match="float64"):
            patchify(images, weight, patch_size=4)
    many = torch.zeros(1, 1, dtype=BF16).expand(2**31, 1)
    rest = (None, None, [], [], 1, 1, "raster", False)
    assert "at most" in backend.supports(many, None, torch.zeros(1, 1, dtype=BF16), *rest, 2**31, True)


# -- plans, work and traffic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "e", "tile"),
    [(576, 1024, "SMALL"), (4608, 1024, "WIDE"), (4608, 1152, "MIDDLE"), (2304, 1024, "MIDDLE"), (9216, 1280, "WIDE")],
)
def test_tiles_by_shape(m, e, tile):
    """1152 columns would pad four and a half wide tiles."""
    assert backend.tile_of(m, e, 108) == getattr(backend, tile)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_plans(arch):
    """Meta tensors of more than 2^31 pixels: one launch each, the widest accesses the layout allows."""
    meta = dict(device="meta")
    w14, w16 = (torch.empty(1024, 3 * p * p, dtype=BF16, **meta) for p in (14, 16))
    stats = (STATS["mean"], STATS["std"])
    images = torch.empty(8192, 1, 3, 336, 336, dtype=U8, **meta)
    sizes = torch.tensor([[1, 1024, 1 << 20, 0], [1, 64, 64, 0]])
    with cuda_runtime.record(cuda_runtime.TARGETS[arch]) as plans:
        backend.forward(images, None, w14, None, None, *stats, 14, 1, "raster", False, 8192 * 576, True)
        backend.forward(images, None, w16, None, None, *stats, 16, 1, "raster", False, 8192 * 441, True)
        flat = torch.empty(3 * ((1 << 30) + 4096), dtype=U8, **meta)
        backend.forward(flat, sizes, w16, None, None, *stats, 16, 1, "merge2x2", False, (1 << 22) + 16, True)
        rows = torch.empty(1 << 21, 1176, dtype=BF16, **meta)
        weight = torch.empty(1280, 1176, dtype=BF16, **meta)
        backend.forward(rows, None, weight, None, None, [], [], 14, 2, "raster", False, 1 << 21, True)
    found = [dict(plan.defines) for plan in plans]
    assert [d["WIDE"] for d in found] == [2, 8, 8, 8] and [d["VEC"] for d in found] == [4, 8, 8, 8]
    assert all(d["BN"] == 256 for d in found) and found[2]["FORM"] == "buffer" and found[3]["FORM"] == "rows"


#: What is counted: images, weight's patch, sectors read over the least for the width of the accesses. Lines of 14 pixels
#: and rows of 1176 elements begin between sectors.
TRAFFIC = {
    "uint8 of 16": (lambda: pixels(1, 3, 128, 128), 16, 1, 1.0),
    "bfloat16 of 16": (lambda: pixels(1, 3, 128, 128, raw=False).to(BF16), 16, 1, 1.0),
    "uint8 of 14": (lambda: pixels(1, 3, 112, 112), 14, 1, 1.8),
    "bfloat16 of 14": (lambda: pixels(1, 3, 112, 112, raw=False).to(BF16), 14, 1, 1.6),
    "Qwen's rows": (lambda: torch.rand(64, 1176).to(BF16), 14, 2, 1.26),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_traffic_and_work_of_tiles(case):
    """One tile of tokens and columns: everything is read once, and only the columns' bias again, from the L1 cache."""
    make, p, frames, sectors = TRAFFIC[case]
    images, w = make(), weights(64, p=p, t=frames)[0].to(BF16)
    bias = weights(64)[1].to(BF16)
    options = dict(patch_size=p, temporal_patch_size=frames, **(STATS if images.dtype == U8 else {}))
    if images.dim() == 2:
        options["grid_thw"] = torch.tensor([[1, 8, 8]])
    with counted() as seen:
        patchify(images, w, bias, **options)
    least = cost(images, None, w, bias, None, [], [], p, frames, "raster", False, 64, True)
    k = w[0].numel()
    assert seen["mma_flops"] == least.flops * (-(-k // 32) * 32) // k
    assert seen["global_load_unique_bytes"] == least.read and seen["global_store_bytes"] == least.written
    assert seen["global_load_bytes"] <= 1.03 * least.read
    assert seen["global_load_sectors"] <= sectors * seen["global_load_sectors_least"]
    assert seen["global_store_sectors"] * 32 == least.written
    assert seen["shared_wavefronts"] <= 1.01 * seen["shared_wavefronts_least"]


def test_traffic_of_many_tiles():
    """Pixels once for every tile of columns, the weight once for every tile of tokens: what L2 serves; from memory, once."""
    images, w = pixels(8, 3, 128, 128), weights(512, p=16)[0].to(BF16)
    with counted() as seen:
        patchify(images, w, patch_size=16, **STATS)
    args = (images, None, w, None, None, [], [], 16, 1, "raster", False, 512, True)
    tile = backend.tile_of(512, 512, cuda_runtime.SIMT.processors)
    assert tile == backend.WIDE
    tiled = cost(*args, block_m=tile.bm, block_n=tile.bn)
    assert seen["global_load_bytes"] == tiled.read == seen["global_load_sectors"] * 32
    assert seen["global_load_unique_bytes"] == cost(*args).read
    assert seen["mma_flops"] == tiled.flops and seen["global_store_sectors"] * 32 == tiled.written
    assert seen["shared_wavefronts"] <= 1.01 * seen["shared_wavefronts_least"]


def test_traffic_of_float_tiles():
    images, w = pixels(1, 3, 128, 128), weights(64, p=16)[0]
    with counted() as seen:
        patchify(images, w, patch_size=16, **STATS)
    least = cost(images, None, w, None, None, [], [], 16, 1, "raster", False, 64, True)
    assert seen["global_load_bytes"] == least.read and seen["mma_flops"] == 0
    assert seen["global_load_sectors"] == seen["global_load_sectors_least"]
    assert seen["shared_wavefronts"] == seen["shared_wavefronts_least"]
