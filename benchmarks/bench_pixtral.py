"""Pixtral's vision tower on four images."""

from vlmops.profiling.suite import Model

CASES = (Model("pixtral", "tower", patches=1024, quick=True),)


def test_speed(interleaved):
    interleaved()
