"""Packed weights never outlive what they were made of."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import vlmops
from vlmops.ops import linear
from vlmops.ops._shared import gemm_cpu, packing
from vlmops.ops._shared.packing import STORE, PackedStore


def run(layer, x):
    with vlmops.use_backend("cpu"), torch.no_grad():
        return linear(x, layer.weight, layer.bias)


@pytest.fixture
def layer():
    STORE.clear()
    return nn.Linear(64, 96)


CHANGES = {
    "optimizer step": lambda p: torch.optim.SGD([p], lr=0.5).step(),
    "p.data.mul_": lambda p: p.data.mul_(2.0),
    "p.data =": lambda p: setattr(p, "data", torch.randn_like(p.data)),
    "in place": lambda p: torch.no_grad()(lambda: p.add_(1.0))(),
    "copy_": lambda p: p.data.copy_(torch.randn_like(p.data)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_is_packed_again(layer, change):
    x = torch.randn(20, 64)
    run(layer, x)
    layer.weight.grad = torch.ones_like(layer.weight)
    CHANGES[change](layer.weight)
    torch.testing.assert_close(
        run(layer, x), nn.functional.linear(x, layer.weight, layer.bias).detach(), atol=1e-4, rtol=1e-4
    )


def test_load_state_dict_is_noticed(layer):
    x = torch.randn(20, 64)
    run(layer, x)
    layer.load_state_dict(nn.Linear(64, 96).state_dict())
    torch.testing.assert_close(run(layer, x), layer(x).detach(), atol=1e-5, rtol=1e-5)


def test_inference_tensors(layer):
    x = torch.randn(20, 64)
    with torch.inference_mode():
        weight = torch.randn(96, 64)
        first = linear(x, weight)
        weight.mul_(2.0)
        torch.testing.assert_close(linear(x, weight), 2 * first, atol=1e-4, rtol=1e-4)


def test_a_packed_weight_is_used_again(layer):
    run(layer, torch.randn(20, 64))
    held = STORE.bytes
    assert held == 64 * 96 * 4
    run(layer, torch.randn(33, 64))
    assert STORE.bytes == held
    assert vlmops.packed_bytes(layer) == held


def test_a_dead_parameter_frees_its_packed_form(layer):
    other = nn.Linear(64, 96)
    run(other, torch.randn(20, 64))
    assert STORE.bytes > 0
    del other
    gc.collect()
    assert STORE.bytes == 0


def test_deepcopy_does_not_share(layer):
    x = torch.randn(20, 64)
    run(layer, x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(3.0)
    torch.testing.assert_close(run(twin, x), twin(x).detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(layer, x), layer(x).detach(), atol=1e-5, rtol=1e-5)


def test_repack_forgets(layer):
    run(layer, torch.randn(20, 64))
    with torch.no_grad():
        layer.weight.detach().numpy()[5, 7] = 1e3  # behind torch's back: version and samples stay
    vlmops.repack(layer)
    assert vlmops.packed_bytes(layer) == 0
    x = torch.randn(20, 64)
    torch.testing.assert_close(run(layer, x), layer(x).detach(), atol=1e-3, rtol=1e-4)


def parameters(count, rows=10):
    return [nn.Parameter(torch.randn(rows, 10)) for _ in range(count)]


def test_the_budget_drops_the_least_recently_used():
    store, weights = PackedStore(budget=3 * 400, idle_s=0.0), parameters(4)
    for w in weights[:3]:
        store.get(w, "copy", torch.clone)
    store.get(weights[0], "copy", torch.clone)
    store.get(weights[3], "copy", torch.clone)
    assert store.bytes == 1200
    assert store.size_of({id(weights[1])}) == 0, "the oldest unused one goes"
    assert store.size_of({id(weights[0])}) == 400
    (big,) = parameters(1, 100)
    assert store.get(big, "copy", torch.clone) is None, "one that cannot fit is used as it is"
    assert store.bytes == 1200, "and drops nothing"


def test_a_model_over_the_budget_is_not_packed_anew_in_every_forward():
    store, weights, packs = PackedStore(budget=3 * 400), parameters(5), []
    for _ in range(4):
        for w in weights:
            store.get(w, "copy", lambda w: packs.append(1) or w.clone())
    assert len(packs) == 3
    assert store.bytes == 1200


def test_over_the_budget_the_result_is_the_same(layer, monkeypatch):
    monkeypatch.setattr(STORE, "_budget", 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(20, 64, dtype=dtype)
        torch.testing.assert_close(run(layer.to(dtype), x), layer(x).detach(), atol=2e-2, rtol=2e-2)
    assert STORE.bytes == 0


def test_the_default_budget(monkeypatch):
    monkeypatch.setenv("VLMOPS_PACK_BUDGET_MB", "1.5")
    assert PackedStore(packing._default_budget).budget == 3 * 2**19
    monkeypatch.setenv("VLMOPS_PACK_BUDGET_MB", "much")
    with pytest.raises(ValueError, match="VLMOPS_PACK_BUDGET_MB: expected a number"):
        packing._default_budget()
    monkeypatch.delenv("VLMOPS_PACK_BUDGET_MB")
    free = packing._available_memory()
    assert free is None or 0 < packing._default_budget() <= free


def test_a_weight_that_is_cast_anew_at_every_call_is_not_packed(layer, monkeypatch):
    monkeypatch.setattr(gemm_cpu, "_pack", lambda w: pytest.fail("packed"))
    x = torch.randn(20, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [run(layer, x) for _ in range(3)]
    assert outs[0].dtype == torch.bfloat16
    torch.testing.assert_close(outs[2].float(), layer(x).detach(), atol=3e-2, rtol=3e-2)


def test_a_plain_tensor_that_stays_is_packed_at_its_second_use():
    STORE.clear()
    x, weight = torch.randn(20, 64), torch.randn(96, 64)
    with vlmops.use_backend("cpu"):
        outs = [linear(x, weight) for _ in range(3)]
    assert STORE.bytes == 64 * 96 * 4
    torch.testing.assert_close(outs[0], outs[2], atol=1e-4, rtol=1e-4)


def test_a_parameter_that_got_other_memory_frees_the_packed_form(layer):
    run(layer, torch.randn(20, 64))
    layer.half()  # the same Parameter objects, other storages
    assert vlmops.packed_bytes() == 0
    assert STORE.bytes == 0


def test_a_view_of_a_parameter_is_packed_once():
    STORE.clear()
    weight = nn.Parameter(torch.randn(96, 4, 4, 4))
    x = torch.randn(20, 64)
    with vlmops.use_backend("cpu"), torch.no_grad():
        for _ in range(3):
            out = linear(x, weight.flatten(1))
        assert STORE.bytes == 64 * 96 * 4
        torch.testing.assert_close(out, x @ weight.flatten(1).t(), atol=1e-4, rtol=1e-4)
        halves = [linear(x, part) for part in weight.flatten(1).split(48)]
        held = STORE.bytes
        torch.testing.assert_close(torch.cat(halves, 1), out, atol=1e-4, rtol=1e-4)
        [linear(x, part) for part in weight.flatten(1).split(48)]
        assert held == STORE.bytes == 2 * 64 * 96 * 4
        weight.mul_(2.0)
        torch.testing.assert_close(linear(x, weight.flatten(1)), 2 * out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (1024, 1024), (1000, 77), (3, 5), (16,), (1280, 3420)])
def test_the_sample_sees_blocks_of_rows_and_of_columns(shape):
    weight = torch.zeros(shape)
    view = packing._sampled(weight)
    assert len(view) == min(packing.SAMPLES, weight.numel())
    if weight.dim() == 2 and weight.numel() >= packing.SAMPLES:
        for dim in (0, 1):
            quarter = -(-shape[dim] // 4)
            before = view.tobytes()
            weight.narrow(dim, shape[dim] // 2, min(quarter, shape[dim] - shape[dim] // 2)).data.add_(1.0)
            assert view.tobytes() != before, f"a quarter of dimension {dim} changed"


def test_threads_that_pack_at_once_agree(layer):
    x = torch.randn(20, 64)
    want = layer(x).detach()
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda _: run(layer, x), range(64)))
    for out in outs:
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert STORE.bytes == 64 * 96 * 4
