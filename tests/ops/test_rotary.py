"""rotary and its tables: every backend against the oracle, transformers' own tables and functions, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support.ops import check_op, opcheck
from vlmops.backends import native
from vlmops.ops import mrope_tables, pixtral_rotary_tables, rotary, varlen_attention, vision_rotary_tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "cpu"]
ISAS = ["generic", "neon", "avx2", "avx512", "avx512_bf16"]


def make(tokens=5, heads=3, dim=16, turned=None, grad=False):
    tables = torch.randn(2, tokens, turned or dim)
    return (torch.randn(tokens, heads, dim, requires_grad=grad), *tables)


def plain(x, cos, sin, *, k=None, interleaved=False):
    """The expression transformers runs, on complex numbers' real and imaginary parts written out."""
    if k is not None:
        return plain(x, cos, sin, interleaved=interleaved), plain(k, cos, sin, interleaved=interleaved)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    r = cos.shape[1]
    y, c, s = x[..., :r].to(wide), cos.to(wide)[:, None], sin.to(wide)[:, None]
    if interleaved:
        partner = torch.stack([-y[..., 1::2], y[..., 0::2]], -1).flatten(2)
    else:
        partner = torch.cat([-y[..., r // 2 :], y[..., : r // 2]], -1)
    return torch.cat([(y * c + partner * s).to(x.dtype), x[..., r:]], -1)


def check(args, backend="cpu", dtype=torch.float32, **options):
    check_op(rotary, args, options, backend=backend, dtype=dtype, lowprec=plain)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_oracle_itself(interleaved):
    args = [t.double() for t in make(dim=10, turned=6)]
    with vlmops.use_backend("reference"):
        torch.testing.assert_close(rotary(*args, interleaved=interleaved), plain(*args, interleaved=interleaved))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 16, 64, 72, 80, 128])
def test_backends(backend, dtype, interleaved, dim):
    check(make(dim=dim, grad=True), backend, dtype, interleaved=interleaved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_part_of_each_head(backend, dtype, interleaved):
    check(make(dim=41, turned=22, grad=True), backend, dtype, interleaved=interleaved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_q_and_k_in_one_call(backend, dtype, interleaved, grad):
    args = make(7, 4, 24, grad=grad)
    k = torch.randn(7, 2, 24, requires_grad=grad)
    check(args, backend, dtype, k=k, interleaved=interleaved)


def test_a_gradient_of_one_output_only():
    x, cos, sin = make(grad=True)
    k = torch.randn_like(x, requires_grad=True)
    for backend in BACKENDS:
        with vlmops.use_backend(backend):
            _, turned = rotary(x, cos, sin, k=k)
        grad_x, grad_k = torch.autograd.grad(turned.sum(), (x, k), allow_unused=True)
        assert grad_x is None or not grad_x.any()
        (want,) = torch.autograd.grad(plain(k, cos, sin).sum(), k)
        torch.testing.assert_close(grad_k, want)
        with vlmops.use_backend(backend):
            turned, other = rotary(x.detach(), cos, sin, k=k)  # x wants none, its output is in the loss all the same
        (grad_k,) = torch.autograd.grad(turned.sum() + other.sum(), k)
        torch.testing.assert_close(grad_k, want)


@given(
    tokens=st.integers(0, 9), heads=st.integers(0, 4), half=st.integers(1, 40), rest=st.integers(0, 3),
    interleaved=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_random_shapes(tokens, heads, half, rest, interleaved):
    for backend in BACKENDS:
        check(make(tokens, heads, 2 * half + rest, 2 * half), backend, interleaved=interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input_is_read_in_place(dtype):
    qkv = torch.randn(6, 3, 2, 16)
    cos, sin = torch.randn(16, 6).t(), torch.randn(6, 32)[:, ::2]
    for x in (qkv[:, 1], torch.randn(16, 2, 6).permute(2, 1, 0), qkv[:1, 0].expand(6, -1, -1)):
        check((x, cos, sin), dtype=dtype, k=qkv[:, 2])


def test_strided_gradients():
    x, cos, sin = make(6, 2, 16, grad=True)
    out = rotary(x, cos, sin).permute(1, 0, 2).flatten(1)  # [H, T * D]: its gradient comes back strided
    weight = torch.randn_like(out)
    want = plain(x, cos, sin).permute(1, 0, 2).flatten(1)
    got, wanted = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (out, want))
    torch.testing.assert_close(got, wanted)


def test_nan_stays_in_its_pair():
    x, cos, sin = make(3, 2, 16)
    x[1, 0, 3] = float("nan")
    for backend in BACKENDS:
        with vlmops.use_backend(backend):
            assert rotary(x, cos, sin).isnan().nonzero().tolist() == [[1, 0, 3], [1, 0, 11]]


def sweep():
    torch.manual_seed(0)
    for dim, turned in ((2, 2), (14, 14), (30, 30), (72, 72), (80, 64), (128, 128)):
        for dtype in DTYPES:
            for interleaved in (False, True):
                k = torch.randn(7, 1, dim, requires_grad=True)
                check(make(7, 3, dim, turned, grad=True), dtype=dtype, k=k, interleaved=interleaved)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    if ISAS.index(isa) > ISAS.index(native.isa()) or ((isa == "neon") != (native.isa() == "neon") and isa != "generic"):
        pytest.skip("not on this CPU")
    code = "from tests.ops.test_rotary import native, sweep; sweep(); print(native.isa())"
    env = {**os.environ, "VLMOPS_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def test_same_as_inside_the_attention():
    q, cos, sin = make(9, 2, 16)
    k, v = torch.randn_like(q), torch.randn_like(q)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    fused = varlen_attention(q, k, v, cu, rope=(cos, sin))
    turned = rotary(q, cos, sin, k=k)
    torch.testing.assert_close(fused, varlen_attention(*turned, v, cu))


def test_gradcheck_of_the_reference():
    x, cos, sin = (t.double() for t in make(3, 2, 6, 4))
    k = torch.randn(3, 1, 6, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    for interleaved in (False, True):
        with vlmops.use_backend("reference"):
            assert torch.autograd.gradcheck(lambda x, k, i=interleaved: rotary(x, cos, sin, k=k, interleaved=i), (x, k))


def test_opcheck():
    x, cos, sin = make(grad=True)
    for backend in BACKENDS:
        opcheck(torch.ops.vlmops.rotary.default, (x, None, cos, sin, False, backend))
        opcheck(
            torch.ops.vlmops.rotary.default, (x, torch.randn(5, 1, 16, requires_grad=True), cos, sin, True, backend)
        )


def test_compile_has_no_graph_break():
    x, cos, sin = make(grad=True)
    k = torch.randn(5, 1, 16)

    def loss(x):
        q, turned = rotary(x, cos, sin, k=k)
        return rotary(q, cos, sin).square().sum() + turned.sum()

    fn = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(x), loss(x))
    torch.testing.assert_close(torch.autograd.grad(fn(x), x), torch.autograd.grad(loss(x), x))


def test_autocast_leaves_the_dtype():
    x, cos, sin = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rotary(x, cos, sin).dtype == torch.float32
        assert rotary(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_equals_transformers_vision_rope():
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    q, cos, sin = make(7, 4, 16)
    want, _ = apply_rotary_pos_emb_vision(q.bfloat16(), q.bfloat16(), cos, sin)
    with vlmops.use_backend("cpu"):
        got = rotary(q.bfloat16(), cos, sin)
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


def test_qwen2_vl_tables():
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding
    from transformers.vision_utils import get_vision_position_ids

    config = T.Qwen2VLConfig(vision_config=dict(embed_dim=64, num_heads=4)).vision_config
    grid = torch.tensor([[1, 4, 6], [2, 2, 2]])
    want = Qwen2VLVisionRotaryEmbedding(config)(torch.randn(1), get_vision_position_ids(grid, 2))
    got = vision_rotary_tables(grid, 16)
    torch.testing.assert_close(torch.stack(got), torch.stack([w.reshape(len(got[0]), -1) for w in want]))


def test_pixtral_tables():
    from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding

    config = T.PixtralVisionConfig(hidden_size=64, num_attention_heads=4, head_dim=16, image_size=128, patch_size=16)
    sizes = [(3, 5), (4, 2)]
    positions = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in sizes])
    want = PixtralVisionRotaryEmbedding(config)(torch.randn(1), positions)
    got = pixtral_rotary_tables(sizes, 16)
    torch.testing.assert_close(torch.stack(got), torch.stack([w.reshape(len(got[0]), -1) for w in want]))


def test_mrope_tables():
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3])
    text = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, rope_parameters=rope)
    config = T.Qwen2_5_VLConfig(text_config=text).text_config
    ids = torch.randint(0, 50, (3, 1, 7))
    want = Qwen2_5_VLRotaryEmbedding(config)(torch.randn(1), ids)
    got = mrope_tables(ids[:, 0], 16, (2, 3, 3))
    torch.testing.assert_close(torch.stack(got), torch.stack([w[0] for w in want]))


def test_tables_of_a_larger_batch():
    """Index arithmetic against loops over the images."""
    grid = torch.tensor([[1, 4, 6], [3, 2, 2], [1, 0, 4], [2, 6, 2]], dtype=torch.int32)
    for merge in (1, 2):
        places = [
            (r, c)
            for t, h, w in grid.tolist()
            for _ in range(t)
            for r, c in sorted(
                ((r, c) for r in range(h) for c in range(w)),
                key=lambda at, m=merge: (at[0] // m, at[1] // m, at[0] % m, at[1] % m),
            )
        ]
        frequencies = 100.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
        angles = (torch.tensor(places, dtype=torch.float64)[..., None] * frequencies).flatten(1).repeat(1, 2)
        cos, sin = vision_rotary_tables(grid, 8, theta=100.0, merge=merge)
        torch.testing.assert_close(torch.stack([cos, sin]), torch.stack([angles.cos(), angles.sin()]).float())


def test_tables_compile_and_need_no_device_read():
    grid = torch.tensor([[1, 4, 6], [2, 2, 2]])
    fn = torch.compile(lambda g: vision_rotary_tables(g, 16, total_tokens=32)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(grid), vision_rotary_tables(grid, 16)[0])
    assert vision_rotary_tables(grid.to("meta"), 16, total_tokens=32)[0].shape == (32, 16)
    sizes = grid[:, 1:]
    assert pixtral_rotary_tables(sizes.to("meta"), 16, total_tokens=28)[0].device.type == "meta"
    torch.testing.assert_close(pixtral_rotary_tables(sizes, 16), pixtral_rotary_tables([(4, 6), (2, 2)], 16))


def test_empty_tables():
    assert vision_rotary_tables(torch.empty(0, 3, dtype=torch.int64), 16)[0].shape == (0, 16)
    assert pixtral_rotary_tables([], 16)[1].shape == (0, 16)
    assert mrope_tables(torch.empty(3, 0), 16, (2, 3, 3))[0].shape == (0, 16)
    assert mrope_tables(torch.zeros(3, 2, 5), 16, (2, 3, 3))[0].shape == (2, 5, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(5, 16)), "x: expected 3 dimensions"),
        (dict(x=torch.ones(5, 3, 16, dtype=torch.int64)), "x: expected a floating-point"),
        (dict(x=torch.randn(5, 3, 15)), "cos: expected .* even R of at most 15"),
        (dict(cos=torch.randn(5, 15), sin=torch.randn(5, 15)), "cos: expected .* even R"),
        (dict(cos=torch.randn(5, 0), sin=torch.randn(5, 0)), "cos: expected .* even R"),
        (dict(cos=torch.randn(4, 16)), "cos: expected shape"),
        (dict(cos=torch.randn(16)), "cos: expected 2 dimensions"),
        (dict(sin=torch.randn(5, 8)), "sin: expected shape"),
        (dict(sin=torch.randn(5, 16, device="meta")), "sin: expected on cpu"),
        (dict(cos=torch.ones(5, 16, dtype=torch.int32)), "cos: expected a floating-point"),
        (dict(k=torch.randn(5, 16)), "k: expected 3 dimensions"),
        (dict(k=torch.randn(5, 3, 8)), "k: expected shape"),
        (dict(k=torch.randn(4, 3, 16)), "k: expected shape"),
        (dict(k=torch.randn(5, 3, 16).bfloat16()), "k: expected float32"),
    ],
)
def test_bad_input(change, message):
    x, cos, sin = make()
    with pytest.raises((ValueError, TypeError), match=message):
        rotary(**{**dict(x=x, cos=cos, sin=sin), **change})


