"""The repair of Triton's interpreter: what upstream gets wrong, and that it is right, watched and counted here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.support import triton_canaries as kernels
from tests.support import triton_interpreter
from tests.support.triton_interpreter import count, to_bits, to_float

triton_interpreter.install()


def test_upstream_still_needs_every_repair():
    """A fault that is gone upstream fails here: then its repair in tests/support/triton_interpreter.py can go, too."""
    program = Path(kernels.__file__)
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found and all(found.values()), f"fixed upstream: {[name for name, fault in found.items() if not fault]}"


def test_repaired():
    found = kernels.answers()
    assert not any(found.values()), f"still wrong: {[name for name, fault in found.items() if fault]}"


def test_rounding_is_torchs():
    x = torch.cat(
        [torch.randn(4096), torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-40, 3.4e38, 1.00390625])]
    )
    assert torch.equal(torch.from_numpy(to_float(to_bits(x.numpy()))), x.bfloat16().float())
    assert (
        to_float(to_bits(torch.tensor([float("nan")]).numpy()))[0] != to_float(to_bits(torch.tensor([0.0]).numpy()))[0]
    )


def test_out_of_bounds_names_the_lanes():
    from triton.runtime.errors import InterpreterError

    with pytest.raises(InterpreterError, match="read out of bounds: 1 of 64 lanes"):
        kernels.read_past_the_end[(1,)](torch.zeros(64), torch.zeros(64), 64)


def test_out_of_bounds_of_a_view():
    from triton.runtime.errors import InterpreterError

    inside = torch.zeros(128)[:64]  # the storage goes on, the tensor does not
    with pytest.raises(InterpreterError, match="out of bounds"):
        kernels.read_past_the_end[(1,)](inside, torch.zeros(64), 64)


def test_race_is_found_and_its_absence_too():
    with pytest.raises(RuntimeError, match="write race: 1 addresses"):
        kernels.same_address[(2,)](torch.zeros(4), 0)
    kernels.same_address[(2,)](torch.zeros(4), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts(dtype):
    x, y, out = (torch.zeros(50, dtype=dtype) for _ in range(3))
    with count() as seen:
        kernels.add[(4,)](x, y, out, 50, 16)
    assert (seen.read, seen.written) == (100 * x.element_size(), 50 * x.element_size())
    assert (seen.programs, seen.launches, seen.flops) == (4, 1, 0)
    a = torch.zeros(16, 16, dtype=dtype)
    with count() as seen:
        kernels.product[(1,)](a, a, torch.zeros(16, 16), 16)
    assert seen.flops == 2 * 16**3
