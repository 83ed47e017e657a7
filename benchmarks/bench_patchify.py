"""patchify against rescaling, normalising and convolving."""

from vlmops.profiling.suite import Case

CASES = (
    Case("patchify", "Qwen2-VL from bytes", load="Qwen2-VL", cpu=dict(side=448), quick=dict(side=224)),
    Case("patchify", "CLIP-L-336 from bytes", load="CLIP-L-336", cpu=dict(images=2)),
)


def test_speed(interleaved):
    interleaved()
