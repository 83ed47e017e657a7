"""Every op inside torch.compile(fullgraph=True) on fake CUDA tensors: no GPU, no graph break, right shapes.

The CPU build of torch has no autograd engine for CUDA, so the backward ops are traced directly, as AOTAutograd would.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmops import ops
from vlmops.ops._shared.registry import OPS

BF16 = torch.bfloat16


def t(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def cu(n):
    return t(n + 1, dtype=torch.int32)


def quantized(kind):
    """A weight [32, 48] in few bits."""
    dtype, columns = {"int8": (torch.int8, 128), "int4": (torch.uint8, 64), "fp8": (torch.float8_e4m3fn, 128)}[kind]
    zero = t(1, 32, dtype=torch.uint8) if kind == "int4" else None
    scale = t(1, 32, dtype=torch.float32)
    size = 128 if kind == "int4" else None
    return ops.QuantizedWeight(kind, t(32, columns, dtype=dtype), scale, zero, size, (32, 48), BF16)


CASES = {
    "varlen_attention": lambda: (ops.varlen_attention, (t(64, 4, 80), t(64, 2, 80), t(64, 2, 80), cu(3)), dict(causal=True)),
    "varlen_attention rope": lambda: (
        ops.varlen_attention, (t(64, 4, 72), t(64, 4, 72), t(64, 4, 72), cu(3)),
        dict(rope=(t(64, 72, dtype=torch.float32), t(64, 72, dtype=torch.float32)), window=(8, 8)),
    ),
    "cross_attention": lambda: (
        ops.cross_attention, (t(64, 4, 64), t(96, 4, 64), t(96, 4, 64), cu(2), cu(3)),
        dict(media_index=t(64, dtype=torch.int32)),
    ),
    "perceiver_attention": lambda: (
        ops.perceiver_attention, (t(16, 4, 64), t(96, 4, 64), t(96, 4, 64), t(16, 4, 64), t(16, 4, 64), cu(2)),
        dict(num_latents=8),
    ),
    "patchify": lambda: (ops.patchify, (t(2, 1, 3, 28, 28), t(32, 3, 14, 14), t(32)), dict(patch_size=14)),
    "patchify mixed": lambda: (
        ops.patchify, ([t(3, 28, 28), t(2, 3, 14, 42)], t(32, 3, 2, 14, 14), t(32)),
        dict(patch_size=14, temporal_patch_size=2, mean=[0.5], std=[0.5], position=t(7, 32)),
    ),
    "patchify rows": lambda: (
        ops.patchify, (t(8, 1176), t(32, 3, 2, 14, 14)),
        dict(patch_size=14, temporal_patch_size=2, grid_thw=t(2, 3, dtype=torch.int64)),
    ),
    "linear": lambda: (ops.linear, (t(10, 48), t(32, 48), t(32)), dict(activation="gelu", residual=t(10, 32))),
    "mlp": lambda: (ops.mlp, (t(10, 48), t(64, 48), t(64), t(32, 64), t(32)), dict(activation="quick_gelu")),
    "layer_norm": lambda: (ops.layer_norm, (t(10, 48), t(48), t(48)), dict(eps=1e-5)),
    "rms_norm": lambda: (ops.rms_norm, (t(10, 48), t(48)), dict(eps=1e-5, residual=t(10, 48))),
    "rotary": lambda: (ops.rotary, (t(10, 4, 80), t(10, 80), t(10, 80)), dict(k=t(10, 2, 80))),
    "merge_tokens": lambda: (ops.merge_tokens, (t(20, dtype=torch.int64), t(20, 48), t(6, 48), 7), {}),
    "quantized_linear int8": lambda: (ops.quantized_linear, (t(10, 48), quantized("int8"), t(32)), dict(gate=t(1))),
    "quantized_linear int4": lambda: (ops.linear, (t(10, 48), quantized("int4")), dict(residual=t(10, 32))),
    "quantized_linear fp8": lambda: (ops.quantized_linear, (t(10, 48), quantized("fp8")), dict(quantize_activations=True)),
    "fp8_attention": lambda: (ops.fp8_attention, (t(64, 4, 80), t(64, 2, 80), t(64, 2, 80), cu(3)), dict(causal=True)),
    "linear_cross_entropy": lambda: (ops.linear_cross_entropy, (t(10, 48), t(100, 48), t(10, dtype=torch.int64)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    torch._dynamo.reset()
    with FakeTensorMode():
        fn, args, kwargs = CASES[name]()
        eager = fn(*args, **kwargs)
        compiled = torch.compile(lambda *a: fn(*a, **kwargs), fullgraph=True, backend="aot_eager")(*args)
    eager, compiled = (x if isinstance(x, tuple) else (x,) for x in (eager, compiled))
    for a, b in zip(eager, compiled, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def captured(name):
    """The raw op's arguments of a case, as the face makes them."""
    fn, args, kwargs = CASES[name]()
    op = OPS[{"layer_norm": "norms", "rms_norm": "norms"}.get(name.split()[0], name.split()[0])]
    seen = []
    raw, op.raw = op.raw, lambda *a: (seen.append(a), raw(*a))[1]
    try:
        fn(*args, **kwargs)
    finally:
        op.raw = raw
    return op, list(seen[0][:-1])


@pytest.mark.parametrize("name", CASES)
def test_backward(name):
    torch._dynamo.reset()
    with FakeTensorMode():
        op, inputs = captured(name)
        outs = op.raw(*inputs, "triton")
        outs = outs if isinstance(outs, (tuple, list)) else (outs,)
        needs = [inputs[i] is not None for i in op.diff]

        def backward(grads, saved, *tensors):
            return op.raw_backward(*grads, *saved, *tensors, needs, "triton")

        run = torch.compile(backward, fullgraph=True, backend="aot_eager")
        grads = run([torch.empty_like(o) for o in outs], [outs[i] for i in op.saved_outputs], *inputs)
    grads = grads if isinstance(grads, (tuple, list)) else (grads,)
    for i, need, grad in zip(op.diff, needs, grads, strict=True):
        if need:
            assert grad.shape == inputs[i].shape and grad.dtype == inputs[i].dtype and grad.device.type == "cuda"
