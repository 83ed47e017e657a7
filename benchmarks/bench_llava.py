"""LLaVA-1.5-7B: CLIP-L/14-336 and Vicuna-7B, in few layers that fit a small machine."""

from vlmops.profiling.suite import Model

CASES = (Model("llava", "model"),)


def test_speed(interleaved):
    interleaved()
