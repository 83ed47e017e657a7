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
from vlmops.ops import mrope_tables, pixtral_rotary_tables, rotary, varlen_attention, vision_rotary_tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(tokens=5, heads=3, dim=16, grad=False):
    return (torch.randn(tokens, heads, dim, requires_grad=grad), torch.randn(tokens, dim), torch.randn(tokens, dim))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 16, 64, 72, 80, 128])
def test_backends(backend, dtype, interleaved, dim):
    check_op(rotary, make(dim=dim, grad=True), dict(interleaved=interleaved), backend=backend, dtype=dtype)


@given(tokens=st.integers(0, 9), heads=st.integers(0, 4), half=st.integers(1, 40), interleaved=st.booleans())
@settings(max_examples=40, deadline=None)
def test_random_shapes(tokens, heads, half, interleaved):
    for backend in ("torch", "cpu"):
        args = make(tokens, heads, 2 * half)
        check_op(rotary, args, dict(interleaved=interleaved), backend=backend, dtype=torch.float32)


def test_strided_input_is_read_in_place():
    qkv = torch.randn(6, 3, 2, 16)
    cos, sin = torch.randn(6, 16), torch.randn(6, 16)
    for x in (qkv[:, 1], torch.randn(16, 2, 6).permute(2, 1, 0)):
        check_op(rotary, (x, cos, sin), {}, backend="cpu", dtype=torch.float32)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = (
        "import torch, vlmops; from vlmops.ops import rotary; torch.manual_seed(0)\n"
        "from vlmops.backends import native\n"
        "for d in (2, 30, 72, 128):\n"
        "  for dt in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    for inter in (False, True):\n"
        "      x, c, s = torch.randn(7, 3, d).to(dt), torch.randn(7, d), torch.randn(7, d)\n"
        "      with vlmops.use_backend('cpu'): got = rotary(x, c, s, interleaved=inter)\n"
        "      with vlmops.use_backend('reference'): want = rotary(x, c, s, interleaved=inter)\n"
        "      torch.testing.assert_close(got, want)\n"
        "print(native.isa())\n"
    )
    env = {**os.environ, "VLMOPS_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    # a processor without the set runs the best below it
    assert done.stdout.strip() in ("generic", "neon", isa, "avx2")


def test_same_as_inside_the_attention():
    q, cos, sin = make(9, 2, 16)
    k, v = torch.randn_like(q), torch.randn_like(q)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    fused = varlen_attention(q, k, v, cu, rope=(cos, sin))
    apart = varlen_attention(rotary(q, cos, sin), rotary(k, cos, sin), v, cu)
    torch.testing.assert_close(fused, apart)


def test_gradcheck_of_the_reference():
    x, cos, sin = (t.double() for t in make(3, 2, 4))
    x.requires_grad_()
    for interleaved in (False, True):
        with vlmops.use_backend("reference"):
            assert torch.autograd.gradcheck(lambda x, i=interleaved: rotary(x, cos, sin, interleaved=i), (x,))


def test_opcheck_and_compile():
    x, cos, sin = make(grad=True)
    opcheck(torch.ops.vlmops.rotary.default, (x, cos, sin, False, "torch"))
    fn = torch.compile(lambda x: rotary(x, cos, sin).square().sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fn(x), rotary(x, cos, sin).square().sum())


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(5, 16)), "x: expected 3 dimensions"),
        (dict(x=torch.ones(5, 3, 16, dtype=torch.int64)), "x: expected a floating-point"),
        (dict(x=torch.randn(5, 3, 15)), "x: expected an even head_dim"),
        (dict(cos=torch.randn(4, 16)), "cos: expected shape"),
        (dict(sin=torch.randn(5, 8)), "sin: expected shape"),
        (dict(sin=torch.randn(5, 16, device="meta")), "sin: expected on cpu"),
    ],
)
def test_bad_input(change, message):
    x, cos, sin = make()
    with pytest.raises((ValueError, TypeError), match=message):
        rotary(**{**dict(x=x, cos=cos, sin=sin), **change})


def test_bad_grids():
    with pytest.raises(ValueError, match="multiples of 2"):
        vision_rotary_tables(torch.tensor([[1, 3, 4]]), 16)
    with pytest.raises(ValueError, match="multiple of 4"):
        pixtral_rotary_tables([(2, 2)], 6)
    with pytest.raises(ValueError, match="sections"):
        mrope_tables(torch.zeros(3, 2), 16, (1, 1, 1))
