"""Arrays of other libraries in the place of tensors. NumPy stands in for CuPy: the protocol is the same."""

from __future__ import annotations

import timeit

import numpy as np
import pytest
import torch

from vlmops import ops
from vlmops.ops._shared.dlpack import accepts_arrays, as_tensor


def arrays():
    rng = np.random.default_rng(0)
    return rng.standard_normal((6, 2, 8), dtype=np.float32), rng.standard_normal((6, 8), dtype=np.float32)


def test_arrays_are_taken_and_tensors_come_back():
    x, table = arrays()
    out, k = ops.rotary(x, table, sin=table, k=x)
    want = ops.rotary(*map(torch.from_numpy, (x, table, table)))
    assert isinstance(out, torch.Tensor) and torch.equal(out, want) and torch.equal(k, want)
    assert np.array_equal(np.from_dlpack(out), want.numpy()), "and on to the other library"


def test_arrays_beside_tensors_and_inside_tuples():
    q = np.random.default_rng(0).standard_normal((5, 2, 8), dtype=np.float32)
    table = torch.randn(5, 8)
    cu = np.array([0, 2, 5], np.int32)
    out = ops.varlen_attention(q, torch.from_numpy(q), q, cu, rope=(table.numpy(), table))
    t = torch.from_numpy(q)
    torch.testing.assert_close(out, ops.varlen_attention(t, t, t, torch.from_numpy(cu), rope=(table, table)))


def test_no_copy():
    x, _ = arrays()
    assert as_tensor(x).data_ptr() == x.ctypes.data
    pair = (torch.ones(1), 2)
    assert as_tensor(pair) is pair


def test_a_bad_array_is_named_as_a_tensor_would_be():
    x, table = arrays()
    with pytest.raises(ValueError, match=r"x: expected 3 dimensions"):
        ops.rotary(x[0], table, table)
    with pytest.raises(TypeError, match=r"x: expected a tensor"):
        ops.rotary([1.0], table, table)


def test_every_op_takes_them():
    functions = [getattr(ops, name) for name in ops.__all__ if callable(getattr(ops, name))]
    assert all(hasattr(f, "__wrapped__") for f in functions if not isinstance(f, type))


def test_the_signature_stays():
    import inspect

    assert list(inspect.signature(ops.rotary).parameters) == ["x", "cos", "sin", "k", "interleaved"]


def test_tensors_pay_less_than_a_microsecond():
    """One more Python call. The best of many short runs, against the same function without it."""

    def plain(a, b=None, *, c=None):
        return a

    wrapped, x = accepts_arrays(plain), torch.ones(1)
    best = {f: min(timeit.repeat(lambda f=f: f(x, x, c=x), number=2000, repeat=60)) / 2000 for f in (plain, wrapped)}
    assert best[wrapped] - best[plain] < 1e-6
