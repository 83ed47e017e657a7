"""The Triton rotary kernel in the interpreter: parity, gradients, odd shapes, traffic."""

from __future__ import annotations

import pytest
import torch

import vlmops
from tests.support import triton_interpreter
from tests.support.ops import check_op
from vlmops.ops import mrope_tables, rotary, vision_rotary_tables
from vlmops.ops.rotary.cost import cost

pytest.importorskip("triton")
triton_interpreter.install()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(tokens=7, heads=3, heads_k=2, dim=8, turned=None, strided=False):
    wide = 2 if strided else 1
    x = torch.randn(tokens, heads * wide, dim)[:, ::wide].requires_grad_()
    k = torch.randn(tokens, heads_k, dim, requires_grad=True) if heads_k else None
    cos, sin = (torch.randn(tokens, turned or dim) for _ in range(2))
    return x, k, cos, sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", [
    dict(), dict(heads_k=0), dict(dim=72), dict(dim=80, tokens=33), dict(dim=128, turned=64, heads_k=1),
    dict(dim=10, turned=6), dict(tokens=1), dict(strided=True), dict(tokens=0),
])  # fmt: skip
def test_parity(case, interleaved, dtype):
    x, k, cos, sin = make(**case)
    check_op(
        rotary, (x, cos, sin), dict(interleaved=interleaved) | ({} if k is None else dict(k=k)),
        backend="triton", dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_the_least(dtype):
    x, k, cos, sin = (t.detach().to(dtype) for t in make(tokens=40, dim=80))
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        rotary(x, cos.float(), sin.float(), k=k)
    least = cost(x, k, cos.float(), sin.float(), False)
    assert least.bytes <= seen.bytes <= 1.15 * least.bytes


# -- M-RoPE: sections of the head turn with time, row and column -----------------------------------------------------------


def positions(text=3, grid=(2, 2, 3), more=2):
    """[3, T] as Qwen2-VL numbers a prompt: text, a picture or video on its grid, text behind the largest position."""
    start = torch.arange(text).expand(3, -1)
    picture = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1) + text
    return torch.cat([start, picture, torch.arange(more).expand(3, -1) + picture.max() + 1], dim=1)


def fused_qkv(tokens, heads, heads_k, dim):
    """q [T, H, D] and k [T, Hk, D] as views of one projection's output [T, (H + 2 Hk) D]."""
    qkv = torch.randn(tokens, (heads + 2 * heads_k) * dim, requires_grad=True)
    q, k, _ = qkv.split([heads * dim, heads_k * dim, heads_k * dim], dim=1)
    return q.view(tokens, heads, dim), k.view(tokens, heads_k, dim), qkv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "sections", "heads", "heads_k"), [
    (128, (16, 24, 24), 6, 1), (128, (16, 24, 24), 4, 4), (16, (2, 3, 3), 3, 2), (12, (0, 5, 1), 2, 1),
])  # fmt: skip
def test_mrope(dim, sections, heads, heads_k, dtype):
    """Tables of Qwen2-VL's and Qwen2.5-VL's shape, gradients, q and k of one projection, fewer heads of k."""
    ids = positions()
    cos, sin = mrope_tables(ids, dim, sections)
    q, k, _ = fused_qkv(ids.shape[1], heads, heads_k, dim)
    check_op(
        rotary,
        (q.detach().requires_grad_(), cos, sin),
        dict(k=k.detach().requires_grad_()),
        backend="triton",
        dtype=dtype,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mrope_on_a_part_of_the_head(interleaved, dtype):
    ids = positions(1, (1, 2, 2), 1)
    cos, sin = mrope_tables(ids, 16, (2, 3, 3))
    if interleaved:  # one angle a pair of neighbours
        cos, sin = (x[:, :8].repeat_interleave(2, 1) for x in (cos, sin))
    x, k = torch.randn(6, 3, 24, requires_grad=True), torch.randn(6, 1, 24, requires_grad=True)
    check_op(rotary, (x, cos, sin), dict(k=k, interleaved=interleaved), backend="triton", dtype=dtype)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_mrope_is_transformers(family):
    """The family's own rotary module and function, tables and result; the gradient reaches the fused projection."""
    import importlib

    import transformers as T

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config, tables = {
        "qwen2_vl": (T.Qwen2VLConfig, "Qwen2VLRotaryEmbedding"), "qwen2_5_vl": (T.Qwen2_5_VLConfig, "Qwen2_5_VLRotaryEmbedding"),
    }[family]  # fmt: skip
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    text = dict(
        hidden_size=512, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, rope_parameters=rope
    )
    ids = positions()
    want_cos, want_sin = getattr(module, tables)(config(text_config=text).text_config)(torch.randn(1), ids[:, None])
    cos, sin = mrope_tables(ids, 128, (16, 24, 24))
    torch.testing.assert_close(torch.stack([cos, sin]), torch.cat([want_cos, want_sin]))
    q, k, qkv = fused_qkv(ids.shape[1], 4, 2, 128)
    want = module.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], want_cos, want_sin
    )  # [1, heads, T, D]
    with vlmops.use_backend("triton"):
        got = rotary(q, cos, sin, k=k)
    weights = [torch.randn_like(g) for g in got]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b[0].transpose(0, 1))
    found = torch.autograd.grad(sum((g * w).sum() for g, w in zip(got, weights, strict=True)), qkv)
    wanted = torch.autograd.grad(sum((b[0].transpose(0, 1) * w).sum() for b, w in zip(want, weights, strict=True)), qkv)
    torch.testing.assert_close(found, wanted)


def test_views_of_a_fused_projection_are_read_in_place():
    """No copy is made of them, forward or backward: exactly the bytes of q, k and the tables, and of the results."""
    ids = positions(4, (1, 4, 4), 4)
    cos, sin = mrope_tables(ids, 32, (4, 6, 6))
    q, k, qkv = fused_qkv(ids.shape[1], 4, 2, 32)
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        turned, turned_k = rotary(q, cos, sin, k=k)
    assert seen.launches == 1 and seen.bytes == cost(q, k, cos, sin, False).bytes
    with triton_interpreter.count() as seen:
        torch.autograd.grad((turned.sum() + turned_k.sum()), qkv)
    # A sum's gradient is one number everywhere, expanded: copied before, so that rows are dense.
    assert seen.launches == 1 and seen.bytes == cost(q, k, cos, sin, False).bytes


@pytest.mark.parametrize("heads", [1, 4, 12])
def test_tables_are_read_once_a_token_however_many_heads(heads):
    tokens, dim = 24, 64
    cos, sin = vision_rotary_tables(torch.tensor([[1, 4, 6]]), dim)
    q, k = torch.randn(tokens, heads, dim), torch.randn(tokens, heads, dim)
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        rotary(q, cos, sin, k=k)
    assert seen.read == q.nbytes + k.nbytes + cos.nbytes + sin.nbytes