@pytest.mark.parametrize(
    ("make_tables", "message"),
    [
        (lambda g: vision_rotary_tables(torch.tensor([[1, 3, 4]]), 16), "multiples of 2"),
        (lambda g: vision_rotary_tables(g, 6), "multiple of 4"),
        (lambda g: vision_rotary_tables(g.float(), 8), "grid_thw: expected integers"),
        (lambda g: vision_rotary_tables(g[:, :2], 8), "grid_thw: expected shape"),
        (lambda g: vision_rotary_tables(g, 8, total_tokens=7), "total_tokens: expected 8"),
        (lambda g: vision_rotary_tables(g.to("meta"), 8), "total_tokens: needed"),
        (lambda g: vision_rotary_tables(g, 8, merge=0), "merge: expected"),
        (lambda g: pixtral_rotary_tables([(2, 2)], 6), "multiple of 4"),
        (lambda g: pixtral_rotary_tables(g, 8), "sizes: expected shape"),
        (lambda g: mrope_tables(torch.zeros(3, 2), 16, (1, 1, 1)), "sections"),
        (lambda g: mrope_tables(torch.zeros(2, 2), 16, (4, 2, 2)), "position_ids: expected"),
    ],
)
def test_bad_tables(make_tables, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_tables(torch.tensor([[1, 2, 4]]))
