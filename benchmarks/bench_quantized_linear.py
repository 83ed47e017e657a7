"""quantized_linear against F.linear on the weight dequantised before."""

from vlmops.profiling.suite import Case

CASES = (
    Case("quantized_linear", "decoding int4", load="decoding, int4", quick={}),
    Case("quantized_linear", "decoding int8", load="decoding, int8"),
    Case("quantized_linear", "prefill fp8", load="prefill, fp8", cpu=dict(rows=128)),
)


def test_speed(interleaved):
    interleaved()
