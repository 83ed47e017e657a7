"""mlp against the stock module's lines."""

from vlmops.profiling.suite import Case

CASES = (
    Case("mlp", "LLaVA projector", quick=dict(rows=144)),
    Case("mlp", "CLIP-L", cpu=dict(rows=577)),
    Case("mlp", "Qwen2.5-VL SwiGLU", cpu=dict(rows=1024)),
    Case("mlp", "Qwen2-VL merger", cpu=dict(rows=1024)),
)


def test_speed(interleaved):
    interleaved()
