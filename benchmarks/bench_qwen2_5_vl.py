"""Qwen2.5-VL-3B's vision tower: one layer over windows, one over the whole image."""

from vlmops.profiling.suite import Model

CASES = (Model("qwen2_5_vl", "tower", patches=1024),)


def test_speed(interleaved):
    interleaved()
