"""The matrix product under linear and mlp: every configuration of every GPU, tensor descriptors, 64-bit offsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.test_linear_triton import check, make, some
from tests.support import triton_interpreter
from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import TARGETS, Target
from vlmops.ops._shared import triton_gemm_launch as launch_code
from vlmops.ops._shared.triton_gemm_launch import Epilogue, Gathered, Product, gemm

pytest.importorskip("triton")
triton_interpreter.install()

BF16 = torch.bfloat16


# -- tiles -----------------------------------------------------------------------------------------------------------


def every_config(monkeypatch, run):
    """run() once for each configuration of every kernel it launches; how many there were."""
    most, i = 1, 0
    while i < most:

        def choose(op, key, configs, run, device, i=i):
            nonlocal most
            most = max(most, len(configs))
            return configs[i % len(configs)]

        monkeypatch.setattr(triton_runtime, "pick", choose)
        run()
        i += 1
    return most


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(monkeypatch, target):
    """Of every GPU, persistent grids and tensor descriptors included: few rows, and a few tiles each way."""
    monkeypatch.setitem(TARGETS, target, Target(**{**vars(TARGETS[target]), "processors": 3}))
    few, many = make((3,), 40, 24, grad=False), make((150,), 40, 72, grad=False)

    def run():
        with triton_runtime.assume(TARGETS[target]):
            check(few, {}, BF16)
            check(many, dict(activation="silu"), BF16)

    assert every_config(monkeypatch, run) >= 3


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_every_configuration_of_float32(monkeypatch, target):
    def run():
        with triton_runtime.assume(TARGETS[target]):
            check(make((70,), 40, 40), dict(activation="silu"))

    assert every_config(monkeypatch, run) >= 3


def test_tiles_follow_the_shape():
    def first(m, n, target="sm_90"):
        with triton_runtime.assume(TARGETS[target]):
            return Product(*(torch.empty(s, 1024, dtype=BF16, device="meta") for s in (m, n))).configs(persistent=True)[
                0
            ]

    assert (first(8192, 8192)["BM"], first(8192, 8192)["BN"]) == (128, 128)
    assert (first(16, 4096)["BM"], first(16, 4096)["BN"]) == (
        16,
        32,
    )  # 32 tiles of 128 columns leave 100 SMs without work
    assert first(8192, 8192)["PERSISTENT"] is False and first(2, 8192)["BM"] == 16


# -- tensor descriptors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_tensor_descriptors(activation, dtype):
    """Forward and every gradient by TMA, ends of rows and columns included."""
    kwargs = dict(activation=activation, gate=torch.randn(72, requires_grad=True), row_mask=some(72))
    with triton_runtime.assume(TARGETS["sm_90"]):
        check(make((72,), 40, 72), kwargs, dtype)  # more than one tile each way, of the transposed products too


def described(target, a, b, **options):
    """Whether the launch takes A and B by descriptor."""
    with triton_runtime.record(TARGETS[target]) as launches:
        gemm(a, b, **options)
    return [hasattr(x, "block_shape") for x in launches[0].args[:2]]


def test_descriptors_where_they_fit():
    def empty(*shape, dtype=BF16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    a, b = empty(256, 64), empty(128, 64)
    assert described("sm_90", a, b) == described("sm_100", a, b) == [True, True]
    assert described("sm_90", empty(64, 256).t(), empty(64, 128).t()) == [True, True]
    assert described("sm_80", a, b) == described("gfx942", a, b) == [False, False]
    assert described("sm_90", empty(256, 68)[:, :64], b) == [False, False]  # rows 136 bytes apart
    assert described("sm_90", empty(256, 72)[:, 4:68], b) == [False, False]  # begins 8 bytes late
    assert described("sm_90", empty(1, 64).expand(256, 64), b) == [False, False]
    assert described("sm_90", a.float(), b.float()) == [False, False]
    assert described("sm_90", Gathered(empty(2, 512, 16), "pixel_shuffle", 32, 16), b) == [False, False]


def test_an_older_triton_without_host_descriptors(monkeypatch):
    monkeypatch.setattr(launch_code, "_descriptor", lambda: None)
    a, b = (torch.empty(256, 64, dtype=BF16, device="meta") for _ in range(2))
    assert described("sm_90", a, b) == [False, False]


# -- 64-bit offsets ------------------------------------------------------------------------------------------------------


def huge(shape, strides):
    return torch.empty_strided(shape, strides, dtype=BF16, device="meta")


def addresses(monkeypatch, run, target=triton_runtime.INTERPRETER):
    """Bytes into each argument that the launches of run() touch: (loads and stores) by address, no memory behind them.

    run() works on meta tensors. Returns a function: is element ``offset`` of the tensor touched?
    """
    from triton.runtime import interpreter as base

    seen = []

    def load(self, ptrs, mask, other, *args, **kwargs):
        seen.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
        scalar = ptrs.get_element_ty()
        return base.TensorHandle(np.zeros(ptrs.data.shape, base._get_np_dtype(scalar)), scalar)

    def store(self, ptrs, value, mask, *args, **kwargs):
        seen.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())

    with triton_runtime.record(target) as launches:
        run()
    monkeypatch.setattr(base.InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(base.InterpreterBuilder, "create_masked_store", store)
    stand_ins = {}
    for launch in launches:
        for x in launch.args:
            if isinstance(x, torch.Tensor):
                stand_ins.setdefault(id(x), (x, torch.zeros(1, dtype=x.dtype)))
        args = [stand_ins[id(x)][1] if isinstance(x, torch.Tensor) else x for x in launch.args]
        launch.kernel[launch.grid](*args, **launch.constants)
    touched = set(np.concatenate(seen).tolist())
    return lambda x, offset: stand_ins[id(x)][1].data_ptr() + offset * x.element_size() in touched


FAR = (1 << 31) + 16


@pytest.mark.parametrize("rows", [3, 17])
def test_far_rows(monkeypatch, rows):
    """Row strides past 2^31 elements of x, weight, residual and result, in both kernels."""
    x, weight = huge((rows, 16), (FAR, 1)), huge((3, 16), (FAR, 1))
    residual, out = huge((rows, 3), (FAR, 1)), huge((rows, 3), (FAR, 1))
    at = addresses(monkeypatch, lambda: gemm(x, weight, Epilogue(residual=residual), out=out))
    last = (rows - 1) * FAR
    assert at(x, last + 15) and at(weight, 2 * FAR + 15) and at(residual, last + 2) and at(out, last + 2)
    assert not at(x, last + 16) and not at(out, last + 3)


def test_far_columns(monkeypatch):
    """Transposed operands whose columns lie past 2^31 elements apart, as in gradients of a huge weight."""
    x, weight = huge((16, 3), (1, FAR)), huge((5, 3), (1, FAR))
    at = addresses(monkeypatch, lambda: gemm(x, weight))
    assert at(x, 2 * FAR + 15) and at(weight, 2 * FAR + 4)


def test_far_pictures(monkeypatch):
    x, weight = huge((2, 4, 16), (FAR, 16, 1)), huge((3, 64), (64, 1))
    into = huge((2, 4, 16), (FAR, 16, 1))
    at = addresses(monkeypatch, lambda: gemm(Gathered(x, "pixel_shuffle", 2, 2), weight))
    assert at(x, FAR + 63)
    at = addresses(
        monkeypatch,
        lambda: gemm(huge((2, 3), (3, 1)), huge((64, 3), (3, 1)), out=Gathered(into, "pixel_shuffle", 2, 2)),
    )
    assert at(into, FAR + 63)


def test_sizes_past_32_bits_are_passed_as_such():
    """A weight and a result of more than 2^31 elements: strides stay Python integers, nothing is cut on the way."""
    x, weight = huge((1 << 17, 4096), (4096, 1)), huge((1 << 20, 4096), (4096, 1))
    with triton_runtime.record(TARGETS["sm_80"]) as launches:
        out = gemm(x, weight)
    args = dict(zip(launches[0].kernel.arg_names, launches[0].args, strict=False))
    assert out.numel() > 1 << 31 and args["o_stride"] == 1 << 20 and args["M"] == 1 << 17
