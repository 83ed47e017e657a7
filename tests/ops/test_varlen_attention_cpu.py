"""varlen_attention's native kernel: every option, shape and instruction set against the float64 oracle."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support.ops import check_op, to_dtype
from tests.support.packed_attention import cu, prefix
from tests.support.tolerance import assert_close_to_oracle
from vlmops.backends import native
from vlmops.ops import varlen_attention
from vlmops.ops.varlen_attention import composition, reference
from vlmops.ops.varlen_attention import cpu as kernel

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [1, 5, 16, 34, 64, 72, 80, 88, 96, 128, 256, 512]
ISAS = ["generic", "neon", "avx2", "avx512", "avx512_bf16"]


def make(lengths_q, lengths_k=None, heads=2, kv_heads=2, dim=64, spread=1.0):
    lengths_k = lengths_q if lengths_k is None else lengths_k
    q = torch.randn(sum(lengths_q), heads, dim) * spread
    k, v = (torch.randn(sum(lengths_k), kv_heads, dim) for _ in range(2))
    return q, k, v, cu(lengths_q), cu(lengths_k)


def check(args, dtype=torch.float32, **options):
    check_op(varlen_attention, args, {**options, "return_lse": True}, backend="cpu", dtype=dtype)


def cpu(*args, **options):
    with vlmops.use_backend("cpu"):
        return varlen_attention(*args, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim, dtype):
    check(make([67, 1, 0, 130], dim=dim), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 48, 63, 64, 65, 97, 145, 300, 1000])
def test_lengths(length, dtype):
    check(make([length], heads=1, kv_heads=1, dim=72), dtype)


OPTIONS = {
    "causal": (dict(lengths_q=[70, 200]), dict(causal=True)),
    "causal, more keys": (dict(lengths_q=[30, 1, 70], lengths_k=[200, 90, 71]), dict(causal=True)),
    "causal, more queries": (dict(lengths_q=[200, 66], lengths_k=[30, 1]), dict(causal=True)),
    "no keys": (dict(lengths_q=[70, 3], lengths_k=[0, 4]), {}),
    "no queries": (dict(lengths_q=[0, 3], lengths_k=[9, 4]), {}),
    "window": (dict(lengths_q=[400, 63]), dict(window=(20, 11))),
    "window that some queries see nothing through": (dict(lengths_q=[200], lengths_k=[40]), dict(window=(3, 2))),
    "left window": (dict(lengths_q=[400]), dict(window=(150, -1))),
    "right window": (dict(lengths_q=[400]), dict(window=(-1, 0))),
    "window with prefix": (dict(lengths_q=[500, 90]), dict(window=(7, 3), prefix_lens=prefix(33, 200))),
    "prefix": (dict(lengths_q=[300, 40]), dict(causal=True, prefix_lens=prefix(160, 0))),
    "softcap": (dict(lengths_q=[190, 4], spread=4.0), dict(softcap=3.0)),
    "softcap causal": (dict(lengths_q=[190, 4]), dict(softcap=30.0, causal=True)),
    "grouped": (dict(lengths_q=[90, 4], heads=6, kv_heads=2), {}),
    "grouped causal decode": (dict(lengths_q=[1, 3], lengths_k=[190, 77], heads=6, kv_heads=2), dict(causal=True)),
    "many windows": (dict(lengths_q=[64] * 12, dim=80), {}),
    "negative scale": (dict(lengths_q=[190]), dict(scale=-0.2)),
    "negative scale causal": (dict(lengths_q=[190]), dict(scale=-0.2, causal=True)),
    "zero scale": (dict(lengths_q=[190]), dict(scale=0.0, causal=True)),
    "peaked": (dict(lengths_q=[300], spread=60.0), {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, dtype):
    shapes, options = OPTIONS[case]
    check(make(**shapes), dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [3.0, -3.0])
def test_scores_that_keep_growing_or_falling(slope, dtype):
    """The first keys are a bad estimate of the row maximum: blocks are done again with the true one."""
    q, k, v, cu_q, cu_k = make([500], heads=1, kv_heads=1)
    q, k = torch.ones_like(q), torch.linspace(0, slope * 8, 500)[:, None, None].expand(k.shape).contiguous()
    check((q, k, v, cu_q, cu_k), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [64, 72, 80, 6])
def test_rope(dim, interleaved, dtype):
    angles = torch.rand(133, dim) * 6
    tables = (angles.cos(), angles.sin())
    check(make([70, 63], heads=4, dim=dim), dtype, rope=tables, rope_interleaved=interleaved)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_rope_with_own_tables_for_k(table_dtype):
    tables = [torch.randn(n, 64).to(table_dtype) for n in (70, 70, 200, 200)]
    check(make([69, 1], [150, 50]), rope=tuple(tables[:2]), rope_k=tuple(tables[2:]), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    """Slices of one projection, heads before tokens, an odd token stride, a last dimension that is not dense, a broadcast."""
    qkv = torch.randn(150, 3, 2, 72).to(dtype)
    heads_first = torch.randn(2, 150, 72).to(dtype).transpose(0, 1)
    odd = torch.randn(150, 2 * 72 + 1).to(dtype)[:, :144].unflatten(1, (2, 72))
    sparse = torch.randn(150, 2, 144).to(dtype)[..., ::2]
    shared = torch.randn(1, 2, 72).to(dtype).expand(150, 2, 72)
    lengths = cu([100, 50])
    for q, k, v in [qkv.unbind(1), (heads_first, odd, sparse), (odd, sparse, shared), (sparse, heads_first, odd)]:
        check((q, k, v, lengths, lengths), dtype)
        want = cpu(q.contiguous(), k.contiguous(), v.contiguous(), lengths)
        assert torch.equal(cpu(q, k, v, lengths), want)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), max_size=4),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 80), st.integers(-1, 80)),
    prefixes=st.none() | st.integers(0, 90),
    softcap=st.sampled_from([0.0, 0.0, 5.0]),
    groups=st.sampled_from([1, 3]),
    dim=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_random_shapes(lengths, causal, window, prefixes, softcap, groups, dim, dtype):
    args = make([a for a, _ in lengths], [b for _, b in lengths], heads=2 * groups, dim=dim)
    lens = None if prefixes is None else prefix(*[prefixes] * len(lengths))
    check(args, dtype, causal=causal, window=window, prefix_lens=lens, softcap=softcap)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_the_threads(threads):
    """One long sequence beside a few short ones: with several threads the long one is cut and its keys are shared."""
    args = make([900, 3, 64], heads=2, kv_heads=1, dim=80)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = cpu(*args, return_lse=True)
        torch.set_num_threads(threads)
        got = cpu(*args, return_lse=True)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_every_output_element_is_written(monkeypatch):
    """Memory the kernel gets back was NaN: sequences without keys, odd tails and unused lanes must not show it."""
    q, k, v, cu_q, cu_k = make([65, 0, 3, 17], [0, 5, 3, 40], dim=34)
    with torch.no_grad():
        for _ in range(3):
            for numel in (q.numel(), q.shape[0] * q.shape[1], 1 << 18):
                torch.full((numel,), float("nan"))  # freed at once, handed out again
            out, lse = cpu(q, k, v, cu_q, cu_k, return_lse=True)
            assert out.isfinite().all() and (out[:65] == 0).all()
            assert (lse[:, :65] == float("-inf")).all() and lse[:, 65:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    q, k, v, cu_q, _ = to_dtype(make([200, 40, 30]), dtype)
    q[5, 0, 3] = float("nan")
    out, lse = cpu(q, k, v, cu_q, return_lse=True)
    hit = torch.zeros(270, 2, dtype=torch.bool)
    hit[5, 0] = True
    assert torch.equal(out.isnan().any(-1), hit) and torch.equal(lse.t().isnan(), hit)
    k[210, 1, 0] = float("nan")
    hit[200:240, 1] = True
    assert torch.equal(cpu(q, k, v, cu_q).isnan().any(-1), hit)
    # A hidden key's NaN does not get out: query i of the second sequence sees key 10 from i = 10 on.
    hit[200:210, 1] = False
    hit[5, 0] = True
    assert torch.equal(cpu(q, k, v, cu_q, causal=True).isnan().any(-1), hit)
    q[5, 0, 3], k[210, 1, 0] = 1.0, 1.0
    q[7] = float("inf")
    assert torch.equal(cpu(q, k, v, cu_q)[7].isnan(), composition_of(q, k, v, cu_q)[7].isnan())


def composition_of(q, k, v, cu_q):
    with vlmops.use_backend("reference"):
        return varlen_attention(q, k, v, cu_q)


def raw(q, k, v, cu_q, cu_k, **options):
    full = dict(scale=0.1, causal=False, left=-1, right=-1, prefix_lens=None, softcap=0.0, cos_q=None, sin_q=None,
                cos_k=None, sin_k=None, interleaved=False)  # fmt: skip
    return torch.ops.vlmops_cpu.varlen_attention(q, k, v, cu_q, cu_k, *{**full, **options}.values())


BAD = {
    "start": (lambda a: a.update(cu_q=torch.tensor([1, 8])), ValueError, "cu_seqlens_q: expected to start at 0"),
    "falls": (lambda a: a.update(cu_k=torch.tensor([0, 9, 5, 8])), ValueError, "cu_seqlens_k: expected to be monotone"),
    "negative": (
        lambda a: a.update(cu_q=torch.tensor([0, -3, 8])),
        ValueError,
        "cu_seqlens_q: expected to be monotone",
    ),
    "not covered": (lambda a: a.update(cu_q=torch.tensor([0, 7])), ValueError, "cu_seqlens_q: expected to end at"),
    "past the end": (lambda a: a.update(cu_k=torch.tensor([0, 5, 99])), ValueError, "cu_seqlens_k: expected to end at"),
    "counts": (lambda a: a.update(cu_k=torch.tensor([0, 8])), ValueError, "cu_seqlens_k: expected 3 values"),
    "empty": (lambda a: a.update(cu_q=torch.tensor([], dtype=torch.int32)), ValueError, "cu_seqlens_q: expected"),
    "float": (lambda a: a.update(cu_q=torch.tensor([0.0, 8.0])), TypeError, "cu_seqlens_q: expected int32"),
    "float64": (
        lambda a: a.update(q=a["q"].double(), k=a["k"].double(), v=a["v"].double()),
        TypeError,
        "q: expected float32",
    ),
    "dtype": (lambda a: a.update(v=a["v"].half()), TypeError, "v: expected"),
    "rank": (lambda a: a.update(q=a["q"][0]), ValueError, "q: expected"),
    "head_dim": (lambda a: a.update(k=a["k"][..., :3]), ValueError, "k: expected"),
    "v shape": (lambda a: a.update(v=a["v"][:3]), ValueError, "v: expected"),
    "heads": (
        lambda a: a.update(k=torch.zeros(8, 3, 64), v=torch.zeros(8, 3, 64)),
        ValueError,
        "k: expected a number of heads",
    ),
    "long head": (lambda a: a.update({n: torch.zeros(8, 2, 513) for n in "qkv"}), ValueError, "head_dim <= 512"),
    "prefix": (lambda a: a.update(prefix_lens=torch.tensor([1])), ValueError, "prefix_lens: expected"),
    "rope": (
        lambda a: a.update(cos_q=torch.zeros(8, 63), sin_q=torch.zeros(8, 64)),
        ValueError,
        "cos_q: expected shape",
    ),
    "half a rope": (lambda a: a.update(cos_q=torch.zeros(8, 64)), ValueError, "sin_q"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    q, k, v, cu_q, cu_k = make([5, 3])
    args = dict(q=q, k=k, v=v, cu_q=cu_q, cu_k=cu_k)
    change(args)
    with pytest.raises(error, match=message):
        raw(**args)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_empty(lengths):
    out, lse = cpu(*make(lengths), return_lse=True)
    assert out.shape == (0, 2, 64) and lse.shape == (2, 0)


def test_int64_cu_seqlens_and_rope_shared_with_k():
    q, k, v, cu_q, cu_k = make([60, 10])
    assert torch.equal(raw(q, k, v, cu_q.long(), cu_k.long())[0], raw(q, k, v, cu_q, cu_k)[0])
    tables = dict(cos_q=torch.randn(70, 64), sin_q=torch.randn(70, 64))
    both = dict(tables, cos_k=tables["cos_q"], sin_k=tables["sin_q"])
    assert torch.equal(raw(q, k, v, cu_q, cu_k, **tables)[0], raw(q, k, v, cu_q, cu_k, **both)[0])
    with pytest.raises(ValueError, match="cos_k: needed"):
        raw(q, k[:60], v[:60], cu_q, cu([50, 10]), **tables)


def test_gradients_through_the_forward():
    q, k, v, cu_q, cu_k = make([70, 30], heads=4, dim=72)
    args = [x.requires_grad_() for x in (q, k, v)]
    check_op(
        varlen_attention, (*args, cu_q, cu_k), dict(causal=True, return_lse=True), backend="cpu", dtype=torch.float32
    )


def test_what_it_does_not_support():
    q, k, v, cu_q, _ = make([4])
    with vlmops.use_backend("cpu"), pytest.raises(vlmops.backends.BackendError, match="float64"):
        varlen_attention(q.double(), k.double(), v.double(), cu_q)
    wide = torch.zeros(4, 1, 600)
    with vlmops.use_backend("cpu"), pytest.raises(vlmops.backends.BackendError, match="head_dim 600"):
        varlen_attention(wide, wide, wide, cu_q)


def sweep() -> None:
    """Every code path once; run in a process of its own for each instruction set."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for lengths, dim, heads, options in [
            ([67, 1, 0, 130], 80, 2, {}),
            ([64, 64, 64], 72, 2, {}),
            ([300, 17], 64, 2, dict(causal=True)),
            ([200, 90], 34, 4, dict(left=30, right=4, prefix=True)),
            ([200], 5, 4, dict(softcap=4.0)),
            ([130], 64, 2, dict(rope=True)),
            ([130], 72, 2, dict(rope=True, interleaved=True)),
        ]:
            q, k, v, cu_q, cu_k = to_dtype(make(lengths, heads=heads, dim=dim, spread=3.0), dtype)
            angles = torch.rand(sum(lengths), dim)
            tables = [angles.cos(), angles.sin()] * 2 if options.get("rope") else [None] * 4
            lens = prefix(*[50] * len(lengths)) if options.get("prefix") else None
            rest = [dim**-0.5, options.get("causal", False), options.get("left", -1), options.get("right", -1), lens,
                    options.get("softcap", 0.0), *tables, options.get("interleaved", False)]  # fmt: skip
            wide = [x.double() for x in (q, k, v)]
            oracle = reference.forward(*wide, cu_q, cu_k, -1, -1, *rest)
            low = composition.forward(q, k, v, cu_q, cu_k, -1, -1, *rest)
            got = kernel.forward(q, k, v, cu_q, cu_k, -1, -1, *rest)
            for name, a, b, c in zip(("out", "lse"), got, low, oracle, strict=True):
                assert_close_to_oracle(a, b, c, f"{name} {dtype} {lengths} {dim} {options}")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    order = ISAS.index(native.isa())
    if ISAS.index(isa) > order or ((isa == "neon") != (native.isa() == "neon") and isa != "generic"):
        pytest.skip(f"not on this machine ({native.isa()})")
    code = "from tests.ops import test_varlen_attention_cpu as t; from vlmops.backends import native; " \
           "native.load(); print(native.isa()); t.sweep()"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "VLMOPS_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == isa
