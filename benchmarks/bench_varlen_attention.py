"""varlen_attention against SDPA: a batch where all sequences are of one length, else one call a sequence."""

from vlmops.profiling.suite import Case

CASES = (
    Case("varlen_attention", "CLIP-L-336", cpu=dict(lengths=(577,) * 2), quick=dict(lengths=(577,))),
    Case("varlen_attention", "SigLIP-so400m", cpu=dict(lengths=(729,))),
    Case("varlen_attention", "Qwen2-VL", load="Qwen2-VL, 4096 patches, head 80", cpu=dict(lengths=(1024,))),
    Case("varlen_attention", "Qwen2-VL packed", load="Qwen2-VL, packed"),
    Case("varlen_attention", "Qwen2.5-VL windows", load="Qwen2.5-VL, 64 windows", cpu=dict(lengths=(64,) * 16)),
    Case("varlen_attention", "Qwen2-VL-2B prefill", cpu=dict(lengths=(1024,))),
)


def test_speed(interleaved):
    interleaved()
