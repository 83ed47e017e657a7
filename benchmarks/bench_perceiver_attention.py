"""perceiver_attention against SDPA over context and latents concatenated."""

from vlmops.profiling.suite import Case

CASES = (
    Case("perceiver_attention", "Flamingo", cpu=dict(items=4), quick=dict(items=2)),
    Case("perceiver_attention", "Idefics2", cpu=dict(items=1)),
)


def test_speed(interleaved):
    interleaved()
