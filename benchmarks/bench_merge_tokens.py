"""merge_tokens against masked_scatter."""

from vlmops.profiling.suite import Case

CASES = (Case("merge_tokens", "Qwen2-VL-2B", load="4096 tokens", cpu=dict(rows=1024, pictured=768), quick={}),)


def test_speed(interleaved):
    interleaved()
