"""Packed weights never outlive what they were made of."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import vlmops
from vlmops.ops import linear
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
    torch.testing.assert_close(run(layer, x), nn.functional.linear(x, layer.weight, layer.bias).detach(), atol=1e-4, rtol=1e-4)


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


def test_the_budget_drops_the_least_recently_used():
    store = PackedStore(budget=3 * 400)
    weights = [torch.randn(10, 10) for _ in range(4)]
    for w in weights[:3]:
        store.get(w, "copy", torch.clone)
    store.get(weights[0], "copy", torch.clone)
    store.get(weights[3], "copy", torch.clone)
    assert store.bytes == 1200
    assert store.size_of({id(weights[1])}) == 0, "the oldest unused one goes"
    assert store.size_of({id(weights[0])}) == 400
    big = torch.randn(100, 100)
    assert store.get(big, "copy", torch.clone).shape == big.shape
    assert store.size_of({id(big)}) == 0, "one that cannot fit is not kept"
