"""rms_norm and layer_norm against torch's."""

from vlmops.profiling.suite import Case

CASES = (
    Case("norms", "layer_norm Qwen2-VL", load="layer_norm, Qwen2-VL", cpu=dict(rows=1024), quick={}),
    Case("norms", "rms_norm Qwen2.5-VL", load="rms_norm, Qwen2.5-VL", cpu=dict(rows=1024)),
    Case("norms", "rms_norm after a residual", cpu=dict(rows=512)),
)


def test_speed(interleaved):
    interleaved()
