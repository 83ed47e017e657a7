"""No Triton kernel's answer depends on the order in which a GPU runs its programs: outputs and gradients, bit for bit.

The interpreter runs every launch in another order (tests/support/triton_interpreter.py). Together with its race check, and no
atomics in any kernel's source, that is determinism up to what only hardware can show.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest
import torch

import vlmops
from tests.support import triton_canaries, triton_interpreter
from vlmops import ops
from vlmops.ops._shared.registry import OPS

pytest.importorskip("triton")
triton_interpreter.install()

ROOT = Path(vlmops.__file__).parent


def t(*shape):
    return torch.randn(*shape, requires_grad=True)


def cu(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def ids(*shape, high):
    return torch.randint(high, shape)


#: The op's folder, then what is special; shapes that give every large kernel several programs.
CASES = {
    "varlen_attention": lambda: (
        ops.varlen_attention, (t(65, 2, 8), t(65, 1, 8), t(65, 1, 8), cu(40, 5, 20)), dict(causal=True, return_lse=True)),
    "varlen_attention rope": lambda: (
        ops.varlen_attention, (t(45, 2, 8), t(45, 2, 8), t(45, 2, 8), cu(40, 5)),
        dict(rope=(torch.randn(45, 8), torch.randn(45, 8)), window=(8, 8))),
    "cross_attention": lambda: (
        ops.cross_attention, (t(70, 2, 8), t(60, 2, 8), t(60, 2, 8), cu(40, 30), cu(20, 30, 10)),
        dict(media_index=ids(70, high=2).int() - 1)),
    "perceiver_attention": lambda: (
        ops.perceiver_attention, (t(12, 2, 8), t(45, 2, 8), t(45, 2, 8), t(12, 2, 8), t(12, 2, 8), cu(40, 5)),
        dict(num_latents=6)),
    "fp8_attention": lambda: (
        ops.fp8_attention, tuple(t(45, 2, 16).detach() for _ in range(3)) + (cu(40, 5),), {}),
    "patchify": lambda: (ops.patchify, (t(5, 1, 3, 16, 16), t(70, 3, 4, 4), t(70)), dict(patch_size=4)),
    "linear": lambda: (ops.linear, (t(70, 24), t(70, 24), t(70)), dict(activation="gelu", residual=t(70, 70), gate=t(70))),
    "linear few rows": lambda: (ops.linear, (t(2, 24), t(70, 24), t(70)), {}),
    "quantized_linear": lambda: (
        ops.quantized_linear, (t(70, 64), ops.quantize_weight(torch.randn(70, 64), kind="int4", group_size=32), t(70)), {}),
    "quantized_linear few rows": lambda: (
        ops.quantized_linear, (t(2, 64), ops.quantize_weight(torch.randn(70, 64), kind="int8")), {}),
    "mlp": lambda: (ops.mlp, (t(70, 24), t(70, 24), t(70), t(24, 70), t(24)), dict(activation="silu")),
    "norms": lambda: (ops.layer_norm, (t(70, 40), t(40), t(40)), dict(eps=1e-5)),
    "norms residual": lambda: (ops.rms_norm, (t(70, 40), t(40)), dict(eps=1e-5, residual=t(70, 40))),
    "rotary": lambda: (ops.rotary, (t(40, 4, 8), torch.randn(40, 8), torch.randn(40, 8)), dict(k=t(40, 2, 8))),
    "merge_tokens": lambda: (ops.merge_tokens, (torch.arange(40) % 4, t(40, 24), t(10, 24), 3), {}),
    "linear_cross_entropy": lambda: (
        ops.linear_cross_entropy, (t(70, 20), t(140, 20), ids(70, high=140)),
        dict(bias=t(140), label_smoothing=0.1, softcap=8.0)),
    "linear_cross_entropy none": lambda: (
        ops.linear_cross_entropy, (t(70, 20), t(140, 20), ids(70, high=140)), dict(reduction="none")),
}  # fmt: skip


def leaves(x):
    if isinstance(x, torch.Tensor):
        return [x] if x.requires_grad else []
    return [y for z in (x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else ()) for y in leaves(z)]


def results(fn, args, kwargs):
    """Outputs, then gradients."""
    with vlmops.use_backend("triton"):
        outs = fn(*args, **kwargs)
    outs = [*outs] if isinstance(outs, tuple) else [outs]
    inputs = leaves((args, kwargs))
    if not inputs:
        return outs
    loss = sum((o.float() * torch.arange(1, o.numel() + 1).view(o.shape)).sum() for o in outs if o.requires_grad)
    return [*outs, *(g for g in torch.autograd.grad(loss, inputs, allow_unused=True) if g is not None)]


def test_every_op_has_a_case():
    have = {name for name, op in OPS.items() if "triton" in op.backends}
    assert have == {name.split()[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_any_order_of_programs_gives_the_same_bits(name):
    case = CASES[name]()
    with triton_interpreter.count() as seen:
        want = results(*case)
    assert seen.programs >= seen.launches + 3  # there is an order to change
    for kind in ("reverse", "shuffled"):
        with triton_interpreter.order(kind, seed=3):
            got = results(*case)
        assert len(got) == len(want)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(a, b), f"result {i} in {kind} order"


def test_the_order_is_really_another():
    def written():
        out = torch.zeros(6)
        triton_canaries.count_before[(2, 3)](out, 6, 8)
        return out - 1

    assert written().tolist() == [0, 1, 2, 3, 4, 5]
    with triton_interpreter.order("reverse"):
        assert written().tolist() == [5, 4, 3, 2, 1, 0]
    with triton_interpreter.order("shuffled", 1):
        first = written()
    with triton_interpreter.order("shuffled", 2):
        second = written()
    assert sorted(first.tolist()) == sorted(second.tolist()) == [0, 1, 2, 3, 4, 5] and not torch.equal(first, second)
    with pytest.raises(ValueError, match="kind: expected"), triton_interpreter.order("sideways"):
        pass


def kernels():
    """Every function under vlmops that Triton compiles, by name."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        if "@triton.jit" in path.read_text():
            module = importlib.import_module("vlmops." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
            for name, value in vars(module).items():
                if isinstance(value, (InterpretedFunction, JITFunction)):
                    found[f"{value.fn.__module__}.{name}"] = value.fn
    return found


def atomics(fn):
    tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    return [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("atomic_")]


def test_no_kernel_uses_atomics():
    found = kernels()
    assert len(found) > 20
    assert not {name: used for name, fn in found.items() if (used := atomics(fn))}


def test_an_atomic_would_be_found():
    assert atomics(triton_canaries.add_atomically.fn) == ["atomic_add"]
