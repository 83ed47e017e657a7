"""linear against F.linear, from one row to a thousand."""

from vlmops.profiling.suite import Case

CASES = (
    Case("linear", "Qwen2-VL qkv", cpu=dict(rows=1024), quick=dict(rows=256)),
    Case("linear", "Mllama gated output", load="Mllama's gated output", cpu=dict(rows=256)),
    Case("linear", "decoding", load="decoding, 1 x", quick={}),
    Case("linear", "decoding 16 sequences", load="decoding, 16 x"),
)


def test_speed(interleaved):
    interleaved()
