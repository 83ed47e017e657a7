"""merge_tokens' CUDA kernels on the SIMT machine: parity, gradients, counts that do not fit, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_merge_tokens import CASES, IMAGE, make
from tests.support.cuda_machine import DTYPES, check_on_machine, counted, simt
from tests.support.ops import check_op, opcheck
from vlmops.backends import cuda_runtime, cuda_simt
from vlmops.ops import merge_tokens
from vlmops.ops.merge_tokens import cuda as backend
from vlmops.ops.merge_tokens.cost import cost

__all__ = ["simt"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    check_on_machine(merge_tokens, (*make(CASES[case]), IMAGE), {}, dtype)


@pytest.mark.parametrize("channels", [8, 12, 130, 2100])
def test_every_width_of_a_row(channels):
    check_on_machine(merge_tokens, (*make([1, 7, 7, 2, 7], channels), IMAGE), {}, torch.bfloat16)


@given(ids=st.lists(st.sampled_from([1, IMAGE, 9]), max_size=70), channels=st.sampled_from([1, 4, 6]))
@settings(max_examples=20, deadline=None)
def test_any_places(ids, channels):
    check_op(merge_tokens, (*make(ids, channels), IMAGE), {}, backend="cuda", dtype=torch.float32)


@pytest.mark.parametrize("tokens", [backend.IDS_A_BLOCK - 1, backend.IDS_A_BLOCK + 1, 2 * backend.IDS_A_BLOCK + 6])
def test_ids_of_several_blocks(tokens):
    """The blocks count first, then each knows how many image tokens lie in front of it."""
    ids = torch.where(torch.rand(tokens) < 0.3, IMAGE, 1)
    found = int((ids == IMAGE).sum())
    for name in cuda_simt.SCHEDULES:
        with cuda_simt.schedule(name, seed=5):
            plans, taken, places = backend.number_plans(ids, found, IMAGE)
            cuda_runtime.run(plans)
        assert len(plans) == (1 if tokens <= backend.IDS_A_BLOCK else 2)
        assert torch.equal(places, (ids == IMAGE).nonzero().squeeze(1).int())
        assert torch.equal(taken, torch.where(ids == IMAGE, (ids == IMAGE).cumsum(0) - 1, -1).int())


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int16, torch.uint8])
def test_ids_of_other_types(kind):
    ids, embeds, features = make([1, 7, 7, 2, 7, 7, 7, 9], grad=False)
    want = embeds.masked_scatter((ids == IMAGE)[:, None], features)
    with vlmops.use_backend("cuda"):
        if kind == torch.bool:
            assert torch.equal(merge_tokens(ids == IMAGE, embeds, features), want)
        else:
            assert torch.equal(merge_tokens(ids.to(kind), embeds, features, IMAGE), want)


def test_float64_rows_are_copied_too():
    ids, embeds, features = make([1, 7, 2], grad=False)
    with vlmops.use_backend("cuda"):
        out = merge_tokens(ids, embeds.double(), features.double(), IMAGE)
    assert torch.equal(out, embeds.double().masked_scatter((ids == IMAGE)[:, None], features.double()))


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


def test_no_tokens_but_features(monkeypatch):
    """An empty prompt on a GPU: every feature's gradient is zero, none is left unwritten."""
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, *a: torch.tensor(3), raising=True)
    ids, embeds, features = torch.empty(0, dtype=torch.int64), torch.empty(0, 4), torch.randn(3, 4)
    found = backend.backward([embeds], [], [ids, embeds, features, IMAGE], [True, True])
    assert found[0].shape == (0, 4) and torch.equal(found[1], torch.zeros(3, 4))


def test_strided_rows():
    ids, _, features = make([1, 7, 7, 2], channels=6, grad=False)
    embeds = torch.randn(4, 13)[:, 1:7]
    with vlmops.use_backend("cuda"):
        out = merge_tokens(ids, embeds, features, IMAGE)
    assert torch.equal(out, embeds.masked_scatter((ids == IMAGE)[:, None], features))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [256, 2304])
def test_traffic_is_the_least(dtype, channels):
    ids, embeds, features = make([1] * 20 + [IMAGE] * 30 + [1] * 14, channels=channels, grad=False)
    args = (ids, embeds.to(dtype), features.to(dtype), IMAGE)
    with counted() as seen:
        merge_tokens(*args)
    moved = seen["global_load_unique_bytes"] + seen["global_store_unique_bytes"]
    assert cost(*args).bytes <= moved <= 1.05 * cost(*args).bytes
    assert seen["global_load_sectors"] == seen["global_load_sectors_least"]
    # runs of feature rows' tokens start anywhere in a sector: one more for each run and for each warp's end
    assert seen["global_store_sectors"] <= seen["global_store_sectors_least"] + 8


def test_opcheck():
    opcheck(torch.ops.vlmops.merge_tokens.default, (*make([1, 7, 7, 2]), IMAGE, "cuda"))
