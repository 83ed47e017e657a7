"""rotary against the expression of transformers."""

from vlmops.profiling.suite import Case

CASES = (Case("rotary", "Qwen2-VL", cpu=dict(rows=1024), quick={}),)


def test_speed(interleaved):
    interleaved()
