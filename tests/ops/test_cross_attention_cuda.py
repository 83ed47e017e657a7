"""cross_attention's CUDA kernel on the SIMT machine: parity, any media index, every block, split keys, traffic and work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops import test_cross_attention
from tests.ops.test_cross_attention import index, problems
from tests.support.cuda_machine import check_on_machine, counted, simt
from tests.support.ops import check_op, opcheck
from vlmops.backends import cuda_runtime, cuda_simt
from vlmops.ops import cross_attention
from vlmops.ops._shared.cuda_attention import Shape
from vlmops.ops.cross_attention import cuda as backend
from vlmops.ops.cross_attention.cost import cost
from vlmops.ops.varlen_attention import cuda as packed

__all__ = ["simt"]

BF16, FP16 = torch.bfloat16, torch.float16
#: Text of three images: some before the first, the images' in order.
STORY = index(*[-1] * 10, *[0] * 60, *[1] * 50, *[2] * 30)
SHUFFLED = index(*[(5 * i) % 4 - 1 for i in range(140)])
CASES = {
    **{name: case for name, case in test_cross_attention.CASES.items() if name != "odd head"},
    "several tiles": (dict(lengths_q=[150], lengths_k=[100, 70, 40], heads=1, kv_heads=1), dict(media_index=STORY)),
    "shuffled": (dict(lengths_q=[140], lengths_k=[100, 70, 40], heads=1, kv_heads=1), dict(media_index=SHUFFLED)),
    "far apart": (dict(lengths_q=[40], lengths_k=[9, 300, 5, 200, 1]), dict(media_index=index(*[0, 2, 4, -1] * 10))),
    "a hole in a tile": (dict(lengths_q=[20], lengths_k=[9, 30, 5]), dict(media_index=index(*[0, 2] * 10))),
    "wide ranges": (
        dict(lengths_q=[70], lengths_k=[90, 0, 70, 40]),
        dict(media_index=index(*[[i % 5, max(i % 5, i % 3 + 2)] for i in range(70)])),
    ),
    "int64": (dict(lengths_q=[4], lengths_k=[70, 8]), dict(media_index=torch.tensor([1, -1, 0, 1]))),
    "negative scale": (dict(lengths_q=[5], lengths_k=[18]), dict(scale=-0.3, media_index=index(0, 0, 0, -1, 0))),
    "scale zero": (dict(lengths_q=[2], lengths_k=[18]), dict(scale=0.0, media_index=index(0, -1))),
    "head 24": (dict(lengths_q=[5], lengths_k=[70], dim=24), dict(media_index=index(0, 0, -1, 0, 0))),
    "head 72": (dict(lengths_q=[5], lengths_k=[70], dim=72), dict(media_index=index(0, 0, -1, 0, 0))),
    "head 80": (dict(lengths_q=[5], lengths_k=[70], dim=80), dict(media_index=index(0, 0, -1, 0, 0))),
    "head 96": (dict(lengths_q=[5], lengths_k=[70], dim=96), dict(media_index=index(0, 0, -1, 0, 0))),
    "head 128": (dict(lengths_q=[5], lengths_k=[70], dim=128), dict(media_index=index(0, 0, -1, 0, 0))),
    "head 256": (dict(lengths_q=[5], lengths_k=[70], dim=256, heads=1, kv_heads=1), dict(media_index=index(0, 0, -1, 0, 0))),
}  # fmt: skip
#: Those run under all three schedules of the machine.
ALL_SCHEDULES = ["ranges", "several tiles", "shuffled", "far apart", "head 72"]


def make(*args, **kwargs):
    """Without gradients, which test_attention_backward_cuda.py has."""
    return test_cross_attention.make(*args, **{"grad": False, **kwargs})


def low(args, dtype=BF16):
    return [x.to(dtype) if x.is_floating_point() else x for x in args]


def force(monkeypatch, block=None, parts=None):
    if block is not None:
        monkeypatch.setattr(backend, "shape", lambda *_: block)
    if parts is not None:
        monkeypatch.setattr(backend, "parts", lambda *_: parts)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    shapes, options = CASES[case]
    if case in ALL_SCHEDULES and dtype == BF16:
        check_on_machine(cross_attention, make(**shapes), {**options, "return_lse": True}, dtype=dtype)
    else:
        check_op(cross_attention, make(**shapes), {**options, "return_lse": True}, backend="cuda", dtype=dtype)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize(
    "case", ["ranges", "nothing seen", "no queries", "shuffled", "far apart", "wide ranges", "head 72"]
)
def test_split_keys(case, count, monkeypatch):
    """Parts without a key for anyone, and with keys for some rows only."""
    force(monkeypatch, Shape(1, 32, 2), count)
    shapes, options = CASES[case]
    check_on_machine(cross_attention, make(**shapes), {**options, "return_lse": True}, BF16)


def test_a_share_that_begins_in_a_hole(monkeypatch):
    """Shares of 96, 96, 96 and 12 keys, and nobody sees 40 to 100: the second begins at 100 and ends inside a tile."""
    force(monkeypatch, Shape(1, 32, 2), 4)
    args = make([20], [40, 60, 200])
    check_op(cross_attention, args, dict(media_index=index(*[0, 2] * 10), return_lse=True), backend="cuda", dtype=BF16)
    check_op(cross_attention, args, dict(media_index=index(*[2] * 20), return_lse=True), backend="cuda", dtype=BF16)


@pytest.mark.parametrize("block", [Shape(1, 64, 2), Shape(2, 64, 2), Shape(2, 48, 2), Shape(1, 32, 3), Shape(1, 64, 4)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("case", ["shuffled", "far apart"])
def test_every_block(case, block, monkeypatch):
    force(monkeypatch, block)
    shapes, options = CASES[case]
    check_on_machine(cross_attention, make(**shapes), {**options, "return_lse": True}, BF16)


@given(
    problem=problems(rows=70, keys=60),
    groups=st.sampled_from([1, 2]),
    count=st.sampled_from([1, 2, 3]),
    atoms=st.sampled_from([1, 2]),
)
@settings(max_examples=40, deadline=None)
def test_any_media_index(problem, groups, count, atoms):
    tq, lengths_k, media_index = problem
    args = make([tq], lengths_k, heads=2, kv_heads=2 // groups)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, Shape(atoms, 32, 2), count)
        check_op(cross_attention, args, dict(media_index=media_index, return_lse=True), backend="cuda", dtype=BF16)


def test_gradients():
    args = make([20], [30, 9], grad=True)
    check_op(cross_attention, args, dict(media_index=index(*[0, -1, 1, 1] * 5)), backend="cuda", dtype=BF16)


def test_without_an_index_it_is_packed_attention(monkeypatch):
    seen = []
    forward = packed.forward
    monkeypatch.setattr(packed, "forward", lambda *args: seen.append(len(args)) or forward(*args))
    with vlmops.use_backend("cuda"):
        cross_attention(*low(make([3, 2], [4, 5])))
    assert seen == [18]


def test_strided_heads():
    """Keys and values of one product; and rows that do not start at 16 bytes, which are copied."""
    q, _, _, cu_q, cu_k = make([5], [20, 30], dim=24)
    for width in (24, 25):
        k, v = torch.randn(50, 2, 2, width)[..., :24].unbind(1)
        media = index(0, 1, 1, -1, 1)[:, None].expand(5, 2)[:, 0]  # not dense
        check_op(cross_attention, (q, k, v, cu_q, cu_k), dict(media_index=media), backend="cuda", dtype=BF16)


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_that_sees_nothing_is_exactly_zero(count, monkeypatch):
    force(monkeypatch, Shape(1, 32, 2), count)
    media = index(*[0, -1, -1, 1] * 5)
    args = low(make([20], [50, 40]))
    with vlmops.use_backend("cuda"):
        out, lse = cross_attention(*args, media_index=media, return_lse=True)
    assert torch.equal((out == 0).all(-1).all(-1), media < 0) and torch.equal(
        lse == -torch.inf, (media < 0).expand(2, -1)
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_nan_that_no_row_of_the_tile_sees_stays_out(count, monkeypatch):
    force(monkeypatch, Shape(1, 32, 2), count)
    q, k, v, cu_q, cu_k = low(make([6], [20, 130, 9]))
    k[60], v[61] = float("nan"), float("nan")
    with vlmops.use_backend("cuda"):
        out = cross_attention(q, k, v, cu_q, cu_k, media_index=index(0, 0, 0, -1, 0, 0))
        assert out.isfinite().all()
        q[2] = float("nan")
        out, lse = cross_attention(q, k, v, cu_q, cu_k, media_index=index(0, 0, 0, -1, 0, 0), return_lse=True)
    assert out[2].isnan().all() and lse[:, 2].isnan().all() and out[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("media", [index(0, 9, -7, 1), index([-3, 9], [2, 1], [1, 1], [7, 9])])
@pytest.mark.parametrize("values", [[0, 9, 4], [5, 0, 900], [-7, 3, 8]])
@pytest.mark.parametrize("count", [1, 2])
def test_malformed_device_data_touches_nothing_else(media, values, count, monkeypatch):
    """A GPU does not look at the values: whatever they are, no access leaves the tensors (the machine looks)."""
    force(monkeypatch, Shape(1, 32, 2), count)
    q, k, v, cu_q, _ = low(make([4], [5, 3]))
    bad = torch.tensor(values, dtype=torch.int32)
    with vlmops.use_backend("cuda"), pytest.raises(ValueError, match="expected"):
        cross_attention(q, k, v, cu_q, bad, media_index=media)
    monkeypatch.setattr(backend, "cu_seqlens_list", lambda *_: None)
    monkeypatch.setattr(backend, "check_media_index", lambda *_: None)
    with vlmops.use_backend("cuda"):
        assert cross_attention(q, k, v, cu_q, bad, media_index=media).isfinite().all()


def test_a_wrong_media_index_is_clamped_as_key_ranges_has_it(monkeypatch):
    q, k, v, cu_q, cu_k = low(make([6], [5, 3]))
    monkeypatch.setattr(backend, "check_media_index", lambda *_: None)
    with vlmops.use_backend("cuda"):
        for media, same in (
            (torch.tensor([-(2**40), -1, 0, 1, 2, 2**40]), index(-1, -1, 0, 1, 1, 1)),
            (
                index([-1, 1], [1, 0], [2, 9], [0, 9], [9, 0], [1, 2]),
                index([0, 1], [0, 0], [0, 0], [0, 2], [0, 0], [1, 2]),
            ),
        ):
            out, want = (cross_attention(q, k, v, cu_q, cu_k, media_index=m) for m in (media, same))
            assert torch.equal(out, want)


@pytest.mark.parametrize(("dim", "dtype", "why"), [(20, BF16, "a multiple of 8"), (264, BF16, "at most 256"),
                                                    (16, torch.float32, "float32")])  # fmt: skip
def test_what_it_refuses(dim, dtype, why):
    with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match=why):
        cross_attention(*low(make([2], [4], dim=dim), dtype), media_index=index(0, 0))


@pytest.mark.parametrize("dim", [64, 72, 80, 128])
@pytest.mark.parametrize("count", [1, 2])
def test_traffic_and_work_are_the_least(dim, count, monkeypatch):
    """Tiles of one image's text; of split keys, each part is written once and read once, and reads the queries again."""
    force(monkeypatch, Shape(1, 64, 2), count)
    q, k, v, cu_q, cu_k = low(make([128], [128, 64], dim=dim, kv_heads=1))
    media = index(*[0] * 64, *[1] * 64)
    with counted() as seen:
        cross_attention(q, k, v, cu_q, cu_k, media_index=media)
    least = cost(q, k, v, cu_q, cu_k, media, 1.0, block_q=64)
    rows = 128 * 2  # of all heads
    moved = seen["global_load_bytes"] + seen["global_store_bytes"]
    runs, more = 12 * rows * count, 0  # a number and its segment's bounds for each row of a head
    if count > 1:  # the queries again; parts, 1.5 a row: only half the rows have two tiles of keys; their lse, a thread
        more = rows * dim * 2 + 2 * 4 * dim * (rows + rows // 2) + 8 * count * rows * (dim // 4)
    assert least.bytes <= moved <= 1.02 * (least.bytes + more) + runs
    straddle = 1.13 if dim % 16 else 1.0
    sectors = 32 * (seen["global_load_sectors"] + seen["global_store_sectors"])
    assert sectors <= 1.1 * straddle * (least.bytes + more) + runs
    assert seen["shared_wavefronts"] <= 1.05 * seen["shared_wavefronts_least"]
    assert least.flops <= seen["mma_flops"] <= (1.12 if dim % 16 else 1.0) * least.flops


@pytest.mark.parametrize("count", [1, 3])
def test_keys_that_nobody_sees_are_not_read(count, monkeypatch):
    """Rows that see the first and the last image walk over two tiles, whatever lies between; so do the parts that have them."""
    force(monkeypatch, parts=count)
    args = low(make([64], [64, 640, 64], heads=1, kv_heads=1, dim=64))
    with counted() as seen:
        cross_attention(*args, media_index=index(*[0] * 32, *[2] * 32))
    assert seen["mma_flops"] == 2 * 2 * 4 * 16 * 64 * 64  # each by the two warps that see it
    most = (min(count, 2) * 64 + 4 * 64) * 128 + 12 * 64 * count
    if count > 1:  # every row's one part; all lse twice, for each of a row's 16 threads
        most += 64 * 64 * 4 + 2 * 4 * count * 64 * 16
    assert seen["global_load_bytes"] <= most


def test_a_warp_without_rows_does_no_work():
    with counted() as seen:
        cross_attention(*low(make([5], [64, 64], dim=64)), media_index=index(1, 1, 0, 0, 0))
    assert seen["mma_flops"] == 2 * 2 * 4 * 16 * 64 * 64


@pytest.mark.parametrize(("arch", "tokens", "keys", "sequences", "count"), [
    ("sm_80", 64, 6404, 1, 13), ("sm_80", 1, 6404, 1, 13), ("sm_90a", 64, 6404, 4, 6), ("sm_80", 4096, 6404, 1, 1),
    ("sm_80", 512, 1601, 1, 1),
])  # fmt: skip
def test_how_often_keys_are_split(arch, tokens, keys, sequences, count):
    """As often as fills two blocks a processor, where every part has four tiles: from shapes alone."""
    q = torch.empty(tokens, 16, 128, dtype=BF16, device="meta")
    k = torch.empty(keys, 8, 128, dtype=BF16, device="meta")
    cu_q, cu_k = (torch.empty(n + 1, dtype=torch.int32, device="meta") for n in (sequences, 4))
    with cuda_runtime.record(cuda_runtime.TARGETS[arch]) as plans:
        backend.forward(q, k, k, cu_q, cu_k, torch.empty(tokens, dtype=torch.int32, device="meta"), 0.125)
    assert plans[0].grid[2] == count and len(plans) == 1 + (count > 1)


def test_every_schedule_gives_the_same_bits(monkeypatch):
    force(monkeypatch, Shape(1, 32, 2), 3)
    args, found = low(make([50], [100, 60], dim=24)), []
    for name in cuda_simt.SCHEDULES:
        with cuda_simt.schedule(name, seed=3), vlmops.use_backend("cuda"):
            found.append(cross_attention(*args, media_index=index(*[[0, 2], [1, 2]] * 25)))
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("media_index", [index(1, 0, 1, -1, 0), index([0, 1], [0, 2], [1, 1], [1, 2], [0, 2])])
def test_opcheck(media_index):
    q, k, v, cu_q, cu_k = low(make([3, 2], [4, 5]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    opcheck(torch.ops.vlmops.cross_attention.default, (*leaves, cu_q, cu_k, media_index, 0.5, "cuda"))
