"""Qwen2-VL-2B: the vision tower, and a model of the reference stack."""

from vlmops.profiling.suite import Model

CASES = (
    Model("qwen2_vl", "tower", patches=1024, quick=True),
    Model("qwen2_vl", "model", quick=True),
)


def test_speed(interleaved):
    interleaved()
