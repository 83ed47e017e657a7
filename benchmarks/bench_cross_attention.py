"""cross_attention against SDPA over all keys, under a dense mask where not every row sees every image."""

from vlmops.profiling.suite import Case

CASES = (
    Case("cross_attention", "Mllama", cpu=dict(text=128), quick=dict(text=64, images=1)),
    Case("cross_attention", "Flamingo", cpu=dict(text=512)),
)


def test_speed(interleaved):
    interleaved()
