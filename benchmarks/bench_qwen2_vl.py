"""Qwen2-VL-2B's vision tower, 4096 patches, 4 layers, random weights: patched, stock, packed products alone."""

from __future__ import annotations

from functools import lru_cache

import pytest

import vlmops
from vlmops.profiling import bars, towers
from vlmops.profiling.peak import packed_sequence
from vlmops.profiling.timing import Work, agrees


@lru_cache(maxsize=1)
def checked(dtype):
    """Tower and calls; the patched output compared once."""
    tower = towers.build("qwen2_vl", bars.DTYPES[dtype])
    patched = vlmops.patch_model(towers.shared_copy(tower.module))
    calls = {"patched": lambda: tower.run(patched), "stock": tower.run}
    agrees("patched", "stock", towers.reference(tower))({who: call() for who, call in calls.items()})
    calls["products alone"], products = packed_sequence(tower.products, bars.DTYPES[dtype])
    return calls, Work(products.flops + tower.attention.flops + tower.windows.flops), products


@pytest.mark.parametrize("who", ["patched", "stock", "products alone"])
@pytest.mark.parametrize("dtype", bars.DTYPES)
def test_speed(timed, dtype, who):
    calls, work, products = checked(dtype)
    timed("qwen2_vl", dtype, calls[who], products if who == "products alone" else work)
