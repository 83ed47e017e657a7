"""CLIP-L/14-336's vision tower."""

from vlmops.profiling.suite import Model

CASES = (Model("clip_l_336", "tower", quick=True),)


def test_speed(interleaved):
    interleaved()
