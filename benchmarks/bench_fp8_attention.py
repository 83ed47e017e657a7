"""fp8_attention against SDPA in the arguments' own precision."""

from vlmops.profiling.suite import Case

CASES = (Case("fp8_attention", "Qwen2-VL", cpu=dict(lengths=(512,)), quick=dict(lengths=(256,))),)


def test_speed(interleaved):
    interleaved()
