"""What the tests of the attentions' CUDA backwards share."""

from __future__ import annotations

import pytest
import torch

import vlmops
from vlmops.backends import cuda_simt
from vlmops.ops._shared.cuda_attention_backward import GradShape
from vlmops.ops.cross_attention import cuda_backward as cross
from vlmops.ops.perceiver_attention import cuda_backward as perceiver
from vlmops.ops.varlen_attention import cuda_backward as packed

__all__ = ["NARROW", "clamped", "force", "gradients", "low", "narrow"]

BF16 = torch.bfloat16
NARROW = GradShape(1, 32, 32)  # the block of short sequences, of every test that does not ask for another


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """One block for most tests: every other one is a kernel to compile."""
    force(monkeypatch, NARROW)


def force(monkeypatch, block):
    for module in (packed, cross, perceiver):
        monkeypatch.setattr(module, "grad_shape", lambda *_: block)


def low(args, dtype=BF16):
    return [x.detach().to(dtype) if x is not None and x.is_floating_point() else x for x in args]


def clamped(call):
    """No access leaves the tensors; two sequences may own one row, and write it one after the other."""
    found = ""
    try:
        call()
    except cuda_simt.SimtError as error:
        found = str(error)
    assert not found or "race" in found
    words = ("out-of-bounds", "misaligned", "uninitialised", "async", "deadlock", "divergence")
    assert not any(word in found for word in words)


def gradients(fn, args, options, grads=None):
    """out, and the gradients of q, k and v in BF16 from one gradient of out."""
    args = [x.detach().requires_grad_() if x.is_floating_point() else x for x in low(args)]
    with vlmops.use_backend("cuda"):
        out = fn(*args, **options)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
        return out, torch.autograd.grad(out, args[:3], grad if grads is None else grads)
