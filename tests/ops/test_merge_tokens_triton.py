"""merge_tokens' Triton kernels in the interpreter: parity, gradients, counts that do not fit, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_merge_tokens import CASES, DTYPES, IMAGE, make
from tests.support import triton_interpreter
from tests.support.ops import check_op
from vlmops.ops import merge_tokens
from vlmops.ops.merge_tokens import triton as backend
from vlmops.ops.merge_tokens.cost import cost

pytest.importorskip("triton")
triton_interpreter.install()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    check_op(merge_tokens, (*make(CASES[case]), IMAGE), {}, backend="triton", dtype=dtype)


@given(ids=st.lists(st.sampled_from([1, IMAGE, 9]), max_size=20), channels=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_any_places(ids, channels):
    check_op(merge_tokens, (*make(ids, channels), IMAGE), {}, backend="triton", dtype=torch.float32)


def test_more_tokens_than_one_block_of_the_scan():
    ids = torch.where(torch.rand(5000) < 0.3, IMAGE, 1)
    embeds, features = torch.randn(5000, 3), torch.randn(int((ids == IMAGE).sum()), 3)
    with vlmops.use_backend("triton"):
        out = merge_tokens(ids, embeds, features, IMAGE)
    assert torch.equal(out, embeds.masked_scatter((ids == IMAGE)[:, None], features))


@pytest.mark.parametrize("kind", [torch.bool, torch.int32])
def test_bool_and_int32_ids(kind):
    ids, embeds, features = make([1, 7, 7, 2], grad=False)
    want = embeds.masked_scatter((ids == IMAGE)[:, None], features)
    with vlmops.use_backend("triton"):
        if kind == torch.bool:
            assert torch.equal(merge_tokens(ids == IMAGE, embeds, features), want)
        else:
            assert torch.equal(merge_tokens(ids.int(), embeds, features, IMAGE), want)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_another_number_of_features_than_image_tokens(rows, monkeypatch):
    """What a GPU does, where nobody knows the number: surplus tokens keep their embedding, surplus features are unused."""
    ids, embeds, _ = make([1, 7, 7, 2, 7], grad=False)
    features = torch.randn(rows, 5)
    want, unused = embeds.clone(), embeds.new_zeros(rows, 5)
    grad = torch.randn_like(embeds)
    grad_embeds = grad.clone()
    for j, place in zip(range(rows), (1, 2, 4), strict=False):
        want[place], unused[j], grad_embeds[place] = features[j], grad[place], 0.0
    with pytest.raises(ValueError, match="expected one row for each of 3 image tokens"):
        backend.forward(ids, embeds, features if rows != 3 else features[:2], IMAGE)
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, *a: torch.tensor(rows), raising=True)
    assert torch.equal(backend.forward(ids, embeds, features, IMAGE), want)
    found = backend.backward([grad], [], [ids, embeds, features, IMAGE], [True, True])
    assert torch.equal(found[0], grad_embeds) and torch.equal(found[1], unused)


def test_strided_rows():
    ids, _, features = make([1, 7, 7, 2], channels=6, grad=False)
    embeds = torch.randn(4, 12)[:, :6]
    with vlmops.use_backend("triton"):
        out = merge_tokens(ids, embeds, features, IMAGE)
    assert torch.equal(out, embeds.masked_scatter((ids == IMAGE)[:, None], features))


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_the_least(dtype):
    ids, embeds, features = make([1] * 20 + [IMAGE] * 30, channels=300, grad=False)
    args = (ids, embeds.to(dtype), features.to(dtype), IMAGE)
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        merge_tokens(*args)
    assert cost(*args).bytes <= seen.bytes <= 1.15 * cost(*args).bytes
