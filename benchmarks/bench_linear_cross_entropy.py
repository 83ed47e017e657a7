"""linear_cross_entropy against the logits matrix and F.cross_entropy."""

from vlmops.profiling.suite import Case

CASES = (Case("linear_cross_entropy", "Qwen2-VL-2B", cpu=dict(rows=256, words=32000), quick=dict(rows=64, words=8192)),)


def test_speed(interleaved):
    interleaved()
