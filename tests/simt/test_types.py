"""bf16 and fp16 of the device headers, as the machine runs them, bit for bit against torch.

A NaN becomes 0x7fff when it is rounded, which is what PTX says of cvt; torch on a CPU keeps another pattern.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import simt

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
THREADS = 256


def _launch(entry: str, dtype: str, buffers: dict[str, torch.Tensor]) -> None:
    kernel = simt.build_kernel("types.cu", f"{entry}_{dtype}", entry, THREADS, T=dtype)
    machine = simt.machine()
    machine.clear()
    for i, (name, tensor) in enumerate(buffers.items()):
        machine.register(tensor, name, i == 0)
    assert machine.launch(kernel, list(buffers.values()), (buffers["x"].numel() // THREADS,), THREADS) == []


@pytest.mark.parametrize("dtype", TYPES)
def test_every_value_widens_as_in_torch(dtype):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TYPES[dtype])
    y = torch.zeros(1 << 16)
    _launch("widen", dtype, {"x": x, "y": y})
    assert torch.equal(torch.isnan(y), torch.isnan(x))
    number = ~torch.isnan(x)
    assert torch.equal(y[number].view(torch.int32), x.float()[number].view(torch.int32))  # -0 and 0 differ


def _floats(dtype: torch.dtype) -> torch.Tensor:
    """Floats that round in every way: random patterns, all values of the type, their midpoints and one bit to either side."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = values[torch.isfinite(values)].double()
    finite = finite.sort().values
    middle = ((finite[1:] + finite[:-1]) / 2).float()
    special = torch.tensor(
        [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65504.0, 65519.99, 65520.0, 3.4e38, 1e-45, -1e-45]
    )
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    near = [torch.nextafter(middle, torch.tensor(s * float("inf"))) for s in (1.0, -1.0)]
    every = torch.cat([special, bits, values, middle, *near])
    return torch.cat([every, torch.zeros(-every.numel() % THREADS)])


@pytest.mark.parametrize("dtype", TYPES)
def test_floats_round_as_in_torch(dtype):
    x = _floats(TYPES[dtype])
    n = x.numel()
    y, pairs, unpacked = torch.zeros(n, dtype=TYPES[dtype]), torch.zeros(n, dtype=torch.int32), torch.zeros(n, 2)
    _launch("narrow", dtype, {"x": x, "y": y, "pairs": pairs, "unpacked": unpacked})
    nan = torch.isnan(x)
    assert nan.any() and (~nan).sum() > 200_000
    wanted = x.to(TYPES[dtype]).view(torch.int16).numpy().view(np.uint16).copy()
    wanted[nan.numpy()] = 0x7FFF
    got = y.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(got, wanted)
    halves = pairs.numpy().view(np.uint32)
    np.testing.assert_array_equal(halves & 0xFFFF, wanted)
    np.testing.assert_array_equal(halves >> 16, wanted.reshape(-1, 2)[:, ::-1].reshape(-1))
    torch.testing.assert_close(unpacked[:, 0], y.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        unpacked[:, 1], y.float().view(-1, 2).flip(1).reshape(-1), rtol=0, atol=0, equal_nan=True
    )
